"""Tasks of the lm-evaluation-harness against its own model for Transformers, on the same files.

What is expected is the harness's alone: its `HFLM`, told where the data lies by definitions that are written here.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from random_models import make_llama
from transformers import LlamaForCausalLM

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.harness_model import HarnessModel
from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.tasks import harness
from srd_modifier.evaluation.tasks.base import Outcome, Subject
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
from srd_modifier.evaluation.tasks.harness import HarnessTask

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
POSITIONS = 384
PLACES = ["river", "bridge", "church", "market", "square", "mill"]

TRUTHFULQA = [
    {
        "question": f"What is said of the {place}?",
        "mc1_targets": {f"It is {word} the {place}.": int(word == "by") for word in ("by", "above", "no part of")},
        "mc2_targets": {f"The {place} is {word}.": int(word != "gone") for word in ("old", "tall", "gone")},
    }
    for place in PLACES
]
HELLASWAG = [
    {
        "ind": number,
        "activity_label": "Walking",
        "ctx_a": f"A man walks to the {place}.",
        "ctx_b": "then he",
        "ctx": f"A man walks to the {place}. then he",
        "endings": [f"sits by the {place}.", "[header] turns back.", "sings of timber and of stone.", "sleeps."],
        "label": str(number % 4),
        "source_id": f"source~{number}",
        "split": "val",
    }
    for number, place in enumerate(PLACES)
]
WINOGRANDE = [
    {
        "sentence": f"The {place} was older than the tower, so the _ was repaired first.",
        "option1": place,
        "option2": "tower",
        "answer": str(1 + number % 2),
    }
    for number, place in enumerate(PLACES)
]
ARC = [
    {
        "id": f"q{number}",
        "question": f"Where is the {place}?",
        "choices": {"text": ["north", "south", f"by the {place}", "nowhere"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }
    for number, place in enumerate(PLACES)
]
PIQA = [
    {
        "goal": f"Reach the {place}.",
        "sol1": f"Walk to the {place}.",
        "sol2": "Stay in bed all day.",
        "label": number % 2,
    }
    for number, place in enumerate(PLACES)
]
PAGES = [{"page": "The river turns east below the bridge. " * count} for count in (1, 3, 60)]
ASKED = [{"question": f"Q: Where is the {place}?\nA:", "answer": " by the bridge"} for place in PLACES]

OWN: dict[str, dict[str, Any]] = {
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["by the river", "north", "nowhere at all"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "own_pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}

BASES = {
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_lists(record: dict[str, Any]) -> dict[str, Any]:
    """TruthfulQA's row as the hub has it."""
    targets = {name: record[name] for name in ("mc1_targets", "mc2_targets")}
    return {"question": record["question"]} | {
        name: {"choices": list(each), "labels": list(each.values())} for name, each in targets.items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's --data-dir may hold."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "mc_task.json").write_text(json.dumps(TRUTHFULQA))
    write_rows(directory / "hellaswag.jsonl", HELLASWAG)
    write_rows(directory / "winogrande" / "validation.jsonl", WINOGRANDE)
    write_rows(directory / "arc_challenge" / "test.jsonl", ARC)
    write_rows(directory / "arc_easy" / "test.jsonl", ARC[:3])
    write_rows(directory / "arc_easy" / "train.jsonl", ARC[3:])
    (directory / "piqa.json").write_text(json.dumps(PIQA))
    for name, definition in OWN.items():
        rows = write_rows(directory / "rows" / f"{name}.jsonl", PAGES if name == "own_pages" else ASKED)
        own = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(own | {"test_split": "test"} | definition))
    return directory


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_llama(**sizes, max_position_embeddings=POSITIONS, initializer_range=0.3)


@pytest.fixture(scope="module")
def subjects(model: LlamaForCausalLM, tokenizers: dict[str, Any]) -> dict[str, Subject]:
    loaded = {name: LoadedModel("model", model, Path("model"), tokenizer) for name, tokenizer in tokenizers.items()}
    return {name: Subject(LocalScorer(each), each) for name, each in loaded.items()}


@pytest.fixture(scope="module")
def harness_models(model: LlamaForCausalLM, tokenizers: dict[str, Any]) -> dict[str, HFLM]:
    # its cache of logits scores the wrong tokens where one sequence is cut in two places (0.4.13)
    return {
        name: HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, logits_cache=False)
        for name, tokenizer in tokenizers.items()
    }


@pytest.fixture(autouse=True, scope="module")
def without_a_report_of_the_machine() -> Any:
    """The harness asks pip and a dozen programs about the machine at the end of every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def theirs(data: Path, harness_models: dict[str, HFLM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything as the harness has it with its own model, by the name of the task."""
    folder = tmp_path_factory.mktemp("definitions")
    rows = {
        "truthfulqa_mc1": {"validation": write_rows(folder / "mc.jsonl", [as_lists(row) for row in TRUTHFULQA])},
        "hellaswag": {"validation": data / "hellaswag.jsonl"},
        "winogrande": {"validation": data / "winogrande" / "validation.jsonl"},
        "arc_challenge": {"test": data / "arc_challenge" / "test.jsonl"},
        "arc_easy": {split: data / "arc_easy" / f"{split}.jsonl" for split in ("train", "test")},
        "piqa": {"validation": data / "piqa.json"},
    }
    paths = [data / f"{name}.yaml" for name in OWN]
    for name, files in rows.items():
        definition: dict[str, Any] = {
            "include": str(DEFINITIONS / BASES[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        }
        missing = {"train", "validation", "test"} - files.keys()
        options = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
        definition |= {options[split]: None for split in missing}
        if name == "arc_easy":
            definition["num_fewshot"] = 2
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(definition))
    return lm_eval.evaluator.simple_evaluate(
        model=harness_models["none"],
        tasks=[str(path) for path in paths],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        log_samples=True,
    )


@pytest.fixture
def run(subjects: dict[str, Subject], data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a task of ours, and gives its outcome with what the harness logged of each question."""
    logged: list[Any] = []
    inner = lm_eval.evaluator.simple_evaluate
    monkeypatch.setattr(
        lm_eval.evaluator, "simple_evaluate", lambda **options: logged.append(inner(**options)) or logged[-1]
    )

    def run(name: str, *, data_dir: Path = data, tokenizer: str = "none", **options: Any) -> tuple[Outcome, list[Any]]:
        outcome = HarnessTask(name, data_dir, **options).run(subjects[tokenizer])
        return outcome, logged[-1]["samples"][name]

    return run


def likelihoods(samples: list[Any]) -> torch.Tensor:
    """Of every choice of every question."""
    return torch.tensor([float(answer[0][0]) for sample in samples for answer in sample["resps"]])


@pytest.mark.parametrize(
    "name", ["truthfulqa_mc1", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "piqa", "own_choices"]
)
def test_choices_are_scored_as_by_the_harness(run, theirs, name):
    outcome, samples = run(name, num_fewshot=2 if name == "arc_easy" else None)
    expected = theirs["results"][name]
    metrics = [key.removesuffix(",none") for key in expected if key.endswith(",none") and "_stderr" not in key]
    assert "acc" in metrics
    assert [score.metric for score in outcome.scores] == metrics
    for score in outcome.scores:
        assert score.value == expected[f"{score.metric},none"]
        assert score.stderr == pytest.approx(expected[f"{score.metric}_stderr,none"])
        assert (score.task, score.count, score.higher_is_better) == (name, len(theirs["samples"][name]), True)
    found, wanted = likelihoods(samples), likelihoods(theirs["samples"][name])
    assert len(found) > len(samples)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert found.std() > 1
    assert [sample["arguments"] for sample in samples] == [each["arguments"] for each in theirs["samples"][name]]


def test_recovery_has_one_value_for_each_question(run, theirs):
    outcome, _ = run("truthfulqa_mc1")
    expected = [
        sample["acc"] for sample in sorted(theirs["samples"]["truthfulqa_mc1"], key=lambda each: each["doc_id"])
    ]
    items = outcome.items["acc"]
    assert items.values == tuple(map(float, expected))
    assert items.weights == (1.0,) * len(TRUTHFULQA)
    assert sum(items.values) / len(items.values) == outcome.scores[0].value
    assert outcome.seconds > 0


def test_truthfulqa_is_the_same_in_the_shape_of_the_hub(run, theirs, tmp_path):
    for path in (tmp_path / "truthfulqa_mc1.jsonl", tmp_path / "split" / "truthfulqa_mc1" / "validation.jsonl"):
        write_rows(path, [as_lists(row) for row in TRUTHFULQA])
        outcome, samples = run("truthfulqa_mc1", data_dir=tmp_path if path.parent == tmp_path else tmp_path / "split")
        assert outcome.scores[0].value == theirs["results"]["truthfulqa_mc1"]["acc,none"]
        torch.testing.assert_close(
            likelihoods(samples), likelihoods(theirs["samples"]["truthfulqa_mc1"]), rtol=0, atol=1e-3
        )


def test_answers_are_those_of_the_harness(run, theirs):
    outcome, samples = run("own_answers")
    wanted = [sample["filtered_resps"] for sample in theirs["samples"]["own_answers"]]
    assert [sample["filtered_resps"] for sample in samples] == wanted
    assert any(wanted[0])
    (score,) = outcome.scores
    assert (score.metric, score.value) == ("exact_match", theirs["results"]["own_answers"]["exact_match,none"])
    assert outcome.items["exact_match"].values == (0.0,) * len(PLACES)


def test_whole_texts_are_scored_as_by_the_harness(run, theirs):
    """The last of them is longer than the model's context."""
    outcome, _ = run("own_pages")
    for score in outcome.scores:
        assert score.value == pytest.approx(theirs["results"]["own_pages"][f"{score.metric},none"], rel=1e-4)
        assert not score.higher_is_better
    assert [score.metric for score in outcome.scores] == ["word_perplexity", "bits_per_byte"]
    assert outcome.items == {}  # no means over questions


def test_a_limit_asks_the_first_questions(run, theirs):
    outcome, samples = run("hellaswag", limit=2)
    first = [sample for sample in theirs["samples"]["hellaswag"] if sample["doc_id"] < 2]
    torch.testing.assert_close(likelihoods(samples), likelihoods(first), rtol=0, atol=1e-3)
    assert outcome.items["acc_norm"].values == tuple(sample["acc_norm"] for sample in first)
    assert outcome.scores[0].count == 2


def test_a_group_has_the_questions_of_all_its_tasks(subjects, data, tmp_path):
    """The second has half as many as the first, so the mean over questions is not that of the tasks."""
    for name, count in (("own_first", 6), ("own_second", 3)):
        rows = write_rows(tmp_path / "rows" / f"{name}.jsonl", ASKED[:count])
        own = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
        answer = {"doc_to_target": 0 if name == "own_first" else 1}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(own | {"test_split": "test"} | OWN["own_choices"] | answer)
        )
    members = ["own_first", "own_second"]
    aggregate = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "own_both.yaml").write_text(yaml.safe_dump({"group": "own_both", "task": members, **aggregate}))
    (tmp_path / "own_bare.yaml").write_text(yaml.safe_dump({"group": "own_bare", "task": members}))
    parts = [HarnessTask(name, tmp_path).run(subjects["none"]).items["acc"].values for name in members]
    task = HarnessTask("own_both", tmp_path)
    outcome = task.run(subjects["none"])
    assert outcome.items["acc"].values == parts[0] + parts[1]
    assert outcome.scores[0].value == pytest.approx(sum(parts[0] + parts[1]) / 9)
    assert (outcome.scores[0].count, task.info.settings["questions"]) == (9, 9)
    with pytest.raises(SRDError, match=r"^task own_bare: the harness gave no metric$"):
        HarnessTask("own_bare", tmp_path).run(subjects["none"])


def test_progress_counts_requests(subjects, data):
    seen: list[tuple[int, int]] = []
    HarnessTask("own_answers", data, limit=2).run(subjects["none"], progress=lambda *each: seen.append(each))
    assert seen == [(1, 2), (2, 2)]
    seen.clear()
    HarnessTask("piqa", data, limit=2).run(subjects["none"], progress=lambda *each: seen.append(each))
    assert seen[-1] == (4, 4)


# texts that begin with BOS, are empty, or are too long

REQUESTS = [
    ("The river", " runs north"),
    ("The river ", "runs north"),
    ("", "The river runs north"),
    ("", "<|endoftext|>The river"),
    ("<|endoftext|>The river", " runs north"),
    ("The river runs north. " * 120, "It turns east"),
    ("The river runs north. " * 50, " north" * 60),
    ("The river", " runs"),
]


@pytest.mark.parametrize("kind", ["none", "bos"])
def test_bos_and_empty_contexts_are_handled_as_by_the_harness(subjects, harness_models, kind):
    instances = [Instance("loglikelihood", {}, arguments, 0) for arguments in REQUESTS]
    found = HarnessModel(subjects[kind].scorer).loglikelihood(instances, disable_tqdm=True)
    expected = harness_models[kind].loglikelihood(instances, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("kind", ["none", "bos"])
def test_rolling_windows_are_those_of_the_harness(subjects, harness_models, kind):
    texts = ["The river", "The river runs north. " * 150, "<|endoftext|>The river"]
    instances = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found = HarnessModel(subjects[kind].scorer).loglikelihood_rolling(instances)
    assert found == pytest.approx(harness_models[kind].loglikelihood_rolling(instances, disable_tqdm=True), rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "bos"])
@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["."], "max_gen_toks": 6},
        {"until": ".", "max_new_tokens": 3},
        {"max_tokens": 4, "temperature": 0.0},
        {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7},
    ],
    ids=["until", "one text and another name", "no end", "no sampling"],
)
def test_generation_has_the_settings_that_the_harness_reads(subjects, harness_models, kind, settings):
    """The first prompt has to be cut on the left."""
    prompts = ["The river runs north. " * 120, "Q: Where is the mill?\nA:"]
    instances = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
    found = HarnessModel(subjects[kind].scorer).generate_until(instances)
    assert all(found)
    # one at a time: in a batch the harness pads on the left, which in a model as small as this may decide
    expected = [harness_models[kind].generate_until([each], disable_tqdm=True)[0] for each in instances]
    assert found == expected


def test_more_new_tokens_than_the_model_reads_are_refused(subjects):
    instance = Instance("generate_until", {}, ("Q:", {"max_gen_toks": POSITIONS}), 0)
    with pytest.raises(SRDError, match=rf"model: reads {POSITIONS} tokens, but the task asks for {POSITIONS} new ones"):
        HarnessModel(subjects["none"].scorer).generate_until([instance])


def test_a_model_without_a_template_says_so(subjects):
    with pytest.raises(SRDError, match="model: has no chat template, leave the option out"):
        HarnessModel(subjects["none"].scorer).apply_chat_template([{"role": "user", "content": "Hello"}])


# what is asked


def test_the_description_says_what_was_asked(data):
    info = HarnessTask("arc_easy", data, num_fewshot=1).info
    assert info.title == "ARC-Easy"
    assert "3 questions, 1 examples shown" in info.description
    assert "task version 1.0" in info.description
    assert info.source == f"{data}: test.jsonl, train.jsonl"
    assert info.settings == {"num_fewshot": 1, "limit": None, "questions": 3}
    assert HarnessTask("own_choices", data).info.source == "json"


def test_the_digest_is_that_of_the_questions(data, tmp_path):
    digest = HarnessTask("hellaswag", data).info.sha256
    write_rows(tmp_path / "hellaswag.jsonl", HELLASWAG)
    assert HarnessTask("hellaswag", tmp_path).info.sha256 == digest
    assert HarnessTask("hellaswag", data, limit=3).info.sha256 != digest
    write_rows(tmp_path / "hellaswag.jsonl", [*HELLASWAG[:-1], {**HELLASWAG[-1], "ctx_b": "then she"}])
    assert HarnessTask("hellaswag", tmp_path).info.sha256 != digest


def test_names_become_tasks(data):
    found = find_tasks(["piqa", "hellaswag"], TaskOptions(data_dir=data, limit=2, num_fewshot=0))
    assert [task.info.name for task in found] == ["piqa", "hellaswag"]
    assert [task.info.settings["questions"] for task in found] == [2, 2]


# what cannot be read


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks of the harness are two folders of them: to find all takes ten seconds."""
    index = harness._index
    folders = [DEFINITIONS / "truthfulqa", DEFINITIONS / "hellaswag"]
    every = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(harness, "_index", lambda folder, own: every if folder is None else index(folder, own))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hellaswagg", "; did you mean hellaswag?"),
        ("truthful_mc1", "; did you mean truthfulqa_mc1, "),
        ("qqqq", ", see"),
    ],
)
def test_an_unknown_task_is_refused_with_what_may_be_meant(few_tasks, name, hint):
    with pytest.raises(SRDError, match=rf"^task {name}: the lm-evaluation-harness has no task of this name{hint}"):
        _ = HarnessTask(name).info


def damaged(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


WRONG_COLUMNS = [{"question": "Where?", "answer": "north"}]

FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no data and no network": (
        "truthfulqa_mc1",
        lambda path: None,
        r"its data could not be read from the Hugging Face hub \(\w+: .*\); --data-dir may hold truthfulqa_mc1\.jsonl",
    ),
    "mc_task.json is not JSON": (
        "truthfulqa_mc1",
        lambda path: damaged(path / "mc_task.json", "[{"),
        r"^\S+mc_task\.json is not JSON: ",
    ),
    "mc_task.json is an object": (
        "truthfulqa_mc1",
        lambda path: damaged(path / "mc_task.json", '{"a": 1}'),
        r"^\S+mc_task\.json: expected a list of objects with question, mc1_targets and mc2_targets$",
    ),
    "mc_task.json lacks targets": (
        "truthfulqa_mc1",
        lambda path: damaged(path / "mc_task.json", '[{"question": "Where?", "mc1_targets": {"north": 1}}]'),
        r"^\S+mc_task\.json: expected a list of objects with question, mc1_targets and mc2_targets$",
    ),
    "mc_task.json has lists": (
        "truthfulqa_mc1",
        lambda path: damaged(path / "mc_task.json", '[{"question": "Where?", "mc1_targets": ["north"]}]'),
        r"^\S+mc_task\.json: expected a list of objects with question, mc1_targets and mc2_targets$",
    ),
    "files of two kinds": (
        "winogrande",
        lambda path: (
            write_rows(path / "winogrande" / "validation.jsonl", WINOGRANDE),
            damaged(path / "winogrande" / "train.csv", "sentence,option1\n"),
        ),
        r"^\S+train\.csv, \S+validation\.jsonl: files of one task must be of one kind$",
    ),
    "a line that is no JSON": (
        "piqa",
        lambda path: damaged(path / "piqa.jsonl", '{"goal": "Reach the mill."\n'),
        r"its data could not be read from \S+: piqa\.jsonl \(\w+: ",
    ),
    "an empty file": (
        "piqa",
        lambda path: damaged(path / "piqa.jsonl", ""),
        r"its data could not be read from \S+: piqa\.jsonl \(\w+: ",
    ),
    "no parquet": (
        "piqa",
        lambda path: damaged(path / "piqa.parquet", "PAR0"),
        r"its data could not be read from \S+: piqa\.parquet \(\w+: ",
    ),
    "columns of another data set": (
        "hellaswag",
        lambda path: write_rows(path / "hellaswag.jsonl", WRONG_COLUMNS),
        r"its data could not be read from \S+: hellaswag\.jsonl \(KeyError: 'ctx_a'\)$",
    ),
    "columns that are missed when a question is asked": (
        "winogrande",
        lambda path: write_rows(path / "winogrande.jsonl", WRONG_COLUMNS),
        r"its data could not be read from \S+: winogrande\.jsonl \(KeyError: ",
    ),
    "columns that are missed by a template": (
        "arc_easy",
        lambda path: write_rows(path / "arc_easy.jsonl", WRONG_COLUMNS),
        r"its data could not be read from \S+: arc_easy\.jsonl \(UndefinedError: ",
    ),
    "a definition that is not YAML": (
        "own_task",
        lambda path: damaged(path / "own_task.yaml", "task: own_task\n  output_type: [\n"),
        r"task own_task: ",
    ),
    "a definition without data": (
        "own_task",
        lambda path: damaged(path / "own_task.yaml", yaml.safe_dump({"task": "own_task", **OWN["own_choices"]})),
        r"task own_task: its data could not be read from the Hugging Face hub \(",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), FAULTS.values(), ids=list(FAULTS))
def test_data_that_cannot_be_read_is_a_sentence_before_anything_is_scored(
    few_tasks, subjects, tmp_path, monkeypatch, name, damage, message
):
    damage(tmp_path)
    monkeypatch.setattr(LocalScorer, "score", None)
    with pytest.raises(SRDError, match=message) as raised:
        HarnessTask(name, tmp_path).run(subjects["none"])
    assert "\n" not in str(raised.value)


def test_examples_need_a_split_to_come_from(subjects, data):
    with pytest.raises(
        SRDError,
        match=r"^task piqa: shows 2 examples from its train split, for which --data-dir must have piqa/train\.jsonl b",
    ):
        HarnessTask("piqa", data, num_fewshot=2).run(subjects["none"])
