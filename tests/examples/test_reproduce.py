"""`examples/reproduce`: every script end to end on its small model, and what they refuse."""

import importlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.load import load
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.results import ModelResult, Results, read_results
from srd_modifier.evaluation.tasks.base import Subject
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
from srd_modifier.qat.settings import TrainingSettings
from srd_modifier.selection.depth import count_layers, in_range

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "reproduce"

GGUF_ROWS = {
    "Q4_K_M, ggml": "ggml-Q4_K_M.gguf",
    "Q4_K_M, ggml with importance": "ggml-importance-Q4_K_M.gguf",
    "Q4_K_M, calibrated": "calibrated-Q4_K_M.gguf",
}
TRAINED, TRAINED_LEVELS = "QAT, bf16", "QAT, W4A16 as trained"
TRAINED_GGUF_ROWS = {"QAT, Q4_K_M, ggml": "original-Q4_K_M.gguf", "QAT, Q8_0, ggml": "original-Q8_0.gguf"}
COLUMNS = ("perplexity", "KLD", "TruthfulQA MC1", "D8 bytes", "bits/weight", "GGUF bytes", "llama.cpp's own")


@dataclass(frozen=True, eq=False)
class Expected:
    """A script, and what is to be seen of it.

    Attributes:
        name: of the script.
        bits: per weight, of W4A16 alone and with the full residual.
        architecture: of the small model, as that of the real one.
        real: dimensions of the real model.
        rows: of the checkpoint, besides those that all tables have.
        checkpoint: what the labels of its rows begin with.
        trained: whether a training comes first.
        hidden: what divides the width of the hidden state, of 64, 128 and 256.
    """

    name: str
    bits: tuple[float, float]
    architecture: str
    real: dict[str, Any]
    rows: tuple[str, ...] = ()
    checkpoint: str = "W4A16"
    trained: bool = False
    hidden: tuple[int, ...] = (64, 128, 256)

    @property
    def alone(self) -> str:
        return f"{self.checkpoint} alone, alpha 0"

    @property
    def selective(self) -> str:
        return f"{self.checkpoint} + D8, 40-77 % of depth"

    @property
    def full(self) -> str:
        return f"{self.checkpoint} + D8, alpha 1"


_1_7B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
SCRIPTS = (
    Expected(
        "smollm2_135m",
        (4.5, 13.0),
        "LlamaForCausalLM",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        hidden=(64,),
    ),
    Expected(
        "tinyllama_1_1b",
        (4.5, 13.0),
        "LlamaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        rows=("W4A16 + D8, alpha 0.5",),
    ),
    Expected("smollm2_1_7b_w4a16", (4.125, 12.375), "LlamaForCausalLM", {**_1_7B, "tie_word_embeddings": True}),
    Expected(
        "smollm2_1_7b_qat",
        (4.5, 13.0),
        "LlamaForCausalLM",
        {**_1_7B, "tie_word_embeddings": True},
        checkpoint="QAT, W4A16 to nearest",
        trained=True,
    ),
    Expected(
        "gemma4_e2b",
        (4.25, 12.5),
        "Gemma4ForConditionalGeneration",
        {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    expected: Expected
    output: Path
    results: Results

    def row(self, label: str) -> ModelResult:
        return next(model for model in self.results.models if model.label == label)

    def figure(self, label: str, metric: str, task: str = "wikitext2") -> float:
        score = self.row(label).score(task, metric)
        assert score is not None
        return score.value

    @property
    def gguf(self) -> dict[str, Path]:
        """The GGUF files by the labels of their rows."""
        files = {label: self.output / "gguf" / name for label, name in GGUF_ROWS.items()}
        if self.expected.trained:
            files |= {label: self.output / "training" / name for label, name in TRAINED_GGUF_ROWS.items()}
        return files

    @property
    def published(self) -> str:
        return (self.output / "published.md").read_text(encoding="utf-8")

    @property
    def cells(self) -> dict[str, list[str]]:
        """The published table by row; the head has the name ''."""
        lines = [line for line in self.published.splitlines() if line.startswith("|") and "---:" not in line]
        rows = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in rows}

    @property
    def config(self) -> dict[str, Any]:
        """Of the small model's text decoder."""
        values = json.loads((self.output / "original" / "config.json").read_text(encoding="utf-8"))
        return {**values, **values.get("text_config", {})}


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the folder, as Python finds it when a script of the folder is run."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").is_file():
            del sys.modules[name]


Runs = Callable[[Expected], Run]


@pytest.fixture(scope="module")
def runs(script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every script is run once."""
    return cache(lambda expected: smoke(script, expected, tmp_path_factory.mktemp(expected.name)))


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda expected: expected.name)
def run(request: pytest.FixtureRequest, runs: Runs) -> Run:
    """For reading only."""
    return runs(request.param)


@pytest.fixture
def first(runs: Runs) -> Iterator[Run]:
    """A run to go on with; its report is put back afterwards."""
    run = runs(SCRIPTS[0])
    reports = {path: path.read_bytes() for path in run.output.iterdir() if path.suffix in (".json", ".md")}
    yield run
    for path, content in reports.items():
        path.write_bytes(content)


def smoke(script: Callable[[str], ModuleType], expected: Expected, output: Path) -> Run:
    """Run a script."""
    status = script(expected.name).main(["--smoke", "--output", str(output)])
    assert status == 0
    return Run(expected, output, read_results(output / "results.json"))


# what every script makes


def test_every_row_is_there_once(run: Run) -> None:
    expected = run.expected
    wanted = ["bf16 original", *run.gguf, expected.alone, expected.selective, expected.full, *expected.rows]
    wanted += [TRAINED, TRAINED_LEVELS] if expected.trained else []
    assert sorted(model.label for model in run.results.models) == sorted(wanted)
    assert run.results.reference.label == "bf16 original"
    assert [task.name for task in run.results.tasks] == ["wikitext2", "truthfulqa_mc1", "wikitext2_llamacpp"]


def test_every_figure_is_finite(run: Run) -> None:
    for model in run.results.models:
        is_gguf = model.label in run.gguf
        measured = {(score.task, score.metric) for score in model.scores}
        assert {("wikitext2", "ppl"), ("truthfulqa_mc1", "acc")} <= measured
        assert (("wikitext2", "kld_mean") in measured) != model.reference
        assert (("wikitext2_llamacpp", "ppl") in measured) == is_gguf
        for score in model.scores:
            assert math.isfinite(score.value)
            assert score.stderr is None or math.isfinite(score.stderr)
        accuracy = model.score("truthfulqa_mc1", "acc")
        assert accuracy is not None
        assert accuracy.stderr is not None
        assert accuracy.count == 4


def test_more_of_the_residual_diverges_less(run: Run) -> None:
    expected = run.expected
    # the residual leads back to what was quantized, which after a training is not the original
    target = run.figure(TRAINED, "kld_mean") if expected.trained else 0.0
    alone, selective, full = (
        run.figure(label, "kld_mean") for label in (expected.alone, expected.selective, expected.full)
    )
    assert abs(full - target) < 0.01 * (alone - target)
    assert full < selective < alone
    for label in run.expected.rows:
        assert full < run.figure(label, "kld_mean") < alone


def test_calibration_diverges_less_than_ggml_at_the_same_size(run: Run) -> None:
    ours = run.figure("Q4_K_M, calibrated", "kld_mean")
    assert ours < run.figure("Q4_K_M, ggml with importance", "kld_mean")
    assert ours < run.figure("Q4_K_M, ggml", "kld_mean")


def test_d8_bytes_are_those_of_the_sidecar(run: Run) -> None:
    sizes: dict[str, int] = {}
    files = sorted((run.output / "checkpoint" / "srd").glob("residual-*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                tensor = file.get_tensor(name)
                sizes[name] = tensor.numel() * tensor.itemsize
    layers = count_layers(sizes)
    selective = sum(size for name, size in sizes.items() if in_range(name, layers, 0.40, 0.77))
    expected = run.expected
    assert run.row(expected.alone).residual_bytes == 0
    assert run.row(expected.selective).residual_bytes == selective
    assert run.row(expected.full).residual_bytes == sum(sizes.values())
    assert 0 < selective < sum(sizes.values()) < sum(path.stat().st_size for path in files)  # headers
    for label in expected.rows:
        assert run.row(label).residual_bytes == run.row(expected.full).residual_bytes


def test_bits_per_weight_are_those_of_the_recipe(run: Run) -> None:
    alone, full = run.expected.bits
    # the shape of every module is stored beside its codes
    assert run.row(run.expected.alone).bits_per_weight == pytest.approx(alone, abs=0.005)
    assert run.row(run.expected.full).bits_per_weight == pytest.approx(full, abs=0.005)
    selective = run.row(run.expected.selective).bits_per_weight
    assert selective is not None
    assert alone < selective < full
    assert run.row("bf16 original").bits_per_weight == 16


def tensor_types(path: Path) -> dict[str, str]:
    """Of every tensor of a file, read by gguf."""
    import gguf

    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_gguf_bytes_are_those_of_the_files(run: Run) -> None:
    for label, path in run.gguf.items():
        size = path.stat().st_size
        assert run.row(label).bytes_on_disk == size
        assert run.cells[label][5] == f"{size:,d}"
    types = [tensor_types(path) for label, path in run.gguf.items() if "Q4_K_M" in label]
    assert all(each == types[0] for each in types)


def test_llama_cpp_computes_what_transformers_does_from_the_same_file(run: Run) -> None:
    path = run.output / "gguf" / GGUF_ROWS["Q4_K_M, calibrated"]
    task = find_tasks(("wikitext2_llamacpp",), TaskOptions(data_dir=run.output / "data", ctx=64, max_tokens=128))[0]
    model = load(str(path))
    own = task.run(Subject(LocalScorer(model), model)).scores[0]
    score = run.row("Q4_K_M, calibrated").score("wikitext2_llamacpp", "ppl")
    assert score is not None
    assert score.count == own.count == 62
    # llama.cpp rounds activations
    assert score.value == pytest.approx(own.value, rel=0.05)


def test_the_published_table_has_what_was_measured_and_nothing_else(run: Run) -> None:
    cells = run.cells
    assert len(cells) == 1 + len(run.results.models)
    for head, wanted in zip(cells[""], COLUMNS, strict=True):
        assert wanted in head
    assert "pending" not in run.published.lower()
    for model in run.results.models:
        ppl, kld, accuracy, residual, bits, gguf, own = cells[model.label]
        score = model.score("wikitext2", "ppl")
        assert score is not None
        assert ppl == f"{score.value:.3f} ± {score.stderr:.3f}"
        assert (kld == "-") == model.reference
        assert re.fullmatch(r"\d\.\d{4} ± \d\.\d{4}", accuracy)
        assert residual == ("-" if model.residual_bytes is None else f"{model.residual_bytes:,d}")
        assert bits == f"{model.bits_per_weight:.2f}"
        assert (gguf == "-") == (own == "-") == (model.label not in run.gguf)
    assert "dense" in run.published
    assert "2 windows of 64" in cells[""][6]
    assert "SRDModifier" in run.published


def test_the_report_is_there(run: Run) -> None:
    names = {path.name for path in run.output.iterdir()}
    assert {"results.json", "table.md", "depth.png", "quality-wikitext2-kld_mean.png"} <= names
    assert run.results.command[1] == f"examples/reproduce/{run.expected.name}.py"
    for label in GGUF_ROWS:
        assert (
            label.replace("_", r"\_") in (run.output / "table.md").read_text()
            or label in (run.output / "table.md").read_text()
        )


def test_the_small_model_is_true_to_the_real_one(run: Run) -> None:
    config, real = run.config, run.expected.real
    assert config["architectures"] == [run.expected.architecture]
    assert config["tie_word_embeddings"] == real["tie_word_embeddings"]
    assert config["num_attention_heads"] * real["num_key_value_heads"] == (
        config["num_key_value_heads"] * real["num_attention_heads"]
    )
    proportion = real["intermediate_size"] / real["hidden_size"]
    assert config["intermediate_size"] / config["hidden_size"] == pytest.approx(proportion, rel=0.1)
    for size in ("hidden_size", "intermediate_size"):
        for divisor in (64, 128, 256):
            assert (config[size] % divisor == 0) == (real[size] % divisor == 0)
    assert all(config["hidden_size"] % divisor == 0 for divisor in run.expected.hidden)
    # rows that are no whole blocks of the K-quants fall back
    types = tensor_types(run.output / "gguf" / "ggml-Q4_K_M.gguf")
    assert ("Q5_0" in types.values()) == (256 not in run.expected.hidden)


def test_only_gptq_reads_the_calibration_text(run: Run) -> None:
    importance = run.output / "checkpoint" / "srd" / "importance.safetensors"
    assert importance.is_file() == (run.expected.name == "smollm2_1_7b_w4a16")


def test_what_gemma_keeps_in_16_bits(runs: Runs) -> None:
    run = runs(SCRIPTS[-1])
    with safe_open(run.output / "checkpoint" / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith(".weight_packed")]  # noqa: SIM118
    assert packed
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    assert run.config["layer_types"][-1] == "full_attention"
    assert "sliding_attention" in run.config["layer_types"]
    assert run.config["hidden_size_per_layer_input"] == 256


def test_a_mixture_is_one_by_its_config(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    mixture = {"text_config": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8}}
    (tmp_path / "config.json").write_text(json.dumps(mixture))
    assert script("published")._architecture(tmp_path) == "a mixture of 128 experts, 8 for each token"


# the one that trains


@pytest.fixture
def trained(runs: Runs) -> Run:
    """For reading only."""
    return runs(next(each for each in SCRIPTS if each.trained))


def training_options(script: Callable[[str], ModuleType], *arguments: str) -> Any:
    table = script("smollm2_1_7b_qat").TABLE
    return script("pipeline").parser(table, "").parse_args(["--smoke", *arguments])


def test_it_trains_the_published_setting_of_smaller_sizes(trained: Run) -> None:
    record = json.loads((trained.output / "training" / "training.json").read_text(encoding="utf-8"))
    recipe = FOLDER.parents[1] / "recipes" / "qat" / "smollm2_1_7b.yaml"
    sizes = {"num_samples": 16, "max_seq_length": 64, "batch_size": 4, "micro_batch_size": 2}
    assert record["settings"] == TrainingSettings.read(recipe, **sizes).as_dict()
    assert [entry["bits"] for entry in record["history"] if "loss" in entry] == pytest.approx([16, 12.5, 7.5, 4])
    assert f"4 steps on 16 samples of {record['data']} by smollm2_1_7b.yaml" in trained.published.replace("\\", "")


def test_without_options_it_trains_on_wikitext_103(script: Callable[[str], ModuleType]) -> None:
    table = script("smollm2_1_7b_qat").TABLE
    made_of = table.training.made_of(script("pipeline").parser(table, "").parse_args([]))
    assert made_of["data"] == {"name": "Salesforce/wikitext:wikitext-103-raw-v1"}
    assert table.model == "HuggingFaceTB/SmolLM2-1.7B"
    assert (made_of["settings"]["num_samples"], made_of["settings"]["max_seq_length"]) == (4000, 512)


def test_as_trained_it_has_the_levels_of_the_training(trained: Run) -> None:
    folder = trained.output / "training"
    levels, original = BaseCheckpoint(folder / "w4a16"), load_file(trained.output / "original" / "model.safetensors")
    dense = load_file(folder / "bf16" / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in dense if "_proj." in name]
    assert len(modules) == 21
    for module in modules:
        assert torch.equal(levels.dequantize(module).bfloat16(), dense[f"{module}.weight"])
        assert not torch.equal(original[f"{module}.weight"], dense[f"{module}.weight"])
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(original[embeddings], dense[embeddings])
    assert trained.row(TRAINED_LEVELS).bits_per_weight == pytest.approx(4.25, abs=0.005)
    assert trained.row(TRAINED_LEVELS).residual_bytes is None
    assert trained.figure(TRAINED_LEVELS, "kld_mean") == pytest.approx(trained.figure(TRAINED, "kld_mean"), rel=0.01)


def test_an_interrupted_training_goes_on(trained: Run, script: Callable[[str], ModuleType]) -> None:
    folder = trained.output / "training"
    before = {name: load_file(folder / name / "model.safetensors") for name in ("bf16", "w4a16")}
    shutil.rmtree(folder / "w4a16")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    earlier = folder / "checkpoints" / "checkpoint-3" / "model.safetensors"
    written = earlier.stat().st_mtime_ns
    training, options = (
        script("smollm2_1_7b_qat").TABLE.training,
        training_options(script, "--output", str(trained.output)),
    )
    model = str(trained.output / "original")
    training.run(model, options)
    assert earlier.stat().st_mtime_ns == written
    for name, tensors in before.items():
        again = load_file(folder / name / "model.safetensors")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[tensor], tensors[tensor]) for tensor in tensors)
    # what is finished is found
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert training.run(model, options).model == folder / "bf16"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


def test_another_training_is_not_mixed_in(
    trained: Run, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = FOLDER.parents[1] / "recipes" / "qat" / "distilled.yaml"
    arguments = ["--smoke", "--output", str(trained.output), "--training-recipe", str(recipe)]
    assert "holds files of another model" in refusal(script("smollm2_1_7b_qat"), arguments, capsys)


def test_weights_that_were_trained_elsewhere(trained: Run, script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    dense = trained.output / "training" / "bf16"
    training = script("smollm2_1_7b_qat").TABLE.training
    options = training_options(script, "--output", str(tmp_path), "--trained", str(dense))
    assert training.made_of(options) == {"trained": model_digest(dense)}
    given = training.run("original", options)
    assert given.model == dense
    rows = {row.label: Path(row.model) for row in given.rows}
    assert rows.keys() == {TRAINED, *TRAINED_GGUF_ROWS}
    for label in TRAINED_GGUF_ROWS:
        assert tensor_types(rows[label]) == tensor_types(trained.gguf[label])
    assert not (tmp_path / "training").exists()


def test_trained_weights_are_not_trained(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path), "--trained", "a", "--training-data", "b"]
    found = refusal(script("smollm2_1_7b_qat"), arguments, capsys)
    assert found == "--trained names finished weights: leave --training-data and --training-recipe out"


# going on, and other ways to llama.cpp's perplexity


def test_a_second_run_makes_and_measures_nothing_again(first: Run, script: Callable[[str], ModuleType]) -> None:
    made = [*(first.output / "gguf").iterdir(), first.output / "checkpoint" / "config.json"]
    made += list((first.output / "scores").iterdir())
    before = {path: path.stat().st_mtime_ns for path in made}
    published = first.published
    assert script(first.expected.name).main(["--smoke", "--output", str(first.output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert first.published == published


def test_files_of_another_text_are_not_mixed_in(
    first: Run, script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The river runs north through the old town. " * 100)
    arguments = ["--smoke", "--output", str(first.output), "--calibration", str(other)]
    assert refusal(script(first.expected.name), arguments, capsys) == (
        f"{first.output} holds files of another model, recipe, training or calibration text; choose another --output "
        "or remove it"
    )


def write_program(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `llama-perplexity` on PATH that leaves its arguments beside it."""
    folder.mkdir(exist_ok=True)
    program = folder / "llama-perplexity"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        "if '--version' in sys.argv:\n    print('version: 4711 (abc)', file=sys.stderr)\n    sys.exit()\n"
        f"Path({str(folder / 'arguments')!r}).write_text(' '.join(sys.argv[1:]))\n{lines}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_llama_perplexity_is_asked_where_there_is_one(
    first: Run, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "print('perplexity: calculating perplexity over 6 chunks, n_ctx=64, batch_size=512', file=sys.stderr)\n"
        "print('[1]10.1,[2]11.2,')\nprint('Final estimate: PPL = 12.3456 +/- 0.78901')"
    )
    write_program(tmp_path / "bin", said, monkeypatch)
    assert script(first.expected.name).main(["--smoke", "--output", str(first.output)]) == 0
    arguments = (tmp_path / "bin" / "arguments").read_text()
    gguf, text = first.output / "gguf" / GGUF_ROWS["Q4_K_M, calibrated"], first.output / "data" / "wiki.test.raw"
    assert arguments.startswith(f"-m {gguf} -f {text} -c 64 --chunks 6")
    results = read_results(first.output / "results.json")
    for label in GGUF_ROWS:
        assert first.cells[label][6] == "12.346 ± 0.789"
    info = results.task("wikitext2_llamacpp")
    assert info.title == "llama.cpp's own, 6 windows of 64"
    assert "llama-perplexity build 4711" in info.description
    score = results.candidates[0].score("wikitext2_llamacpp", "ppl")
    assert score is not None
    assert score.count == 6 * 31


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("print('loading')\nprint('error: failed to load model')\nsys.exit(1)", "error: failed to load model"),
        ("print('nothing to see')", "nothing to see"),
        ("pass", "nothing"),
    ],
    ids=["fails", "says something else", "says nothing"],
)
def test_a_llama_perplexity_that_fails(
    lines: str,
    words: str,
    first: Run,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_program(tmp_path / "bin", lines.replace("pass", ""), monkeypatch)
    # of this build nothing is known yet
    program = tmp_path / "bin" / "llama-perplexity"
    program.write_text(program.read_text().replace("4711", str(abs(hash(words)) % 10**6)))
    found = refusal(script(first.expected.name), ["--smoke", "--output", str(first.output)], capsys)
    assert found.endswith(f"llama-perplexity gave no final estimate, its last words are: {words}")


# what is refused


def refusal(module: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a script ends with."""
    capsys.readouterr()
    assert module.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_a_data_directory_without_files_and_no_network(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    arguments = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    found = refusal(script("smollm2_135m"), arguments, capsys)
    assert found.endswith("give --data-dir a directory with wiki.test.raw")


FAULTS = {
    "no data directory": (["--data-dir", "nowhere"], "nowhere: --data-dir must be a directory"),
    "too few tokens": (["--llamacpp-tokens", "100"], "--llamacpp-tokens must be at least 128, two windows, got 100"),
    "no tokens": (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
    "no text": (["--calibration", "nowhere.txt"], "nowhere.txt is neither a file, nor self, nor a data set"),
    "too short": (["--max-tokens", "1"], "the text has too few tokens"),
}


@pytest.mark.parametrize(("arguments", "message"), FAULTS.values(), ids=FAULTS)
def test_options_that_cannot_work(
    arguments: list[str],
    message: str,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = refusal(script("smollm2_135m"), ["--smoke", "--output", str(tmp_path / "out"), *arguments], capsys)
    assert message in found
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_model_that_is_not_there(
    first: Run, script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "out/no/such/model", "--data-dir", str(first.output / "data"), "--output", str(tmp_path)]
    assert "out/no/such/model" in refusal(script("tinyllama_1_1b"), arguments, capsys)


# the calibration text


def prepare(script: Callable[[str], ModuleType], source: str, run: Run, output: Path) -> Any:
    return script("calibration_text").prepare(
        source, run.output / "original", output, samples=3, sample_tokens=16, device="cpu"
    )


def test_the_model_writes_its_own_text(first: Run, script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    text = prepare(script, "self", first, tmp_path)
    assert text.name == "self"
    records = [json.loads(line) for line in text.path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 3
    assert all(record["text"] for record in records)
    # a second run reads what the first one wrote
    assert prepare(script, "self", first, tmp_path) == text


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_data_set_of_texts_becomes_one_text(first: Run, script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows", [{"text": f"line {number}, and more of it"} for number in range(1000)])
    text = prepare(script, source, first, tmp_path)
    assert text.path.suffix == ".txt"
    lines = text.path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["line 0, and more of it", "line 1, and more of it"]
    assert 10 < len(lines) < 100


def test_a_data_set_of_conversations_keeps_its_records(
    first: Run, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {number}"}], "id": number} for number in range(9)]
    text = prepare(script, write_rows(tmp_path / "rows", rows), first, tmp_path)
    records = [json.loads(line) for line in text.path.read_text(encoding="utf-8").splitlines()]
    assert records == [{"messages": row["messages"]} for row in rows[:3]]


@pytest.mark.parametrize(
    ("rows", "message"), [([{"picture": "p"}], "its rows have picture, expected text, messages or instruction")]
)
def test_a_data_set_without_text(
    rows: list[dict[str, Any]], message: str, first: Run, script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    with pytest.raises(SRDError, match=message):
        prepare(script, write_rows(tmp_path / "rows", rows), first, tmp_path)
