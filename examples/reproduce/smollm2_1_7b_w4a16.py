"""Rebuild the published table of SmolLM2-1.7B W4A16, the compressed-tensors release (HuggingFaceTB/SmolLM2-1.7B).

    python examples/reproduce/smollm2_1_7b_w4a16.py           # with the Hugging Face hub and a GPU of 24 GB
    python examples/reproduce/smollm2_1_7b_w4a16.py --smoke   # every step with a small random model, about a minute

The published release is GPTQ W4A16, llm-compressor's preset: symmetric groups of 128 with scales of 16 bits, 4.13
bits per weight, which vLLM and Transformers load as they are. The recipe here is recipes/srd_gptq.yaml, the same with
an int8 residual of what GPTQ loses. Rebuilt, all of it in one run: the bf16 original, Q4_K_M as llama-quantize makes
it without and with importance, W4A16 alone, with a residual at 40 to 77 % of the depth and with the full one, and our
calibrated Q4_K_M; each with its perplexity on WikiText-2 (windows of 2048 that advance by 512), divergence from the
original, TruthfulQA MC1, bytes, and llama.cpp's own perplexity of the GGUF files.

What to expect: 4.13 bits per weight alone and 12.38 with the full residual, which gives the original's perplexity
back; the selective row between them in bytes, and less than its share of the bytes in quality, since a part of the
residual undoes a part of what GPTQ compensated. GPTQ depends on the calibration text; that of the release is not
known here, so the figures of W4A16 need not be the card's to the digit.
"""

import sys
from collections.abc import Sequence

import pipeline

TABLE = pipeline.Table(
    name="smollm2_1_7b_w4a16",
    title="SmolLM2-1.7B W4A16",
    model="HuggingFaceTB/SmolLM2-1.7B",
    recipe=(pipeline.REPOSITORY / "recipes" / "srd_gptq.yaml").read_text(encoding="utf-8"),
    needs_data=True,
    small_model=pipeline.SMALL_SMOLLM2_1_7B,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
