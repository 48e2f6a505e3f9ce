"""Quantize a small model on made-up samples and print what its stages took: a program for a process of its own.

    python -m srd_modifier.planning.calibrating ORDER.json

ORDER.json is `{"recipe": FILE, "model": DIR, "output": DIR, "samples": COUNT, "length": TOKENS, "vocabulary": SIZE}`.
The last line printed is a JSON object: `seconds`, `peaks` and `cached_bytes` as `stages.Stages` has them; `weights`
that were quantized; and `error`, the sentence that says why it failed, if it did.
"""

import json
from pathlib import Path
from typing import Any

from srd_modifier.planning.programs import read_order, why_it_failed
from srd_modifier.planning.stages import Stages


def main() -> None:
    """Run the job of the file that the command line names."""
    print(json.dumps(_run(read_order())), flush=True)


def _run(order: dict[str, Any]) -> dict[str, Any]:
    import torch

    from srd_modifier.checkpoint.base import BaseCheckpoint
    from srd_modifier.quantizing import quantize

    shape = (order["samples"], order["length"])
    samples = torch.randint(order["vocabulary"], shape, generator=torch.Generator().manual_seed(0)).tolist()
    stages = Stages()
    with stages:
        error = why_it_failed(
            lambda: quantize(order["model"], Path(order["recipe"]), Path(order["output"]), dataset=samples)
        )
    if error is not None:
        return {"error": error}
    return {
        "seconds": stages.seconds,
        "peaks": stages.peaks,
        "cached_bytes": stages.cached_bytes,
        "weights": BaseCheckpoint(Path(order["output"])).quantized_size()[0],
        "error": None,
    }


if __name__ == "__main__":
    main()
