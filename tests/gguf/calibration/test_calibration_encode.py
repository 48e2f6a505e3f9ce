"""A whole model's bytes: valid, of the types that were asked for, and nearer to the model than ggml's own."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import VOCABULARY, rewrite, write_model
from torch import Tensor

from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.gguf import ggml
from srd_modifier.gguf.blocks import LAYOUTS
from srd_modifier.gguf.calibration import encode
from srd_modifier.gguf.calibration.encode import CalibratedTensors, calibrate
from srd_modifier.gguf.calibration.search import QUICK, quantize_calibrated
from srd_modifier.gguf.families import GGUFTensor, family_of
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.mixture import FileType, tensor_types
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.gguf.writer import Entry, padded_bytes

Whole = Callable[[str | Path], Any]

pytestmark = pytest.mark.usefixtures("quick")

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is tested elsewhere: here its shortest schedule does."""
    monkeypatch.setattr(encode, "quantize_calibrated", partial(quantize_calibrated, schedule=QUICK))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama3", tmp_path_factory.mktemp("one") / "layer", num_hidden_layers=1)


def opened(directory: Path) -> tuple[ModelWeights, list[GGUFTensor]]:
    weights = ModelWeights.open(directory)
    return weights, family_of(weights.config).tensors(weights)


def types_of(
    weights: ModelWeights, tensors: list[GGUFTensor], file_type: FileType = FileType.Q4_0
) -> dict[str, GGMLType]:
    shape = family_of(weights.config).shape(weights.config)
    return tensor_types({tensor.name: tensor.shape for tensor in tensors}, file_type, shape, weighted=True)


def run(directory: Path, samples: list[list[int]], folder: Path, **options: Any) -> tuple[CalibratedTensors, list[Any]]:
    weights, tensors = opened(directory)
    folder.mkdir(exist_ok=True)
    types = options.pop("types", None) or types_of(weights, tensors)
    return calibrate(weights, tensors, types, samples, folder, **options), tensors


def bytes_of(result: CalibratedTensors, tensor: GGUFTensor) -> list[NDArray[np.uint8]]:
    data = result.data(tensor)
    assert data is not None, tensor.name
    return list(data)


def size(tensors: list[GGUFTensor], types: Mapping[str, GGMLType]) -> int:
    return sum(padded_bytes(Entry(tensor.name, tensor.shape, types[tensor.name])) for tensor in tensors)


def texts(count: int, length: int, seed: int = 11) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


@torch.no_grad()
def log_probabilities(model: Any, samples: list[list[int]]) -> Tensor:
    return model(torch.tensor(samples), use_cache=False).logits.double().log_softmax(-1)


def divergence(model: Any, samples: list[list[int]], expected: Tensor) -> float:
    return float((expected.exp() * (expected - log_probabilities(model, samples))).sum(-1).mean())


@torch.no_grad()
def put(
    model: Any, tensors: list[GGUFTensor], data: Callable[[GGUFTensor], Any], types: Mapping[str, GGMLType]
) -> None:
    """Give a dense model what a file stands for."""
    for tensor in tensors:
        for piece, own in zip(tensor.pieces, data(tensor) or (), strict=False):
            parameter = model.get_parameter(piece.source)
            parameter[piece.index] = piece.to_hugging_face(ggml.dequantize(own, types[tensor.name]))


def ggmls_own(
    weights: ModelWeights, types: Mapping[str, GGMLType], importance: Mapping[str, Tensor]
) -> Callable[[GGUFTensor], Any]:
    def data(tensor: GGUFTensor) -> Any:
        if types[tensor.name] not in LAYOUTS:
            return None
        own = importance.get(tensor.name)
        return [ggml.quantize(piece.read(weights).float(), types[tensor.name], own) for piece in tensor.pieces]

    return data


# bytes


@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3moe", "gemma3", "gemma4-moe"])
def test_every_quantized_tensor_has_its_bytes(
    name: str, small_model: Callable[[str], Path], samples: list[list[int]], tmp_path: Path
) -> None:
    weights, tensors = opened(small_model(name))
    types = types_of(weights, tensors)
    result, _ = run(small_model(name), samples, tmp_path / "bytes")
    assert result.types == types
    assert result.tokens == sum(map(len, samples))
    assert 0 < result.predicted < 20
    quantized = [tensor for tensor in tensors if types[tensor.name] in LAYOUTS]
    assert len(quantized) > 15
    for tensor in tensors:
        if tensor not in quantized:
            assert result.data(tensor) is None
            continue
        parts = bytes_of(result, tensor)
        assert len(parts) == len(tensor.pieces)
        for piece, own in zip(tensor.pieces, parts, strict=True):
            weight = piece.read(weights).float()
            assert own.dtype == np.uint8
            assert own.shape == (len(weight), types[tensor.name].row_bytes(weight.shape[1]))
            assert ggml.validate(own, types[tensor.name])
            error = ggml.dequantize(own, types[tensor.name]) - weight
            # rows in their order, experts in theirs: any other order would be off by more than the weight itself
            assert error.norm() < 0.6 * weight.norm()


@pytest.mark.parametrize("ggml_type", list(LAYOUTS))
def test_every_type(ggml_type: GGMLType, tmp_path: Path) -> None:
    directory = write_model("llama3", tmp_path / "m", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    weights, tensors = opened(directory)
    types = {t.name: ggml_type if t.pieces and t.pieces[0].module else GGMLType.F32 for t in tensors}
    result, _ = run(directory, texts(2, 20), tmp_path / "bytes", types=types)
    for tensor in tensors:
        if types[tensor.name] is ggml_type:
            (own,) = bytes_of(result, tensor)
            assert ggml.validate(own, ggml_type)
            weight = tensor.read(weights).float()
            assert (ggml.dequantize(own, ggml_type) - weight).norm() < 0.35 * weight.norm()


def test_the_same_bytes_again(one_layer: Path, samples: list[list[int]], tmp_path: Path) -> None:
    first, tensors = run(one_layer, samples, tmp_path / "first")
    second, _ = run(one_layer, samples, tmp_path / "second")
    assert first.files.keys() == second.files.keys()
    assert first.predicted == second.predicted
    for tensor in tensors:
        if (tensor.name, 0) in first.files:
            assert all(map(np.array_equal, bytes_of(first, tensor), bytes_of(second, tensor)))


def test_types_that_are_not_quantized_are_left_to_others(
    one_layer: Path, samples: list[list[int]], tmp_path: Path
) -> None:
    weights, tensors = opened(one_layer)
    types = types_of(weights, tensors) | {"token_embd.weight": GGMLType.F16, "blk.0.attn_q.weight": GGMLType.BF16}
    result, _ = run(one_layer, samples, tmp_path / "bytes", types=types)
    names = {tensor.name: tensor for tensor in tensors}
    assert result.data(names["token_embd.weight"]) is None
    assert result.data(names["blk.0.attn_q.weight"]) is None
    assert result.data(names["blk.0.attn_k.weight"]) is not None


def test_embeddings_per_layer_are_left_to_others(
    small_model: Callable[[str], Path], samples: list[list[int]], tmp_path: Path
) -> None:
    """What errors of theirs cost is not measured."""
    result, tensors = run(small_model("gemma4-e2b"), samples, tmp_path / "bytes")
    names = {tensor.name: tensor for tensor in tensors}
    assert result.data(names["per_layer_token_embd.weight"]) is None
    assert result.data(names["per_layer_model_proj.weight"]) is None
    assert result.data(names["token_embd.weight"]) is not None
    assert result.data(names["blk.5.attn_q.weight"]) is not None


def test_experts_that_no_token_reaches_have_bytes_all_the_same(
    small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    weights, tensors = opened(small_model("qwen3moe"))
    result, _ = run(small_model("qwen3moe"), [[3, 4]], tmp_path / "bytes")
    unreached = 0
    for tensor in tensors:
        if "_exps" in tensor.name and result.types[tensor.name] in LAYOUTS:
            parts = bytes_of(result, tensor)
            assert len(parts) == 6
            for piece, own in zip(tensor.pieces, parts, strict=True):
                weight = piece.read(weights).float()
                assert (ggml.dequantize(own, result.types[tensor.name]) - weight).norm() < 0.35 * weight.norm()
            unreached += int((result.mean_squares[tensor.name] == 1).all(dim=1).sum())
    assert unreached > 10
    assert 0 < result.predicted < 20


# importance


def test_mean_squares_are_those_of_the_original_inputs(
    small_model: Callable[[str], Path], whole: Whole, samples: list[list[int]], tmp_path: Path
) -> None:
    result, tensors = run(small_model("qwen3moe"), samples, tmp_path / "bytes")
    model = whole("qwen3moe")
    sums: dict[str, Tensor] = {}
    for name in ("model.layers.2.self_attn.o_proj", "lm_head"):

        def keep(module: Any, args: Any, name: str = name) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample]))
    for name, tensor in (("model.layers.2.self_attn.o_proj", "blk.2.attn_output"), ("lm_head", "output")):
        torch.testing.assert_close(
            result.mean_squares[f"{tensor}.weight"], sums[name] / result.tokens, rtol=0.02, atol=1e-4
        )
    for own in tensors:
        multiplied = own.pieces and own.pieces[0].module and own.name != "token_embd.weight"
        assert (own.name in result.mean_squares) == bool(multiplied)
        if multiplied:
            assert result.mean_squares[own.name].shape == own.shape[:-2] + own.shape[-1:]
            assert (result.mean_squares[own.name] > 0).all()


# what it is for


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_nearer_to_the_model_than_ggmls_own(
    name: str, small_model: Callable[[str], Path], whole: Whole, tmp_path: Path
) -> None:
    """On other text of the same kind, with the same types; ggml gets the importance of the same inputs."""
    weights, tensors = opened(small_model(name))
    types = types_of(weights, tensors, FileType.Q8_0) if name == "gemma3" else types_of(weights, tensors)
    result, _ = run(small_model(name), texts(40, 48), tmp_path / "bytes", types=types)
    others = texts(12, 48, seed=12)
    expected = log_probabilities(whole(name), others)
    model = whole(name)
    put(model, tensors, result.data, types)
    ours = divergence(model, others, expected)
    model = whole(name)
    put(model, tensors, ggmls_own(weights, types, result.mean_squares), types)
    assert ours < 0.8 * divergence(model, others, expected)


# budgets


def test_a_budget_is_kept_and_spent(one_layer: Path, samples: list[list[int]], tmp_path: Path) -> None:
    weights, tensors = opened(one_layer)
    plain = types_of(weights, tensors)
    least, most = (size(tensors, types_of(weights, tensors, own)) for own in (FileType.Q4_0, FileType.Q8_0))
    predicted = []
    for share in (0.3, 0.8):
        limit = least + int(share * (most - least))
        result, _ = run(one_layer, samples, tmp_path / f"{share}", max_bytes=limit)
        assert size(tensors, result.types) <= limit
        assert size(tensors, result.types) > limit - (most - least) / 10
        assert len({own for own in result.types.values() if own in LAYOUTS}) > 1
        assert all(result.types[name] is own for name, own in plain.items() if own not in LAYOUTS)
        for tensor in tensors:
            if result.types[tensor.name] in LAYOUTS:
                (own,) = bytes_of(result, tensor)
                assert own.nbytes == Entry(tensor.name, tensor.shape, result.types[tensor.name]).nbytes
        predicted.append(result.predicted)
    assert predicted[1] < 0.5 * predicted[0]


def test_fixed_tensors_keep_their_types(one_layer: Path, samples: list[list[int]], tmp_path: Path) -> None:
    weights, tensors = opened(one_layer)
    types = types_of(weights, tensors) | {"blk.0.ffn_down.weight": GGMLType.Q4_0, "output.weight": GGMLType.Q5_1}
    fixed = ("blk.0.ffn_down.weight", "output.weight")
    most = size(tensors, types_of(weights, tensors, FileType.Q8_0))
    result, _ = run(one_layer, samples, tmp_path / "b", types=types, fixed=fixed, max_bytes=2 * most)
    assert all(result.types[name] is types[name] for name in fixed)
    others = {own for name, own in result.types.items() if own in LAYOUTS and name not in fixed}
    assert others == {GGMLType.Q8_0}  # there is room for the best of all the rest


def test_a_budget_that_is_too_small(one_layer: Path, samples: list[list[int]], tmp_path: Path) -> None:
    weights, tensors = opened(one_layer)
    types = types_of(weights, tensors)
    least = size(tensors, {name: GGMLType.Q4_0 if own in LAYOUTS else own for name, own in types.items()})
    with pytest.raises(ConfigError, match=f"^{least - 1:,} bytes are too few, the smallest types take {least:,}"):
        run(one_layer, samples, tmp_path / "bytes", max_bytes=least - 1)
    result, _ = run(one_layer, samples, tmp_path / "bytes", max_bytes=least)
    assert size(tensors, result.types) == least


# reports and errors


def test_what_is_going_on(one_layer: Path, samples: list[list[int]], tmp_path: Path) -> None:
    weights, tensors = opened(one_layer)
    seen: list[tuple[str, int, int]] = []
    limit = size(tensors, types_of(weights, tensors, FileType.Q8_0))
    run(one_layer, samples, tmp_path / "b", max_bytes=limit, report=lambda *own: seen.append(own))
    assert list(dict.fromkeys(what for what, _, _ in seen)) == [
        "Measuring sensitivity",
        "Comparing types",
        "Quantizing",
    ]
    assert seen[-1] == ("Quantizing", 1, 1)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"],
)
def test_a_weight_with_nan_is_named(name: str, tmp_path: Path) -> None:
    directory = write_model("llama3", tmp_path / "broken")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[40] = torch.nan
        return tensors

    rewrite(directory, spoil)
    with pytest.raises(CheckpointError, match=rf"broken/model\.safetensors: {name}") as caught:
        run(directory, texts(2, 10), tmp_path / "bytes")
    assert "\n" not in str(caught.value)


def test_a_weight_that_halves_cannot_hold_is_named(tmp_path: Path) -> None:
    directory = write_model("llama3", tmp_path / "broken")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][7, 3] = 1e6
        return tensors

    rewrite(directory, spoil)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.embed_tokens\.weight: .*too large for Q4_0"):
        run(directory, [[1, 2, 3]], tmp_path / "bytes")


def test_a_token_that_the_model_does_not_know(one_layer: Path, tmp_path: Path) -> None:
    with pytest.raises(SRDError, match=f"token id {VOCABULARY}, but the model has only"):
        run(one_layer, [[VOCABULARY]], tmp_path / "bytes")


# the model that comes with the repository


@pytest.mark.slow
def test_a_trained_model(tiny_llama: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the divergence of ggml's own bytes with the same types, and near what was predicted."""
    from transformers import AutoTokenizer

    text = (REPOSITORY / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]
    rows = [ids[start : start + 256] for start in range(0, 7680, 256)]
    samples, others = rows[:24], rows[24:]
    weights, tensors = opened(tiny_llama)
    types = types_of(weights, tensors, FileType.Q4_K_M)
    monkeypatch.setattr(encode, "quantize_calibrated", quantize_calibrated)  # all of the search
    result, _ = run(tiny_llama, samples, tmp_path / "bytes", types=types)
    expected, known = (log_probabilities(whole(tiny_llama), own) for own in (others, samples))
    model = whole(tiny_llama)
    put(model, tensors, result.data, types)
    ours, on_known = divergence(model, others, expected), divergence(model, samples, known)
    model = whole(tiny_llama)
    put(model, tensors, ggmls_own(weights, types, result.mean_squares), types)
    assert ours < 0.5 * divergence(model, others, expected)
    assert 0.5 < result.predicted / on_known < 2
