"""Any task of the lm-evaluation-harness, through the harness itself, with its data from the hub or from local files."""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.results import Score, TaskInfo
from srd_modifier.evaluation.scorer import Progress
from srd_modifier.evaluation.scores import Reference
from srd_modifier.evaluation.tasks.base import Items, Outcome, Subject
from srd_modifier.evaluation.tasks.data import local_files, reader_of

TITLES = {
    "truthfulqa_mc1": "TruthfulQA MC1",
    "truthfulqa_mc2": "TruthfulQA MC2",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "piqa": "PIQA",
    "gsm8k": "GSM8K",
    "mmlu": "MMLU",
}


@dataclass(frozen=True)
class HarnessTask:
    """A task or a group of tasks, by its name in the harness.

    Attributes:
        name: as `lm_eval --tasks` takes it.
        data_dir: where `data.local_files` looks before the hub is asked; YAML files of local tasks may lie there too.
        num_fewshot: examples shown before a question; `None` for the task's own number.
        limit: only the first so many questions (of each task of a group), `None` for all.
    """

    name: str
    data_dir: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    @cached_property
    def info(self) -> TaskInfo:
        """What is asked; the task's definition and its data are read for it.

        Raises:
            SRDError: There is no such task, or its data cannot be read.
        """
        with self._explained():
            leaves = list(self._manager.load([self._specification])["tasks"].values())
            questions = [question for task in leaves for question in self._questions(task)]
        first = leaves[0].config
        shots = (first.num_fewshot or 0) if self.num_fewshot is None else self.num_fewshot
        versions = sorted({str(task.VERSION) for task in leaves})
        source = self._local_source or "/".join(filter(None, (first.dataset_path, first.dataset_name)))
        return TaskInfo(
            name=self.name,
            title=TITLES.get(self.name, self.name),
            description=f"{self.name} of lm-evaluation-harness {importlib.metadata.version('lm_eval')} (task version "
            f"{', '.join(versions)}): {len(questions):,} questions, {shots} examples shown",
            source=source,
            sha256=hashlib.sha256("\n".join(questions).encode()).hexdigest(),
            settings={"num_fewshot": shots, "limit": self.limit, "questions": len(questions)},
        )

    def run(
        self,
        subject: Subject,
        *,
        reference: Reference | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Outcome:
        """The harness's own metrics and standard errors; a reference changes nothing.

        Raises:
            SRDError: The task's data cannot be read, or the model cannot answer.
        """
        from lm_eval.evaluator import simple_evaluate

        from srd_modifier.evaluation.harness_model import HarnessModel

        _ = self.info  # what is wrong with the data is said before anything is scored
        started = time.perf_counter()
        results = simple_evaluate(
            model=HarnessModel(subject.scorer, progress=progress),
            tasks=[self._specification],
            task_manager=self._manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            log_samples=True,
        )
        return self._outcome(results, time.perf_counter() - started)

    def _outcome(self, results: Any, seconds: float) -> Outcome:
        figures = results["results"][self.name]
        better = results["higher_is_better"].get(self.name, {})
        samples = [sample for task in sorted(results["samples"]) for sample in results["samples"][task]]
        scores: list[Score] = []
        items: dict[str, Items] = {}
        for key, value in figures.items():
            metric, _, filtered_by = key.partition(",")
            if not filtered_by or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if filtered_by == "none" else f"{metric} ({filtered_by})"
            stderr = figures.get(f"{metric}_stderr,{filtered_by}")
            values = [each[metric] for each in samples if metric in each and each["filter"] == filtered_by]
            scores.append(
                Score(
                    self.name,
                    name,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    max(1, len(values)),
                    bool(better.get(metric, True)),
                )
            )
            # other metrics are more than a mean over questions, such as word_perplexity
            if values and all(isinstance(each, int | float) for each in values):
                items[name] = Items(tuple(map(float, values)), (1.0,) * len(values))
        if not scores:
            raise SRDError(f"task {self.name}: the harness gave no metric")
        return Outcome(tuple(scores), items, seconds)

    def _questions(self, task: Any) -> list[str]:
        documents = task.eval_docs
        count = len(documents) if self.limit is None else min(self.limit, len(documents))
        return [json.dumps(documents[place], sort_keys=True, default=str) for place in range(count)]

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """For what is written on the way, gone with this object."""
        return tempfile.TemporaryDirectory(prefix="srd-task-")

    @cached_property
    def _manager(self) -> Any:
        require("lm_eval", extra="eval")
        # what it warns of are options that are not ours
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        own = self.data_dir if self.data_dir is not None and any(self.data_dir.glob("*.yaml")) else None
        manager = _index(self.name.partition("_")[0], own)
        if self.name not in manager.task_index:
            manager = _index(None, own)
        if self.name not in manager.task_index:
            close = difflib.get_close_matches(self.name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ", see `lm_eval ls tasks`"
            raise SRDError(f"task {self.name}: the lm-evaluation-harness has no task of this name{hint}")
        return manager

    @cached_property
    def _files(self) -> dict[str, str] | None:
        return None if self.data_dir is None else local_files(self.name, self.data_dir, Path(self._folder.name))

    @property
    def _local_source(self) -> str | None:
        if self._files is None or self.data_dir is None:
            return None
        names = sorted({Path(file).name for file in self._files.values()})
        return f"{self.data_dir}: {', '.join(names)}"

    @cached_property
    def _specification(self) -> str:
        """The name, or the path of a definition that is the task's own with other data."""
        files = self._files
        if files is None:
            return self.name
        import yaml

        definition = {
            "include": str(self._manager.task_index[self.name].yaml_path),
            "task": self.name,
            "dataset_path": reader_of(files),
            "dataset_name": None,
            **dict.fromkeys(self._missing_splits(files)),
            # a cache of its own: a file that was changed is never taken for the one before
            "dataset_kwargs": {"data_files": files, "cache_dir": self._folder.name},
        }
        path = Path(self._folder.name) / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(definition), encoding="utf-8")
        return str(path)

    def _missing_splits(self, files: dict[str, str]) -> list[str]:
        """Options of the task that name a split without a file: the harness reads all splits that are named.

        Raises:
            SRDError: Examples are to be shown, and the split that they come from is one of these.
        """
        own = self._manager.task_index[self.name].cfg or {}
        options = ("training_split", "validation_split", "test_split", "fewshot_split")
        missing = [option for option in options if own.get(option) is not None and own[option] not in files]
        shots = (own.get("num_fewshot") or 0) if self.num_fewshot is None else self.num_fewshot
        examples = "fewshot_split" if own.get("fewshot_split") else "training_split"
        if shots and examples in missing and "samples" not in (own.get("fewshot_config") or {}):
            raise SRDError(
                f"task {self.name}: shows {shots} examples from its {own[examples]} split, for which --data-dir must "
                f"have {self.name}/{own[examples]}.jsonl beside the questions; or show none, with num_fewshot 0"
            )
        return missing

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """One sentence for whatever the loader of the data, or the task's own code, raises."""
        try:
            yield
        except SRDError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            where = "the Hugging Face hub" if self._files is None else self._local_source
            hint = "" if self._files else f"; --data-dir may hold {self.name}.jsonl in the columns of that data set"
            raise SRDError(
                f"task {self.name}: its data could not be read from {where} ({type(error).__name__}: {reason}){hint}"
            ) from error


@cache
def _index(folder: str | None, own: Path | None) -> Any:
    """The harness's tasks: those of one of its folders, which takes no time, or all, which takes ten seconds."""
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager(include_path=own)
    paths = [path for path in (Path(tasks.__file__).parent / folder, own) if path is not None and path.is_dir()]
    return tasks.TaskManager(include_path=paths or None, include_defaults=False)
