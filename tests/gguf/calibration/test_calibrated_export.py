"""The calibrated export as a whole: the file, what it says of itself, its budget, and what is refused."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import PROMPT, numbered_vocabulary, rewrite, write_model
from torch import Tensor

from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf import plan
from srd_modifier.gguf.calibration.text import Calibration, read_samples
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.importance import read_imatrix
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import ExportSummary
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.selection.budget import Budget, parse_budget

REPOSITORY = Path(__file__).parents[3]
SHARED = REPOSITORY.parent / "shared"
TEXT = REPOSITORY / "examples" / "text" / "demo.txt"
CALIBRATION = Calibration(str(TEXT), num_samples=8, max_seq_length=64, device="cpu")
RANDOM = Calibration(
    "numbers",
    device="cpu",
    samples=torch.randint(160, (12, 48), generator=torch.Generator().manual_seed(1)).tolist(),
)


def budget(text: str) -> Budget:
    return parse_budget("budget", text)


def types_of(path: Path) -> dict[str, str]:
    return {name: tensor.tensor_type.name for name, tensor in GGUFFile(path).tensors.items()}


def original_of(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def divergence(original: Any, path: Path, samples: Any) -> float:
    """Mean KL divergence of a file from a model in nats per token."""
    file = build_model(GGUFFile(path), torch.float32).eval()
    ids = torch.tensor(samples)
    p, q = (model(ids).logits.double().log_softmax(-1) for model in (original, file))
    return float((p.exp() * (p - q)).sum(-1).mean())


def is_empty(directory: Path) -> bool:
    """Whether nothing is left in a directory, hidden files included; or it was never made."""
    return not directory.exists() or not any(directory.iterdir())


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama without its last six layers: trained weights, rows of 256, fewer heads of keys than of queries."""
    directory = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "two-layers"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    late = tuple(f"model.layers.{number}." for number in range(2, config["num_hidden_layers"]))
    return rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(late)})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers with rows of whole K-blocks; its vocabulary is `numbered`."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return write_model("tinyllama", tmp_path_factory.mktemp("models") / "wide", **sizes)


@dataclass
class Exported:
    """A calibrated file, the importance it was made with, and the plain file with the same importance."""

    summary: ExportSummary
    imatrix: Path
    plain: ExportSummary

    @property
    def path(self) -> Path:
        return self.summary.path


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    imatrix = folder / "imatrix.gguf"
    summary = export_gguf(model, folder / "calibrated.gguf", calibration=CALIBRATION, imatrix_output=imatrix)
    return Exported(summary, imatrix, export_gguf(model, folder / "plain.gguf", imatrix=imatrix))


@pytest.fixture(scope="module")
def within(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportSummary]:
    """The file of a budget, or with none of the mixture, made once."""
    made: dict[str, ExportSummary] = {}

    def get(text: str) -> ExportSummary:
        if text not in made:
            folder = tmp_path_factory.mktemp("budget")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plan, "read_vocabulary", lambda directory, config, *, rows: numbered_vocabulary(rows))
                made[text] = export_gguf(wide, folder, calibration=RANDOM, budget=budget(text) if text else None)
        return made[text]

    return get


# the file


def test_llamacpp_generates_what_the_weights_of_the_file_say(exported: Exported) -> None:
    file = build_model(GGUFFile(exported.path), torch.float32).eval()
    with LlamaCpp(exported.path, context=128) as llama:
        prompts = [llama.tokenize(text, add_special=True) for text in ("The river runs", "In spring", "A cell is")]
        for prompt in prompts:
            tokens = llama.complete(prompt, 24)
            with torch.no_grad():
                logits = file(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            assert len(tokens) == 24
            # llama.cpp rounds what a quantized matrix multiplies to 8 bits, which torch does not
            assert (logits.amax(-1) - logits[torch.arange(24), torch.tensor(tokens)]).max() < 0.1


def test_it_is_as_large_as_the_plain_file_of_the_same_types(exported: Exported) -> None:
    assert exported.path.stat().st_size == exported.plain.path.stat().st_size == exported.summary.bytes
    assert types_of(exported.path) == types_of(exported.plain.path)
    assert exported.summary.types == exported.plain.types
    assert exported.summary.bits_per_weight == exported.plain.bits_per_weight


def test_the_importance_that_it_writes_is_the_one_that_it_names(exported: Exported) -> None:
    importance = read_imatrix(exported.imatrix)
    quantized = {name for name, own in types_of(exported.path).items() if own != "F32" and name != "token_embd.weight"}
    assert importance.keys() == quantized
    digest = GGUFFile(exported.path).metadata["srd.importance"]
    assert digest == GGUFFile(exported.plain.path).metadata["srd.importance"]
    assert exported.summary.weighted


def test_it_is_closer_to_the_model_than_the_plain_file(exported: Exported, model: Path) -> None:
    samples, _ = read_samples(CALIBRATION, model)
    original = original_of(model)
    plain = divergence(original, exported.plain.path, samples)
    assert divergence(original, exported.path, samples) < 0.6 * plain


def test_it_says_how_it_was_made(exported: Exported, model: Path) -> None:
    metadata = GGUFFile(exported.path).metadata
    samples, _ = read_samples(CALIBRATION, model)
    assert metadata["srd.method"] == "output-error"
    assert metadata["srd.mixture"] == "Q4_K_M"
    assert metadata["srd.calibration.text"] == "demo.txt"
    assert metadata["srd.calibration.sha256"] == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert metadata["srd.calibration.tokens"] == str(sum(map(len, samples))) == str(8 * 64)
    assert metadata["general.file_type"] == FileType.Q4_K_M.number
    assert metadata["general.name"] == GGUFFile(exported.plain.path).metadata["general.name"]
    assert GGUFFile(exported.plain.path).metadata["srd.method"] == "weight-error"


def test_the_prediction_is_about_what_is_found_on_the_text(exported: Exported, model: Path) -> None:
    samples, _ = read_samples(CALIBRATION, model)
    found = divergence(original_of(model), exported.path, samples)
    assert exported.summary.predicted_kld is not None
    assert 1 / 3 < exported.summary.predicted_kld / found < 3
    assert exported.plain.predicted_kld is None


def test_the_same_export_gives_the_same_bytes(small_model: Callable[[str], Path], numbered: None, tmp_path: Path):
    for name in ("one", "two"):
        export_gguf(small_model("tinyllama"), tmp_path / f"{name}.gguf", calibration=RANDOM)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_each_step_is_reported_to_its_end(small_model: Callable[[str], Path], numbered: None, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def report(what: str, done: int, total: int) -> None:
        seen.setdefault(what, []).append((done, total))

    export_gguf(small_model("tinyllama"), tmp_path / "a.gguf", calibration=RANDOM, budget=budget("6bpw"), report=report)
    assert list(seen) == ["Measuring sensitivity", "Comparing types", "Quantizing"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1] in ((4, 4), (8, 8), (3, 4)), steps


# rows in llama.cpp's order, experts, windows, offsets, biases, caps: what one family has and another has not
@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    "name", ["tinyllama", "llama-biases", "mistral", "qwen2", "qwen3", "qwen3moe", "smollm3", "gemma3", "gemma4-e2b"]
)
def test_every_family_is_calibrated(name: str, small_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory, imatrix = small_model(name), tmp_path / "imatrix.gguf"
    calibrated, plain = tmp_path / "calibrated.gguf", tmp_path / "plain.gguf"
    export_gguf(directory, calibrated, calibration=RANDOM, imatrix_output=imatrix)
    export_gguf(directory, plain, imatrix=imatrix)
    assert calibrated.stat().st_size == plain.stat().st_size
    original = original_of(directory)
    assert divergence(original, calibrated, RANDOM.samples) < 0.7 * divergence(original, plain, RANDOM.samples)
    with LlamaCpp(calibrated) as llama:
        assert len(llama.complete(PROMPT, 4)) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3moe", {"moe_intermediate_size": 256}),
        ("gemma3", {"intermediate_size": 256, "query_pre_attn_scalar": 64}),
    ],
)
def test_rows_of_whole_k_blocks_in_other_families(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    directory = write_model(name, tmp_path / "model", hidden_size=256, head_dim=64, **sizes)
    imatrix = tmp_path / "imatrix.gguf"
    calibrated, plain = tmp_path / "calibrated.gguf", tmp_path / "plain.gguf"
    summary = export_gguf(directory, calibrated, calibration=RANDOM, imatrix_output=imatrix)
    export_gguf(directory, plain, imatrix=imatrix)
    assert summary.fallen_back == {}
    assert calibrated.stat().st_size == plain.stat().st_size
    original = original_of(directory)
    assert divergence(original, calibrated, RANDOM.samples) < 0.6 * divergence(original, plain, RANDOM.samples)
    with LlamaCpp(calibrated) as llama:
        assert len(llama.complete(PROMPT, 4)) == 4


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("size", [None, pytest.param("9.5bpw", marks=pytest.mark.slow)])
def test_experts_that_no_token_reaches_are_quantized_all_the_same(size: str | None, tmp_path: Path) -> None:
    directory = write_model("qwen3moe", tmp_path / "model", num_experts=16, num_hidden_layers=2)
    calibration = replace(RANDOM, samples=[[1, 2, 3, 4, 5, 6]])  # of 16 experts, these tokens take 12 at most
    path = tmp_path / "model.gguf"
    export_gguf(directory, path, calibration=calibration, budget=None if size is None else budget(size))
    stored = load_file(directory / "model.safetensors")
    file = GGUFFile(path)
    for name in ("gate", "up", "down"):
        found = file.tensor(f"blk.1.ffn_{name}_exps.weight")
        for expert, weight in enumerate(found):
            original = stored[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"]
            assert (weight - original).norm() < 0.15 * original.norm(), (name, expert)
    with LlamaCpp(path) as llama:
        assert len(llama.complete(PROMPT, 2)) == 2


# budgets


@pytest.mark.parametrize("text", ["4.7bpw", "5.5bpw", "7bpw"])
def test_bits_per_weight_are_kept_over_all_tensors_and_used(text: str, within: Callable[..., ExportSummary]) -> None:
    summary = within(text)
    tensors = gguf.GGUFReader(summary.path).tensors
    found = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    asked = budget(text).bits_per_weight
    assert asked is not None
    assert 0.97 * asked < found <= asked
    assert summary.bits_per_weight == pytest.approx(found)


@pytest.mark.parametrize(
    "text", ["900kB", pytest.param("0.95MiB", marks=pytest.mark.slow), pytest.param("1200001", marks=pytest.mark.slow)]
)
def test_bytes_are_those_of_the_whole_file(text: str, within: Callable[..., ExportSummary]) -> None:
    asked = budget(text).bytes
    assert asked is not None
    assert 0.97 * asked < within(text).path.stat().st_size <= asked


def test_a_budget_that_is_exactly_one_file_is_met(within: Callable[..., ExportSummary]) -> None:
    """The mixture's own bytes must do, and lose no more: every one of its types is a candidate."""
    mixture = within("")
    summary = within(str(mixture.bytes))
    assert summary.bytes <= mixture.bytes
    assert summary.predicted_kld is not None
    assert mixture.predicted_kld is not None
    assert summary.predicted_kld < mixture.predicted_kld


def test_more_bytes_lose_less(within: Callable[..., ExportSummary]) -> None:
    predicted = [within(text).predicted_kld for text in ("4.7bpw", "5.5bpw", "7bpw")]
    assert None not in predicted
    assert predicted == sorted(predicted, key=lambda value: -(value or 0))
    assert len(set(predicted)) == 3


@pytest.mark.parametrize("text", ["4.7bpw", "5.5bpw", "7bpw"])
def test_a_budget_says_so(text: str, within: Callable[..., ExportSummary]) -> None:
    summary = within(text)
    file = GGUFFile(summary.path)
    assert file.metadata["srd.mixture"] == summary.mixture == text
    assert file.metadata["srd.method"] == "output-error"
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    most = weights.most_common(1)[0][0]
    rules = {"Q4_K": FileType.Q4_K_M, "Q5_K": FileType.Q5_K_M, "Q6_K": FileType.Q6_K, "Q8_0": FileType.Q8_0}
    assert file.metadata["general.file_type"] == rules[most].number
    assert len(weights) > 2, "one type for all matrices would be no mixture"
    assert summary.fallen_back == {}


@pytest.mark.slow
@pytest.mark.usefixtures("numbered")
def test_any_budget_is_enough_for_q8(wide: Path, tmp_path: Path) -> None:
    summary = export_gguf(wide, tmp_path / "a.gguf", calibration=RANDOM, budget=budget("1GB"))
    assert summary.types.keys() == {"Q8_0", "F32"}
    assert GGUFFile(summary.path).metadata["general.file_type"] == FileType.Q8_0.number


@pytest.mark.usefixtures("numbered")
def test_overrides_are_kept_under_a_budget(wide: Path, tmp_path: Path) -> None:
    overrides = [("attn_v", GGMLType.Q8_0), (r"blk\.1\.ffn_up", GGMLType.F16)]
    summary = export_gguf(wide, tmp_path / "a.gguf", calibration=RANDOM, budget=budget("6bpw"), overrides=overrides)
    types = types_of(summary.path)
    assert {types[f"blk.{layer}.attn_v.weight"] for layer in range(2)} == {"Q8_0"}
    assert types["blk.1.ffn_up.weight"] == "F16"
    assert summary.bits_per_weight <= 6
    assert summary.mixture == r"6bpw, attn_v=Q8_0, blk\.1\.ffn_up=F16"


@pytest.mark.usefixtures("numbered")
def test_only_what_was_not_chosen_falls_back(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    # rows of 64 and 96: Q4_K_M itself would fall back everywhere, to types that the budget may choose too
    summary = export_gguf(
        small_model("tinyllama"),
        tmp_path / "a.gguf",
        calibration=RANDOM,
        budget=budget("6bpw"),
        overrides=[("attn_v", GGMLType.Q4_K)],
    )
    assert set(summary.types) & {"Q5_0", "Q8_0"}
    assert summary.fallen_back == {f"blk.{layer}.attn_v.weight": ("Q4_K", "Q5_0") for layer in range(4)}


@pytest.mark.usefixtures("numbered")
def test_the_file_type_is_never_that_of_the_matrices_that_stay_as_they_are(
    small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # no rule that quantizes has one of these as its main type: rows of 48 fall back to F16, routers are float32
    path = tmp_path / "a.gguf"
    all_alike = [(".", GGMLType.Q5_0)]
    export_gguf(small_model("qwen3moe"), path, calibration=RANDOM, budget=budget("9bpw"), overrides=all_alike)
    types = types_of(path)
    matrices = {own for name, own in types.items() if "norm" not in name and "gate_inp" not in name}
    assert (matrices, types["blk.0.ffn_gate_inp.weight"]) == ({"Q5_0", "F16"}, "F32")
    assert GGUFFile(path).metadata["general.file_type"] == FileType.Q4_K_M.number


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("text", ["3bpw", "1kB", pytest.param("0.5MB", marks=pytest.mark.slow)])
def test_a_budget_that_no_types_meet_is_refused_at_once(text: str, wide: Path, tmp_path: Path) -> None:
    def report(what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} before the refusal")

    folder = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"budget of .* is too small for this model, which takes ") as caught:
        export_gguf(wide, folder / "a.gguf", calibration=RANDOM, budget=budget(text), report=report)
    assert is_empty(folder)
    # what it names is enough, and a byte less is not
    least = str(caught.value).split("takes ")[1].split(" with")[0].replace(",", "").replace(" bytes", "")
    enough = budget(least)
    assert export_gguf(
        wide, tmp_path / "b.gguf", calibration=replace(RANDOM, samples=RANDOM.samples[:1]), budget=enough
    )
    if enough.bytes is not None:
        assert (tmp_path / "b.gguf").stat().st_size == enough.bytes
        with pytest.raises(ConfigError, match="too small"):
            export_gguf(wide, tmp_path, calibration=RANDOM, budget=Budget(bytes=enough.bytes - 1))


# what does not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None, "budget": budget("5bpw")}, "give a calibration text too"),
        ({"file_type": FileType.F16}, "F16 is not quantized, so there is nothing to calibrate"),
        ({"file_type": FileType.F32}, "F32 is not quantized"),
        ({"imatrix": Path("imatrix.gguf")}, "calibration measures the importance itself"),
        ({"use_importance": False}, "calibration measures the importance itself"),
        ({"budget": parse_budget("max_divergence", 1e-3)}, "a GGUF file's budget is a size or bits per weight, not"),
        ({"lora_rank": 1000}, "rank must be from 1 to 128"),
        ({"overrides": [("attn_x", GGMLType.Q8_0)]}, "attn_x"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_gguf(model, tmp_path / "a.gguf", **{"calibration": CALIBRATION, **options})
    assert is_empty(tmp_path)


def test_an_adapter_of_a_file_that_loses_nothing_is_refused_before_there_is_one(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="F16 quantizes no matrix"):
        export_gguf(model, tmp_path / "a.gguf", file_type=FileType.F16, lora_rank=4)
    assert is_empty(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SRDError, match="device cuda was asked for"):
        export_gguf(model, tmp_path / "a.gguf", calibration=replace(CALIBRATION, device="cuda"))
    assert is_empty(tmp_path)


# the calibration text


def text_file(content: bytes, name: str = "text.txt") -> Callable[[Path], Calibration]:
    def make(folder: Path) -> Calibration:
        (folder / name).write_bytes(content)
        return replace(CALIBRATION, source=str(folder / name))

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: replace(CALIBRATION, source=str(folder / "none.txt")), "there is no such file"),
        (lambda folder: replace(CALIBRATION, source=str(folder)), "there is no such file"),
        (text_file(b""), "there is no text to calibrate on"),
        (text_file(b"a \xff\xfe"), "is not UTF-8 text"),
        (text_file(b"{", "text.json"), "is not JSON"),
        (text_file(b'[{"question": "?"}]', "text.json"), "record 1 has neither messages, text nor instruction"),
        (lambda folder: replace(CALIBRATION, source="numbers", samples=[]), "numbers: there is no text to calibrate"),
        (lambda folder: replace(CALIBRATION, source="numbers", samples=[[7]]), "numbers: there is no text"),
        (lambda folder: replace(CALIBRATION, source="numbers", samples=[[7, -100]]), "-100 is no token id"),
        (lambda folder: replace(CALIBRATION, source="numbers", samples=[[7, 4096]]), "token id 4096, but the model"),
    ],
)
def test_a_text_that_cannot_be_used(
    make: Callable[[Path], Calibration], message: str, model: Path, tmp_path: Path
) -> None:
    calibration = make(tmp_path)
    with pytest.raises(SRDError, match=message) as caught:
        export_gguf(model, tmp_path / "out" / "a.gguf", calibration=calibration)
    assert "\n" not in str(caught.value)
    assert is_empty(tmp_path / "out")


def test_a_model_without_its_tokenizer_is_named(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SRDError, match=f"cannot load {directory}") as caught:
        read_samples(CALIBRATION, directory)
    assert "\n" not in str(caught.value)


def test_records_and_samples_at_hand_are_read_as_they_are(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("The river runs", "In spring the water")))
    samples, text = read_samples(Calibration(str(path)), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert sorted(samples) == sorted(tokenizer(line)["input_ids"] for line in ("The river runs", "In spring the water"))
    assert (text.name, text.tokens) == ("records.jsonl", sum(map(len, samples)))
    given, described = read_samples(Calibration("mine", samples=[(3, 4), [5, 6, 7], [8]]), model)
    assert given == [[3, 4], [5, 6, 7]]
    assert (described.name, described.tokens) == ("mine", 5)
    other = read_samples(Calibration("mine", samples=[[3, 4], [5, 6, 8]]), model)[1]
    assert described.sha256 != other.sha256


def test_the_model_writes_its_own_text(random_llama: Path, tmp_path: Path) -> None:
    own = Calibration("self", num_samples=2, max_seq_length=16, seed=3, device="cpu")
    samples, text = read_samples(own, random_llama)
    assert [len(sample) for sample in samples] == [16, 16]
    assert read_samples(own, random_llama) == (samples, text)
    assert read_samples(replace(own, seed=4), random_llama)[1].sha256 != text.sha256
    export_gguf(random_llama, tmp_path / "self.gguf", calibration=own)
    export_gguf(random_llama, tmp_path / "given.gguf", calibration=replace(own, samples=samples))
    metadata = GGUFFile(tmp_path / "self.gguf").metadata
    assert metadata["srd.calibration.text"] == "self"
    assert metadata["srd.calibration.sha256"] == text.sha256
    assert metadata["srd.calibration.tokens"] == "32"
    assert (tmp_path / "self.gguf").read_bytes() == (tmp_path / "given.gguf").read_bytes()


def test_a_checkpoint_writes_its_text_corrected(finished_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    from srd_modifier.calibration import from_model
    from srd_modifier.transformers import load_corrected

    own = Calibration("self", num_samples=2, max_seq_length=24, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(finished_checkpoint)

    def written(alpha: float) -> list[list[int]]:
        model = load_corrected(finished_checkpoint, alpha=alpha, dtype=torch.bfloat16)
        return from_model(model.eval(), tokenizer, num_samples=2, max_seq_length=24)

    assert read_samples(own, finished_checkpoint)[0] == written(1.0) != written(0.0)


# where it goes wrong


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_with_its_file(name: str, value: float, tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path / "model")
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / "model.safetensors").items()}
    tensors[name].view(-1)[5] = value
    shards = {"model-1.safetensors": [name], "model-2.safetensors": [key for key in tensors if key != name]}
    (directory / "model.safetensors").unlink()
    for shard, names in shards.items():
        save_file({key: tensors[key] for key in names}, directory / shard, metadata={"format": "pt"})
    weight_map = {key: shard for shard, names in shards.items() for key in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        export_gguf(directory, tmp_path / "out" / "a.gguf", calibration=RANDOM)
    assert str(caught.value).startswith(f"{directory / 'model-1.safetensors'}: {name} ")
    assert is_empty(tmp_path / "out")


class StopError(Exception):
    pass


@contextmanager
def stopping_at(what: str, layer: int, kind: type[BaseException]) -> Iterator[Any]:
    def report(step: str, done: int, total: int) -> None:
        if (step, done) == (what, layer):
            raise kind

    with pytest.raises(kind):
        yield report


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["Measuring sensitivity", "Comparing types", "Quantizing"])
def test_nothing_is_left_of_what_is_interrupted(
    what: str, kind: type[BaseException], small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    spooled = []
    with stopping_at(what, 3, kind) as stop:

        def report(step: str, done: int, total: int) -> None:
            spooled.extend(tmp_path.glob(".srd-gguf-*/*"))
            stop(step, done, total)

        export_gguf(
            small_model("tinyllama"),
            tmp_path / "a.gguf",
            calibration=RANDOM,
            budget=budget("6bpw"),
            imatrix_output=tmp_path / "imatrix.gguf",
            lora_rank=2,
            report=report,
        )
    assert bool(spooled) is (what == "Quantizing")  # or there would have been nothing to leave
    assert is_empty(tmp_path)


@pytest.mark.usefixtures("numbered")
def test_an_existing_file_outlives_an_interrupted_overwrite(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with stopping_at("Quantizing", 2, StopError) as report:
        export_gguf(small_model("tinyllama"), tmp_path / "a.gguf", calibration=RANDOM, overwrite=True, report=report)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.gguf", "mine")]


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("name", ["a.gguf", "a-lora.gguf", "imatrix.gguf"])
def test_existing_files_are_in_the_way_of_every_output(
    name: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def run(**options: Any) -> None:
        export_gguf(
            small_model("tinyllama"),
            tmp_path / "a.gguf",
            calibration=RANDOM,
            lora_rank=2,
            imatrix_output=tmp_path / "imatrix.gguf",
            **options,
        )

    def report(what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} before the refusal")

    (tmp_path / name).write_text("mine")
    with pytest.raises(SRDError, match=f"{name} already exists; choose another name or pass --overwrite"):
        run(report=report)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    run(overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-lora.gguf", "a.gguf", "imatrix.gguf"]
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"GGUF"}


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("option", ["output", "imatrix_output"])
def test_a_file_in_place_of_a_directory_is_found_before_the_work(
    option: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def report(what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} before the refusal")

    (tmp_path / "file").write_text("mine")
    paths = {"output": tmp_path / "a.gguf", option: tmp_path / "file" / "b.gguf"}
    with pytest.raises(SRDError, match=f"cannot write {tmp_path}/file/b.gguf: "):
        export_gguf(small_model("tinyllama"), calibration=RANDOM, report=report, **paths)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("numbered")
def test_directories_are_made_for_every_file(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    paths = (tmp_path / "some" / "a.gguf", tmp_path / "other" / "imatrix.gguf")
    export_gguf(small_model("tinyllama"), paths[0], calibration=RANDOM, imatrix_output=paths[1])
    assert all(path.is_file() for path in paths)


# names


@pytest.mark.usefixtures("numbered")
def test_in_a_directory_the_file_is_named_after_model_and_types(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path / "Some-Model")
    output = tmp_path / "out"
    output.mkdir()
    overrides = [("attn_v", GGMLType.Q8_0)]
    assert export_gguf(directory, output).path == output / "Some-Model-Q4_K_M.gguf"
    assert export_gguf(directory, output, file_type=FileType.Q8_0).path == output / "Some-Model-Q8_0.gguf"
    summary = export_gguf(directory, output, calibration=RANDOM, budget=budget("6 bpw"), overrides=overrides)
    assert summary.path == output / "Some-Model-6bpw.gguf"
    assert summary.path.is_file()
    # a directory that is not there yet is a file's name
    assert export_gguf(directory, tmp_path / "none").path == tmp_path / "none"


@pytest.mark.usefixtures("numbered")
def test_a_snapshot_of_the_hub_is_not_named_by_its_hash(tmp_path: Path) -> None:
    directory = write_model("tinyllama", tmp_path / "models--someone--Some-Model" / "snapshots" / "0a1b2c")
    assert export_gguf(directory, tmp_path).path == tmp_path / "Some-Model-Q4_K_M.gguf"


# SRD checkpoints


def dequantized(path: Path) -> dict[str, Tensor]:
    file = GGUFFile(path)
    return {name: file.tensor(name) for name in file.tensors}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all matrices together."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


@pytest.mark.slow
def test_a_checkpoint_with_its_residual_gives_as_good_a_file_as_the_original(
    finished_checkpoint: Path, random_llama: Path, tmp_path: Path
) -> None:
    """Not the same codes, because each takes up the errors of those before it, but the same loss."""
    sources = {"original": random_llama, "srd": finished_checkpoint}
    for name, source in sources.items():
        export_gguf(source, tmp_path / f"{name}.gguf", calibration=CALIBRATION)
    export_gguf(finished_checkpoint, tmp_path / "w4.gguf", calibration=CALIBRATION, alpha=0.0)
    export_gguf(random_llama, tmp_path / "exact.gguf", file_type=FileType.F32)
    exact, original, srd, w4 = (dequantized(tmp_path / f"{name}.gguf") for name in ("exact", *sources, "w4"))
    assert types_of(tmp_path / "srd.gguf") == types_of(tmp_path / "original.gguf")
    lost = distance(original, exact)
    assert distance(srd, exact) == pytest.approx(lost, rel=0.01)
    assert distance(w4, exact) > 1.2 * lost
    samples, _ = read_samples(CALIBRATION, random_llama)
    model = original_of(random_llama)
    found = {name: divergence(model, tmp_path / f"{name}.gguf", samples) for name in ("original", "srd", "w4")}
    assert found["srd"] == pytest.approx(found["original"], rel=0.15)
    assert found["w4"] > 2 * found["original"]


@pytest.mark.parametrize(("alpha", "text"), [(None, "1"), (0.5, "0.5"), (0.0, "0")])
def test_alpha_is_passed_through(alpha: float | None, text: str, finished_checkpoint: Path, tmp_path: Path) -> None:
    from srd_modifier.transformers import load_corrected

    path = tmp_path / "a.gguf"
    calibration = replace(CALIBRATION, num_samples=2, max_seq_length=32)
    export_gguf(finished_checkpoint, path, calibration=calibration, alpha=alpha, file_type=FileType.Q8_0)
    assert GGUFFile(path).metadata["srd.alpha"] == text
    samples, _ = read_samples(calibration, finished_checkpoint)
    found = {
        at: divergence(load_corrected(finished_checkpoint, alpha=at, dtype=torch.float32), path, samples)
        for at in (0.0, 0.5, 1.0)
    }
    assert min(found, key=lambda at: found[at]) == float(text)


# the adapter


@pytest.mark.slow
@pytest.mark.usefixtures("numbered")
def test_the_adapter_beside_it_loads_and_gives_some_of_the_loss_back(wide: Path, tmp_path: Path) -> None:
    path, adapter = tmp_path / "a.gguf", tmp_path / "a-lora.gguf"
    export_gguf(wide, path, calibration=RANDOM, budget=budget("5bpw"), lora_rank=16)
    export_gguf(wide, tmp_path / "exact.gguf", file_type=FileType.F32)
    kept, exact = dequantized(path), dequantized(tmp_path / "exact.gguf")
    reader = gguf.GGUFReader(adapter)
    factors = {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}
    adapted = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert adapted == {name for name, tensor in kept.items() if tensor.dim() == 2 and name != "token_embd.weight"}
    for name in adapted:
        correction = factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        assert (kept[name] + correction - exact[name]).norm() < 0.98 * (kept[name] - exact[name]).norm(), name
    with LlamaCpp(path, lora=adapter) as llama:
        assert len(llama.complete(PROMPT, 8)) == 8


# quality


@pytest.mark.slow
def test_calibration_and_the_mixture_of_a_budget_pay(tiny_llama: Path, wikitext: str, tmp_path: Path) -> None:
    """On text of another source than the one calibrated on, from the files' own bytes."""
    train = SHARED / "data" / "calib" / "wiki.txt"
    if not train.is_file():
        pytest.skip(f"needs a text to calibrate on at {train}")
    text = tmp_path / "text.txt"
    text.write_text(wikitext[:60_000], encoding="utf-8")
    imatrix = tmp_path / "imatrix.gguf"
    calibration = Calibration(str(train), num_samples=16, device="cpu")
    calibrated = export_gguf(tiny_llama, tmp_path / "calibrated.gguf", calibration=calibration, imatrix_output=imatrix)
    plain = export_gguf(tiny_llama, tmp_path / "plain.gguf", imatrix=imatrix)
    mixed = export_gguf(tiny_llama, tmp_path / "mixed.gguf", calibration=calibration, budget=Budget(bytes=plain.bytes))
    assert mixed.bytes <= calibrated.bytes == plain.bytes

    def score(summary: ExportSummary) -> float:
        report = evaluate_text(str(summary.path), text, reference=str(tiny_llama), ctx=512, max_tokens=8192)
        assert report.divergence is not None
        return report.divergence.kld_mean

    reference = score(plain)
    assert score(calibrated) < 0.48 * reference
    assert score(mixed) < 0.33 * reference
