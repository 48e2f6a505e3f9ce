"""Programs that quantize small models for their cost, each in a process of its own: from outside and from inside."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srd_modifier.errors import SRDError


def run_program(module: str, order: dict[str, Any], folder: Path, *, timeout: float) -> dict[str, Any]:
    """Run a module of this package as a program, and return what it found.

    Args:
        module: its name; it takes the name of a JSON file, and the last line it prints is a JSON object, in which
            `error` is the sentence that says why it failed, or None.
        order: what is in that file.
        folder: where the file is written.
        timeout: seconds.

    Raises:
        SRDError: it failed, or did not end in time.
    """
    path = folder / "order.json"
    path.write_text(json.dumps(order), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", module, str(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise SRDError(f"the probe did not end within {timeout:g} seconds") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise SRDError(f"the probe failed: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if found["error"]:
        raise SRDError(f"the probe failed: {found['error']}")
    return found


def read_order() -> dict[str, Any]:
    """In such a program: import what is not measured, and read the file that the command line names."""
    import llmcompressor  # noqa: F401 - for the time that it takes

    import srd_modifier.modifier  # noqa: F401 - likewise
    from srd_modifier.cli._quiet import quiet_libraries

    quiet_libraries(bars=False)
    order: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return order


def why_it_failed(work: Callable[[], None]) -> str | None:
    """In such a program: do some work, and say in a sentence why it failed, if it did."""
    try:
        work()
    except SRDError as error:
        return str(error)
    except Exception as error:  # of whatever kind: the one who asked has to know why there is no figure
        return f"{type(error).__name__}: {error}"
    return None
