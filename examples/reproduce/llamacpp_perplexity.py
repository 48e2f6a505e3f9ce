"""llama.cpp's own perplexity of GGUF files, which no other program's arithmetic has a part in.

With `llama-perplexity` on PATH it is that program's final estimate over the whole text. Without, llama.cpp's server is
run in this process and asked; it takes a request for every scored token, so only a few windows are read, and the table
says how many. Both cut the text in the same way, but only figures over the same windows can be compared.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pipeline import OWN_PERPLEXITY

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.comparison.environment import library_versions
from srd_modifier.evaluation.comparison.store import OutcomeStore, key_of
from srd_modifier.evaluation.results import ModelResult, Results, Score, TaskInfo
from srd_modifier.evaluation.servers import connect
from srd_modifier.evaluation.tasks.base import Outcome, Subject
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
from srd_modifier.evaluation.tasks.text import METRIC, TextTask
from srd_modifier.gguf.llamacpp import LlamaCpp

if TYPE_CHECKING:
    from pipeline import Sizes

PROGRAM = "llama-perplexity"

_ESTIMATE = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
_CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")

Progress = Callable[[str], Callable[[int, int], None]]


def find_program() -> str | None:
    """`llama-perplexity`, where it is on PATH."""
    return shutil.which(PROGRAM)


def task(data_dir: Path | None, sizes: "Sizes", *, program: str | None) -> TextTask:
    """The text and how it is cut; only as much of it as can be asked for one token at a time, without the program."""
    max_tokens = sizes.llamacpp_tokens if program is None else sizes.max_tokens
    found = find_tasks(
        (OWN_PERPLEXITY,), TaskOptions(data_dir=data_dir, ctx=sizes.llamacpp_ctx, max_tokens=max_tokens)
    )[0]
    assert isinstance(found, TextTask)
    return found


def add_to(
    results: Results,
    files: Sequence[Path],
    own: TextTask,
    output: Path,
    *,
    device: str,
    progress: Progress,
) -> Results:
    """The results with this perplexity in the rows of these files; what was measured before is not measured again.

    Raises:
        SRDError: llama.cpp fails, or says something else than was expected.
    """
    program = find_program()
    way = f"{PROGRAM} {_version(program)}" if program else f"llama.cpp's server, xllamacpp {_wheel()}"
    store = OutcomeStore(output / "scores")
    measured: dict[str, Outcome] = {}
    for model in results.models:
        if Path(model.model) not in files:
            continue
        key = key_of({"llama.cpp": way, "digest": model.digest, "text": own.text.sha256, "settings": own.info.settings})
        outcome = store.read(key)
        if outcome is None:
            if program is None:
                outcome = _by_server(model, own, progress)
            else:
                outcome = _by_program(program, model, own, _text_file(own, output), device)
            store.write(key, outcome)
        measured[model.label] = outcome
    models = [
        replace(model, scores=(*model.scores, *measured[model.label].scores)) if model.label in measured else model
        for model in results.models
    ]
    info = _info(own, way, next(iter(measured.values())).scores[0].count)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return replace(results, created=now, tasks=(*results.tasks, info), models=tuple(models))


def _by_server(model: ModelResult, own: TextTask, progress: Progress) -> Outcome:
    # as many threads as torch was given: more than there are free processors are slower by far
    with LlamaCpp(model.model, context=own.rule.ctx + 1, threads=torch.get_num_threads()) as server:
        return own.run(Subject(connect(server.address)), progress=progress(f"{model.label}: llama.cpp"))


def _by_program(program: str, model: ModelResult, own: TextTask, text: Path, device: str) -> Outcome:
    command = [program, "-m", model.model, "-f", str(text), "-c", str(own.rule.ctx)]
    if own.max_tokens is not None:
        command += ["--chunks", str(max(1, own.max_tokens // own.rule.ctx))]
    if device.startswith("cuda"):
        command += ["-ngl", "99"]
    started = datetime.now(timezone.utc)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise SRDError(f"{program} cannot be run: {error.strerror or error}") from error
    estimate, chunks = _ESTIMATE.search(done.stdout), _CHUNKS.search(done.stdout)
    if done.returncode or estimate is None or chunks is None:
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip()
        raise SRDError(f"{model.model}: {PROGRAM} gave no final estimate, its last words are: {last}")
    scored = int(chunks[1]) * _scored_of_a_window(own)
    score = Score(OWN_PERPLEXITY, METRIC, float(estimate[1]), float(estimate[2]), scored, False)
    return Outcome((score,), seconds=(datetime.now(timezone.utc) - started).total_seconds())


def _info(own: TextTask, way: str, scored: int) -> TaskInfo:
    """What the column is, with the number of windows that were read."""
    windows = scored // _scored_of_a_window(own)
    info = own.info
    return replace(
        info,
        title=f"llama.cpp's own, {windows:,} windows of {own.rule.ctx}",
        description=f"{info.description}; computed by {way} from the GGUF file, over {windows:,} windows",
        settings={**info.settings, "windows": windows, "computed_by": way},
    )


def _scored_of_a_window(own: TextTask) -> int:
    return own.rule.ctx - own.rule.ctx // 2 - 1


def _text_file(own: TextTask, output: Path) -> Path:
    """The text as a file, which it is not where it came from the hub."""
    if own.text.path.is_file():
        return own.text.path
    path = output / "wiki.test.raw"
    path.write_text(own.text.content, encoding="utf-8", newline="")
    return path


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    found = re.search(r"version: (\S+)", done.stdout + done.stderr)
    return f"build {found[1]}" if found else "of an unknown build"


def _wheel() -> str:
    return library_versions(("xllamacpp",)).get("xllamacpp", "")
