"""`lm_eval --model hf` scores the corrected model where it finds the plugin, and plain W4 where it does not.

Each of its runs is a process of its own, as a user starts it. What it must give is computed here, by Transformers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from random_models import make_llama, save_model
from rtn import write_checkpoint
from torch import Tensor
from transformers import AutoTokenizer

from srd_modifier import autoload
from srd_modifier.transformers import load_corrected

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
CHOICES = ["by the river", "north of the bridge", "nowhere at all"]
QUESTIONS = [f"Where is the {place}?" for place in ("church", "market", "square", "mill")]

# The harness would read the definitions of all its tasks and ask pip and a dozen programs about the machine, and
# Transformers would import two libraries that it finds and that are not needed: seconds for each.
QUICK = """
import transformers.utils
transformers.utils.is_hqq_available = transformers.utils.is_sklearn_available = lambda *given, **named: False
import lm_eval.evaluator, lm_eval.tasks
lm_eval.evaluator.add_env_info = lambda results: None
make, own = lm_eval.tasks.TaskManager.__init__, {"include_defaults": False}
lm_eval.tasks.TaskManager.__init__ = lambda self, *given, **named: make(self, *given, **named | own)
"""
AS_A_MODULE = "import runpy; runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A16 that is far from its original, with a residual."""
    folder = tmp_path_factory.mktemp("checkpoint")
    original = save_model(make_llama(initializer_range=0.2), folder / "original")
    return write_checkpoint(original, folder / "srd", group_size=-1)


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where three runs, at the same time, left what they logged."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS))
    definition = {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "datasets")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "own_choices.yaml").write_text(yaml.safe_dump(definition))
    site = folder / "site-packages"
    site.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoload.sysconfig, "get_paths", lambda: {"purelib": str(site)})
        autoload.turn_on()
    programs = {
        "autoload": f"import site; site.addsitedir({str(site)!r})\n{QUICK}\n{AS_A_MODULE}",
        # the two lines of docs/evaluation.md
        "import": f"import srd_modifier\n{QUICK}\nfrom lm_eval.__main__ import cli_evaluate; cli_evaluate()",
        "neither": f"{QUICK}\n{AS_A_MODULE}",
    }
    arguments = ["--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "own_choices"]
    arguments += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "4", "--log_samples"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program, *arguments, "--output_path", str(folder / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
        )
        for name, program in programs.items()
    }
    said = {name: process.communicate()[0] for name, process in started.items()}
    for name, process in started.items():
        assert process.returncode == 0, said[name]
    return {name: folder / name for name in programs}


def logged(folder: Path) -> Tensor:
    """Log-likelihoods [questions, choices] as the harness wrote them."""
    (path,) = folder.rglob("samples_own_choices_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[float, Tensor]:
    """The same for the corrected model and for plain W4, by alpha."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def likelihood(model: Any, question: str, choice: str) -> float:
        context, whole = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        return sum(float(found[place - 1, whole[place]]) for place in range(len(context), len(whole)))

    models = {alpha: load_corrected(checkpoint, alpha=alpha, dtype=torch.float32) for alpha in (0.0, 1.0)}
    return {
        alpha: torch.tensor([[likelihood(model, question, choice) for choice in CHOICES] for question in QUESTIONS])
        for alpha, model in models.items()
    }


def test_the_two_models_differ(expected):
    assert float((expected[1.0] - expected[0.0]).abs().median()) > 0.1


@pytest.mark.parametrize(("name", "alpha"), [("autoload", 1.0), ("import", 1.0), ("neither", 0.0)])
def test_the_harness_scores_the_model_that_it_finds(runs, expected, name, alpha):
    torch.testing.assert_close(logged(runs[name]), expected[alpha], rtol=0, atol=1e-3)
