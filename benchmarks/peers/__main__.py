"""Peers side by side: every quantizer from its own package, on one calibration, scored in one run.

    make bench-quality                      (options in QUALITY='--peers ggml,srd --limit 100')
    python -m benchmarks.peers [--model DIR] [--calibration FILE|self] [--data-dir DIR] [--text FILE] [--tasks NAMES]
                               [--max-tokens N] [--limit N] [--peers NAMES] [--output DIR] [--publish]

By default tiny-llama, calibrated on 64 windows of 512 tokens of ../shared/data/calib/wiki.txt, asked for WikiText-2 in
llama.cpp's windows and for TruthfulQA MC1 with data from ../shared/data/eval; where these are not at hand, calibrated
on text that the model writes itself and scored on the demo's text. Float32, against the bf16 original. Every model is
saved by its own package and scored from what is on disk; bytes are those of its files. A peer that cannot run on this
machine is named with its reason. An interrupted run goes on where it stopped; `make clean` lets it begin anew.

`--publish` writes figures, table and plot into docs/, and the table into README.md between the marks that are there.
"""

import argparse
import dataclasses
import pickle
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks.models import REPOSITORY, TINY_LLAMA
from benchmarks.peers import PEERS
from benchmarks.peers.base import Made, Setting, Unavailable
from benchmarks.peers.publish import publish
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.cli._quiet import quiet_libraries
from srd_modifier.evaluation.comparison.candidate import Candidate
from srd_modifier.evaluation.comparison.environment import library_versions
from srd_modifier.evaluation.comparison.report import write_report
from srd_modifier.evaluation.comparison.run import Setting as ScoreSetting
from srd_modifier.evaluation.comparison.run import compare
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.table import markdown_table
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks

_DATA = REPOSITORY.parent / "shared" / "data"
_DEMO = REPOSITORY / "examples" / "text" / "demo.txt"
_SELF = "self"


def main() -> None:
    options = _parse()
    quiet_libraries(bars=False)
    models = options.output / "models"
    models.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        options.model, _samples(options), options.samples_length, models, options.group_size, options.seed
    )
    found, unavailable = _make(setting, options.peers)
    text = None if options.tasks else options.text
    tasks = find_tasks(
        options.tasks,
        TaskOptions(data_dir=options.data_dir, text=text, max_tokens=options.max_tokens, limit=options.limit),
    )
    results = compare(
        Candidate(options.model, "bf16 original", "original"),
        [_candidate(made, options.model) for made in found],
        tasks,
        options.output,
        setting=ScoreSetting(cache=options.output / "reference"),
        command=["python", "-m", "benchmarks.peers", *(shlex.quote(word) for word in sys.argv[1:])],
        settings={
            "max_tokens": options.max_tokens,
            "limit": options.limit,
            "calibration": Path(options.calibration).name,
            "calibration tokens": sum(map(len, setting.samples)),
            "not run": "; ".join(f"{name} ({reason})" for name, reason in unavailable.items()) or None,
        },
        progress=_report,
    )
    write_report(results, options.output)
    print(markdown_table(results))
    for peer, reason in unavailable.items():
        print(f"not run: {peer}: {reason}")
    if options.publish:
        publish(options.output)


def _parse() -> argparse.Namespace:
    wiki, evaluation = _DATA / "calib" / "wiki.txt", _DATA / "eval"
    at_hand = evaluation.is_dir()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--calibration", default=str(wiki) if wiki.exists() else _SELF)
    parser.add_argument("--samples", type=int, default=64, help="Calibration samples.")
    parser.add_argument("--samples-length", type=int, default=512, help="Tokens of each.")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=evaluation if at_hand else None)
    parser.add_argument("--text", type=Path, default=_DEMO, help="Scored where there are no tasks.")
    parser.add_argument("--tasks", type=_names, default=["wikitext2_llamacpp", "truthfulqa_mc1"] if at_hand else [])
    parser.add_argument("--max-tokens", type=int, default=40_960, help="Of the text.")
    parser.add_argument("--limit", type=int, default=200, help="Questions of a task.")
    parser.add_argument("--peers", type=_names, default=list(PEERS), help=f"Of {', '.join(PEERS)}.")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "out" / "peers")
    parser.add_argument("--publish", action="store_true", help="Renew docs/ and README.md.")
    options = parser.parse_args()
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer {unknown[0]!r}, only {', '.join(PEERS)}")
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _samples(options: argparse.Namespace) -> list[list[int]]:
    """Token ids to calibrate on, the same for every peer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from srd_modifier.calibration import from_file, from_model

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    amount = {"num_samples": options.samples, "max_seq_length": options.samples_length, "seed": options.seed}
    if options.calibration == _SELF:
        return from_model(AutoModelForCausalLM.from_pretrained(options.model).eval(), tokenizer, **amount)
    return from_file(Path(options.calibration), tokenizer, **amount)


def _make(setting: Setting, names: list[str]) -> tuple[list[Made], dict[str, str]]:
    """What every peer makes, and why some cannot; what an interrupted run has made is taken from it."""
    found: list[Made] = []
    unavailable: dict[str, str] = {}
    for name in names:
        own = dataclasses.replace(setting, folder=setting.folder / name)
        done = setting.folder / f"{name}.pickle"
        rows = _made_before(done, own)
        if rows is None:
            shutil.rmtree(own.folder, ignore_errors=True)
            own.folder.mkdir()
            rows = []
            try:
                for made in PEERS[name](own):
                    print(f"made {made.label} in {made.seconds:.0f} s ({made.package})", flush=True)
                    rows.append(made)
            except Unavailable as reason:
                print(f"not run: {name}: {reason}", flush=True)
                unavailable[name] = str(reason)
            else:
                done.write_bytes(pickle.dumps((_circumstances(own), rows)))
        found += rows
    return found, unavailable


def _made_before(path: Path, setting: Setting) -> list[Made] | None:
    """The rows of a run under the same circumstances."""
    if not path.is_file():
        return None
    before, rows = pickle.loads(path.read_bytes())
    return rows if before == _circumstances(setting) else None


def _circumstances(setting: Setting) -> tuple[Setting, str, dict[str, str]]:
    return setting, model_digest(find_model(setting.model)), library_versions()


def _candidate(made: Made, model: str) -> Candidate:
    return Candidate(
        str(made.path),
        made.label,
        made.family,
        alpha=made.alpha,
        chunks=made.chunks,
        read=made.load,
        tokenizer=model,
        bytes_on_disk=made.bytes_on_disk,
        notes=(f"Made by {made.package}.", *((made.note,) if made.note else ())),
    )


def _report(title: str) -> "_Lines":
    return _Lines(title)


@dataclasses.dataclass
class _Lines:
    """A line when a piece of work is done, since a run takes long and its log is read later."""

    title: str
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self.started = time.perf_counter()
        if done == total:
            print(f"{self.title}: {total} in {time.perf_counter() - self.started:.0f} s", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
