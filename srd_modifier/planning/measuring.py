"""Quantize small models one after another and print what each took: a program for a process of its own.

    python -m srd_modifier.planning.measuring ORDER.json

ORDER.json is `{"recipe": FILE, "seconds": LIMIT, "jobs": [{"model": DIR, "output": DIR}]}`. The last line printed is a
JSON object: `runs`, the seconds and quantized weights of every job that was begun within the limit; `peak_bytes`, the
most that was resident; and `error`, the sentence that says why a job failed, if one did.

Each job is a fork of a process that has only imported, so that none is faster for what another has loaded or freed.
The first is then done once more, in this process, for the memory: a fork does not count the pages of the libraries.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from srd_modifier.planning.programs import read_order, why_it_failed


def main() -> None:
    """Run the jobs of the file that the command line names."""
    order = read_order()
    started = time.perf_counter()
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"runs": runs, "peak_bytes": None, "error": None}
    for job in order["jobs"]:
        if runs and time.perf_counter() - started > order["seconds"]:
            break
        run = _in_fork(job, Path(order["recipe"]))
        if "error" in run:
            result["error"] = run["error"]
            break
        runs.append(run)
    if runs:
        again = order["jobs"][0]
        _run(again | {"output": again["output"] + "-again"}, Path(order["recipe"]))
        result["peak_bytes"] = _peak_bytes()
    print(json.dumps(result), flush=True)


def _in_fork(job: dict[str, str], recipe: Path) -> dict[str, Any]:
    result = Path(job["output"] + ".json")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result.write_text(json.dumps(_run(job, recipe)), encoding="utf-8")
            status = 0
        finally:
            os._exit(status)  # not back into the caller, whatever happens
    os.waitpid(child, 0)
    if not result.is_file():
        return {"error": "the process ended, which happens where memory runs out"}
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _peak_bytes() -> int:
    from srd_modifier.transformers.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    if peak is not None:
        return peak
    import resource  # where this is all there is; on Linux it counts what the process was before it ran this program

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _run(job: dict[str, str], recipe: Path) -> dict[str, Any]:
    from srd_modifier.checkpoint.base import BaseCheckpoint
    from srd_modifier.quantizing import quantize

    begun = time.perf_counter()
    error = why_it_failed(lambda: quantize(job["model"], recipe, Path(job["output"])))
    if error is not None:
        return {"error": error}
    seconds = time.perf_counter() - begun
    weights, _ = BaseCheckpoint(Path(job["output"])).quantized_size()
    return {"seconds": seconds, "weights": weights}


if __name__ == "__main__":
    main()
