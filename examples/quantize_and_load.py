"""Quantize a model to W4A16 with a residual, load it in Transformers and turn the correction up and down.

    python examples/quantize_and_load.py [MODEL] [TEXT] [--output DIR]

With no arguments it takes the small model and the text of this folder, and needs neither a GPU nor a network.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier import SRDModifier, set_alpha

HERE = Path(__file__).parent
WINDOW = 256  # tokens per sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "tiny-llama"), help="model directory or name")
    parser.add_argument("text", nargs="?", type=Path, default=HERE / "text" / "demo.txt", help="UTF-8 text")
    parser.add_argument("--output", default="out/tiny-llama-w4-d8", help="checkpoint directory to make")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    held_out = torch.tensor(windows[-8:])  # a quantizer must not be judged on what it was calibrated on

    # the residual is what the modifiers after SRDModifier take away from the weights
    recipe = [
        SRDModifier(ignore=["lm_head"]),
        GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"]),
    ]
    calibration = Dataset.from_dict({"input_ids": windows[:-8]})
    oneshot(model=options.model, recipe=recipe, dataset=calibration, max_seq_length=WINDOW, output_dir=options.output)

    model = AutoModelForCausalLM.from_pretrained(options.output)
    for alpha in (0.0, 0.5, 1.0):  # from the plain W4A16 model to the full correction
        set_alpha(model, alpha)
        with torch.no_grad():
            loss = model(input_ids=held_out, labels=held_out).loss.item()
        print(f"alpha {alpha:.1f}: {loss:.4f} nats per token")


if __name__ == "__main__":
    main()
