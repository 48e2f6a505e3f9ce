"""Time of the sensitivity measurement against forward and backward passes over the same tokens.

    python -m benchmarks.sensitivity_cost [--model DIR] [--tokens N] [--repeats N]

The peer is what training would do: forward, cross entropy, backward with gradients of all weights. The two run in turn
in one process; the ratio is the median over the pairs.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks.models import TINY_LLAMA
from srd_modifier.selection.sensitivity import output_sensitivity

_LENGTH = 512


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(1, model.config.vocab_size, (1, _LENGTH), generator=generator)}
        for _ in range(-(-options.tokens // _LENGTH))
    ]
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}

    def sensitivity() -> None:
        output_sensitivity(model, batches, modules, tokens=options.tokens, method="gradient")

    def training() -> None:
        for batch in batches:
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
            model.zero_grad()

    ratios = []
    for _ in range(options.repeats):
        seconds = []
        for work in (training, sensitivity):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
        print(f"forward and backward {seconds[0]:.1f} s, sensitivity {seconds[1]:.1f} s", flush=True)
    print(f"{options.model}, {options.tokens} tokens: {statistics.median(ratios):.2f}x of forward and backward passes")


if __name__ == "__main__":
    main()
