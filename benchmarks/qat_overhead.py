"""What fake quantization adds to a training step: time and memory against plain training, in processes of their own.

    python -m benchmarks.qat_overhead [--model DIR] [--steps N] [--batch-size N] [--repeats N] [--width BITS]

Both train with cross-entropy and AdamW on the same random tokens, windows of 512, float32, all parameters. A step is
forward, backward, clipping of gradients and the optimizer's. The peak is anonymous memory with the interpreter and its
libraries. Widths: 4 is the grid itself; a fraction, as 4.5, computes two grids and is the dearest step of a schedule.
"""

import argparse

import torch

from benchmarks.models import TINY_LLAMA
from benchmarks.process import alternate, measure, median, print_cost, ratio

_MODULE = "benchmarks.qat_overhead"
_LENGTH = 512
_PLAIN, _FAKE = "plain", "fake-quantized"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=float, nargs="+", default=[4.0, 4.5])
    parser.add_argument("--work", choices=(_PLAIN, _FAKE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        step(options.model, options.steps, options.batch_size, None if options.work == _PLAIN else options.width[0])
        return
    pairs = f"median of {options.repeats} pairs of {options.steps} steps"
    print(f"{options.model}, {options.batch_size} x {_LENGTH} tokens, {pairs}")
    for width in options.width:
        common = ["--model", options.model, "--steps", str(options.steps), "--batch-size", str(options.batch_size)]
        common += ["--width", str(width)]
        costs = alternate(_MODULE, [*common, "--work", _PLAIN], [*common, "--work", _FAKE], options.repeats)
        seconds = [median(own, "seconds") / options.steps for own in costs]
        memory = [median(own, "peak_anonymous_mb") for own in costs]
        print(
            f"width {width:g}: {seconds[1]:.2f} s a step against {seconds[0]:.2f} s: {ratio(costs, 'seconds'):.2f}x; "
            f"{memory[1]:.0f} MB against {memory[0]:.0f} MB: {ratio(costs, 'peak_anonymous_mb'):.2f}x",
            flush=True,
        )


def step(model_name: str, steps: int, batch_size: int, width: float | None) -> None:
    """Train for some steps and print the cost; without a width plainly."""
    from transformers import AutoModelForCausalLM

    from srd_modifier.qat.linear import fake_quantize, set_width
    from srd_modifier.qat.start import nearest_w4

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).train()
    if width is not None:
        start = nearest_w4(model)
        start.apply(model)
        fake_quantize(model, start.grids)
        set_width(model, width)
        del start
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(0, model.config.vocab_size, (steps + 1, batch_size, _LENGTH))

    def train(batch: torch.Tensor) -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    train(tokens[-1])  # the optimizer makes its state in the first step
    print_cost(measure(lambda: [train(batch) for batch in tokens[:steps]] and None))


if __name__ == "__main__":
    main()
