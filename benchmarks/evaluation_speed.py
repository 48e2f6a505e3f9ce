"""How long an evaluation takes: WikiText-2 and TruthfulQA MC1, and the same questions with the harness's own model.

    python -m benchmarks.evaluation_speed [--model DIR] [--data-dir DIR] [--questions N] [--json FILE]

The whole of WikiText-2's test split in llama.cpp's windows of 512 and all 817 questions, as `srd eval` scores them;
then the first N questions with this package's scorer and with `lm_eval --model hf` (batches of 16, its data at hand),
in turn, for the ratio. Float32 on the CPU with torch's own number of threads.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.models import REPOSITORY, TINY_LLAMA
from srd_modifier.cli._quiet import quiet_libraries
from srd_modifier.evaluation.load import LoadedModel, load
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.tasks.base import Subject
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
from srd_modifier.evaluation.tasks.harness import HarnessTask

_DATA = REPOSITORY.parent / "shared" / "data" / "eval"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--data-dir", type=Path, default=_DATA, help="With wiki.test.raw and mc_task.json.")
    parser.add_argument("--questions", type=int, default=100, help="For the comparison with the harness's own model.")
    parser.add_argument("--json", type=Path, default=None, help="Write the figures.")
    options = parser.parse_args()
    quiet_libraries(bars=False)
    loaded = load(options.model)
    figures: dict[str, float] = {"cores": os.cpu_count() or 1}
    for task in find_tasks(["wikitext2_llamacpp", "truthfulqa_mc1"], TaskOptions(data_dir=options.data_dir)):
        started = time.perf_counter()
        outcome = task.run(Subject(LocalScorer(loaded), loaded))
        figures[task.info.name] = time.perf_counter() - started
        score = outcome.scores[0]
        print(
            f"{task.info.title:24} {figures[task.info.name]:7.1f} s  {score.metric} {score.value:.4f} ({score.count:,})"
        )
    figures |= _against_the_harness(loaded, HarnessTask("truthfulqa_mc1", options.data_dir, limit=options.questions))
    print(f"{options.questions} questions: {figures['ours']:.1f} s, lm_eval --model hf {figures['hf']:.1f} s, "
          f"{figures['ours'] / figures['hf']:.2f}x")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def _against_the_harness(loaded: LoadedModel, task: HarnessTask) -> dict[str, float]:
    """Seconds for the same questions with each, loading and the tasks' own work included for both."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from srd_modifier.evaluation.harness_model import HarnessModel

    _ = task.info

    def run(model: Any) -> float:
        started = time.perf_counter()
        simple_evaluate(model=model, tasks=[task._specification], task_manager=task._manager, limit=task.limit)
        return time.perf_counter() - started

    return {
        "ours": run(HarnessModel(LocalScorer(loaded))),
        "hf": run(HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=16)),
    }


if __name__ == "__main__":
    main()
