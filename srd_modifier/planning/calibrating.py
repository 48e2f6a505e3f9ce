"""Quantize a small model on made-up samples and print what its stages took: a program for a process of its own.

    python -m srd_modifier.planning.calibrating ORDER.json

ORDER.json is `{"recipe": FILE, "model": DIR, "output": DIR, "samples": COUNT, "length": TOKENS, "vocabulary": SIZE}`.
The last line printed is a JSON object: `seconds`, `peaks` and `cached_bytes` as `stages.Stages` has them; `weights`
that were quantized; and `error`, the sentence that says why it failed, if it did.
"""

import json
import sys
from pathlib import Path
from typing import Any

from srd_modifier.planning.stages import Stages


def main() -> None:
    """Run the job of the file that the command line names."""
    # imports are not what is measured
    import llmcompressor  # noqa: F401

    import srd_modifier.modifier  # noqa: F401
    from srd_modifier.cli._quiet import quiet_libraries

    quiet_libraries(bars=False)
    print(json.dumps(_run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)


def _run(order: dict[str, Any]) -> dict[str, Any]:
    import torch

    from srd_modifier.checkpoint.base import BaseCheckpoint
    from srd_modifier.errors import SRDError
    from srd_modifier.quantizing import quantize

    shape = (order["samples"], order["length"])
    samples = torch.randint(order["vocabulary"], shape, generator=torch.Generator().manual_seed(0)).tolist()
    stages = Stages()
    try:
        with stages:
            quantize(order["model"], Path(order["recipe"]), Path(order["output"]), dataset=samples)
    except SRDError as error:
        return {"error": str(error)}
    except Exception as error:  # of whatever kind: the one who asked has to know why there is no figure
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "seconds": stages.seconds,
        "peaks": stages.peaks,
        "cached_bytes": stages.cached_bytes,
        "weights": BaseCheckpoint(Path(order["output"])).quantized_size()[0],
        "error": None,
    }


if __name__ == "__main__":
    main()
