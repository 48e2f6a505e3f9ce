"""Rebuild the published table of SmolLM2-1.7B after scheduled QAT, from its trained weights.

    python examples/reproduce/smollm2_1_7b_qat.py --model DIR_OR_HUB_ID     # with a GPU of 24 GB
    python examples/reproduce/smollm2_1_7b_qat.py --smoke                   # every step with a small random model

Training is not part of this version of the package, so --model must name the trained weights: a directory or a hub id
of an ordinary dense Transformers checkpoint, as training leaves it. "Original" is that trained model, in all rows.

The published table measured the same rows as for the other models after QAT had moved the weights towards what 4 bits
can hold. What was trained towards round-to-nearest is rounded to nearest here, in groups of 64 with float32 scales:
GPTQ would move the weights away again. Rebuilt, all of it in one run: the trained bf16 model, Q4_K_M as llama-
quantize makes it without and with importance, W4A16 alone, with a residual at 40 to 77 % of the depth and with the
full one, and our calibrated Q4_K_M; each with its perplexity on WikiText-2 (windows of 2048 that advance by 512),
divergence from the trained model, TruthfulQA MC1, bytes, and llama.cpp's own perplexity of the GGUF files.

What to expect: W4A16 alone much nearer to its original than in the table without QAT, and less left for the residual.
Weights that were trained with another scheme than groups of 64 show less of this. 4.5 bits per weight alone, 13.0
with the full residual.
"""

import sys
from collections.abc import Sequence

import pipeline

TABLE = pipeline.Table(
    name="smollm2_1_7b_qat",
    title="SmolLM2-1.7B after QAT",
    model=None,
    missing_model=(
        "training is not part of this version, so --model must name the trained weights of SmolLM2-1.7B after QAT, a "
        "directory or a hub id"
    ),
    recipe=pipeline.NEAREST_IN_GROUPS_OF_64,
    float32_scales=True,
    small_model=pipeline.SMALL_SMOLLM2_1_7B,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
