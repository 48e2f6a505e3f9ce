"""Rebuild the published table of TinyLlama-1.1B-Chat (TinyLlama/TinyLlama-1.1B-Chat-v1.0).

    python examples/reproduce/tinyllama_1_1b.py               # with the Hugging Face hub and a GPU of 16 GB
    python examples/reproduce/tinyllama_1_1b.py --smoke       # every step with a small random model, about a minute

The published table was one of the first: W4A16 rounded to nearest in groups of 64 with float32 scales, WikiText-2 in
windows of 2048 that advance by 512. Its figures, for orientation and not measured here:

    published       perplexity    bits/weight
    FP16            7.0952        16
    alpha 0         7.5389        4.5
    alpha 0.5       7.1891
    alpha 1         7.0950        13.0

Rebuilt here, all of it in one run: the bf16 original, Q4_K_M as llama-quantize makes it without and with importance,
W4A16 alone, with a residual at 40 to 77 % of the depth, at alpha 0.5 and with the full one, and our calibrated
Q4_K_M; each with its perplexity, divergence from the original, TruthfulQA MC1, bytes, and llama.cpp's own perplexity
of the GGUF files.

What to expect: 4.5 and 13.0 bits per weight exactly (13.0 for alpha 0.5 as well), perplexities near the published
ones, and those of the original and of alpha 1 closer to each other than their standard errors by far. The published
reference was FP16 and this one is bf16 as the hub has it, computed in float32 unless --dtype says otherwise; last
digits differ.
"""

import sys
from collections.abc import Sequence

import pipeline

TABLE = pipeline.Table(
    name="tinyllama_1_1b",
    title="TinyLlama-1.1B-Chat-v1.0",
    model="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    recipe=pipeline.NEAREST_IN_GROUPS_OF_64,
    float32_scales=True,
    alphas=(0.5,),
    # 22 layers, hidden 2048, 32 heads and 4 for keys, feed-forward 5632 = 2.75 of it, a head of its own. All widths
    # are whole blocks of 256, which 2.75 * 256 is not: 768 is the nearest that is.
    small_model={
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
