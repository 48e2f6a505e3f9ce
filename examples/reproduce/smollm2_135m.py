"""Rebuild the published table of SmolLM2-135M (HuggingFaceTB/SmolLM2-135M).

    python examples/reproduce/smollm2_135m.py                 # with the Hugging Face hub and a GPU
    python examples/reproduce/smollm2_135m.py --smoke         # every step with a small random model, about a minute

The published table was one of the first: W4A16 rounded to nearest in groups of 64 with float32 scales (4.5 bits per
weight, 13.0 with the full int8 residual), beside Q4_K_M. Rebuilt here, all of it in one run: the bf16 original,
Q4_K_M as llama-quantize makes it without and with importance, W4A16 alone, with a residual at 40 to 77 % of the depth
and with the full one, and our calibrated Q4_K_M; each with its perplexity on WikiText-2 (windows of 2048 that advance
by 512), divergence from the original, TruthfulQA MC1, bytes, and llama.cpp's own perplexity of the GGUF files.

What to expect: alpha 1 gives the original's perplexity back to the last digits, the selective row lies between alpha
0 and 1 in bytes, and Q4_K_M takes more than its name says: rows of 576 are no whole number of K-quants' blocks, so
most matrices fall back to Q5_0 and Q8_0, 6.16 bits per weight of the whole file. All three files have the same types
and nearly the same bytes. TruthfulQA MC1 of a model of this size is close to guessing, and most differences are
within its standard error.
"""

import sys
from collections.abc import Sequence

import pipeline

TABLE = pipeline.Table(
    name="smollm2_135m",
    title="SmolLM2-135M",
    model="HuggingFaceTB/SmolLM2-135M",
    recipe=pipeline.NEAREST_IN_GROUPS_OF_64,
    float32_scales=True,
    # 30 layers, hidden 576, 9 heads and 3 for keys, feed-forward 1536 = 8/3 of it, tied. Both widths are whole groups
    # of 64 and not of 128, and no whole number of K-quants' blocks of 256; that of the feed-forward is one.
    small_model={
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
