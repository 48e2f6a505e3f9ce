"""The whole way from a model directory to a file, and what is refused on it."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import rewrite, write_model

from srd_modifier.checkpoint.config import IMPORTANCE
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.ggml import GGMLType, dequantize, quantize
from srd_modifier.gguf.importance import read_imatrix
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import plan_export, write_plan
from srd_modifier.gguf.weights import ModelWeights

SHARED = Path(__file__).parents[3] / "shared"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file, as gguf reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's first RoPE, one head after the other."""
    halves = [head.chunk(2) for head in weight.chunk(heads)]
    return torch.cat([torch.stack((first, second), 1).flatten(0, 1) for first, second in halves])


def expected_weights(directory: Path) -> dict[str, torch.Tensor]:
    """tiny-llama's tensors by GGUF name, mapped by hand."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    expected = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            module = ".".join(parts[3:-1])
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
            ordered = tensor if heads is None else neighbours(tensor, heads)
            expected[f"blk.{parts[2]}.{names[module]}.weight"] = ordered
        else:
            expected[{"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")] = tensor
    return expected


@pytest.mark.parametrize("file_type", [FileType.Q4_K_M, FileType.Q8_0, FileType.BF16, FileType.F16])
def test_every_tensor_is_what_ggml_makes_of_the_weight(file_type: FileType, tiny_llama: Path, tmp_path: Path) -> None:
    export_gguf(tiny_llama, tmp_path / "model.gguf", file_type=file_type)
    fields, tensors = read(tmp_path / "model.gguf")
    expected = expected_weights(tiny_llama)
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        ggml_type = GGMLType(tensors[name].tensor_type.name)
        assert (ggml_type is GGMLType.F32) is (weight.dim() == 1), name
        blocks = quantize(weight.reshape(-1, weight.shape[-1]).float(), ggml_type)
        assert np.asarray(tensors[name].data).tobytes() == blocks.tobytes(), name
        assert tuple(tensors[name].shape)[::-1] == tuple(weight.shape)
    assert fields["general.file_type"] == file_type.number
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 8


def test_a_trained_model_writes_what_torch_writes(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_gguf(tiny_llama, tmp_path / "model.gguf", file_type=FileType.F32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(tiny_llama)("The history of the town begins")["input_ids"]
    with LlamaCpp(tmp_path / "model.gguf", exact=True) as llama:
        assert llama.tokenize("The history of the town begins") == prompt
        generated = llama.complete(prompt, 24)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == generated


# with the layouts that llama.cpp's own converters gave them, and a SentencePiece vocabulary
@pytest.mark.parametrize(
    ("name", "original"), [("stories260K", "stories260Ktok512.gguf"), ("tiny1m", "tiny1m-f32.gguf")]
)
def test_published_files_have_the_same_weights(name: str, original: str, tmp_path: Path) -> None:
    directory = SHARED / "models" / name
    if not directory.is_dir():
        pytest.skip(f"needs the model at {directory}")
    export_gguf(directory / "hf", tmp_path / "model.gguf", file_type=FileType.F32)
    (fields, tensors), (expected_fields, expected) = read(tmp_path / "model.gguf"), read(directory / original)
    # one of them stores its tied head a second time
    assert expected.keys() - tensors.keys() <= {"output.weight"}
    for tensor_name, tensor in tensors.items():
        assert np.array_equal(tensor.data, expected[tensor_name].data), tensor_name
    for key in ("embedding_length", "block_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"):
        assert fields[f"llama.{key}"] == expected_fields[f"llama.{key}"]
    assert fields["tokenizer.ggml.tokens"] == expected_fields["tokenizer.ggml.tokens"]


def test_importance_of_the_checkpoint_is_used(checkpoint: Path, tmp_path: Path) -> None:
    module = "model.layers.3.mlp.down_proj"
    values = torch.rand(128) + 0.1
    values[5] = 0.0  # an input that was never active
    save_file({f"{module}.importance": values}, checkpoint / IMPORTANCE)
    weighted = export_gguf(checkpoint, tmp_path / "weighted.gguf", imatrix_output=tmp_path / "imatrix.gguf")
    plain = export_gguf(checkpoint, tmp_path / "plain.gguf", use_importance=False)
    assert (weighted.weighted, plain.weighted) == (True, False)
    assert weighted.bytes == plain.bytes
    name = "blk.3.ffn_down.weight"
    tensors = {summary.path: read(summary.path)[1] for summary in (weighted, plain)}
    changed = {
        key
        for key, tensor in tensors[weighted.path].items()
        if np.asarray(tensor.data).tobytes() != np.asarray(tensors[plain.path][key].data).tobytes()
    }
    assert changed == {name}
    written = read_imatrix(tmp_path / "imatrix.gguf")[name]
    torch.testing.assert_close(written, torch.where(values > 0, values, values.mean() * 1e-6))
    tensor = tensors[weighted.path][name]
    weight = ModelWeights.open(checkpoint).tensor(f"{module}.weight")
    blocks = quantize(weight, GGMLType(tensor.tensor_type.name), written)
    assert np.asarray(tensor.data).tobytes() == blocks.tobytes()


def test_an_imatrix_gives_the_same_file_as_the_importance_it_was_written_from(checkpoint: Path, tmp_path: Path) -> None:
    modules = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
    save_file({f"{module}.importance": torch.rand(64) + 0.1 for module in modules}, checkpoint / IMPORTANCE)
    export_gguf(checkpoint, tmp_path / "own.gguf", imatrix_output=tmp_path / "imatrix.gguf")
    export_gguf(checkpoint, tmp_path / "given.gguf", imatrix=tmp_path / "imatrix.gguf")
    assert (tmp_path / "own.gguf").read_bytes() == (tmp_path / "given.gguf").read_bytes()


@pytest.mark.usefixtures("numbered")
def test_importance_of_experts_is_their_own(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan = plan_export(small_model("qwen3moe"), file_type=FileType.Q4_0)
    name = "blk.0.ffn_up_exps.weight"
    importance = torch.rand(6, 64) + 0.1
    plan.importance[name] = importance  # type: ignore[index]
    write_plan(plan, tmp_path / "model.gguf")
    tensor = read(tmp_path / "model.gguf")[1][name]
    weights = ModelWeights.open(small_model("qwen3moe"))
    experts = [weights.tensor(f"model.layers.0.mlp.experts.{expert}.up_proj.weight") for expert in range(6)]
    expected = [quantize(weight, GGMLType.Q4_0, own) for weight, own in zip(experts, importance, strict=True)]
    assert np.asarray(tensor.data).tobytes() == b"".join(blocks.tobytes() for blocks in expected)


def test_the_residual_is_in_the_file(finished_checkpoint: Path, random_llama: Path, tmp_path: Path) -> None:
    def error(**options: Any) -> float:
        path = tmp_path / "model.gguf"
        export_gguf(finished_checkpoint, path, file_type=FileType.F32, overwrite=True, **options)
        found = torch.from_numpy(np.array(read(path)[1]["blk.2.ffn_up.weight"].data))
        original = load_file(random_llama / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].float()
        return float((found - original).norm() / original.norm())

    assert error(alpha=0.0) > 0.05
    assert error() < 0.01
    assert error(chunks=["early"]) == error(alpha=0.0)


def test_types_can_be_overridden(tiny_llama: Path, tmp_path: Path) -> None:
    summary = export_gguf(tiny_llama, tmp_path / "model.gguf", overrides=[("ffn_up", GGMLType.Q8_0)])
    fields, tensors = read(summary.path)
    types = {tensors[f"blk.{layer}.ffn_up.weight"].tensor_type.name for layer in range(8)}
    assert types == {"Q8_0"}
    assert fields["srd.mixture"] == "Q4_K_M, ffn_up=Q8_0"


def test_the_summary_counts_what_is_in_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    summary = export_gguf(tiny_llama, tmp_path / "model.gguf")
    _, tensors = read(summary.path)
    weights = sum(tensor.n_elements for tensor in tensors.values())
    quantized = [tensor for tensor in tensors.values() if tensor.tensor_type.name != "F32"]
    assert summary.path == tmp_path / "model.gguf"
    assert summary.bytes == summary.path.stat().st_size
    assert summary.weights == weights == 7_344_384
    assert summary.bits_per_weight == pytest.approx(8 * sum(tensor.n_bytes for tensor in tensors.values()) / weights)
    assert summary.quantized_bits_per_weight == pytest.approx(
        8 * sum(tensor.n_bytes for tensor in quantized) / sum(tensor.n_elements for tensor in quantized)
    )
    assert summary.types == Counter(tensor.tensor_type.name for tensor in tensors.values())
    assert summary.fallen_back == {}
    assert not summary.weighted
    assert summary.notes == ()


@pytest.mark.usefixtures("numbered")
def test_rows_that_are_not_whole_blocks_are_told(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    summary = export_gguf(small_model("smollm2"), tmp_path / "model.gguf")
    # 192 is three blocks of 64 and no block of 256; 72 is no block of any kind
    assert summary.fallen_back["blk.3.ffn_down.weight"] == ("Q6_K", "Q8_0")
    assert summary.fallen_back["blk.0.ffn_down.weight"] == ("Q4_K", "Q5_0")
    assert summary.fallen_back["blk.0.attn_q.weight"] == ("Q4_K", "F16")
    # what is F16 for want of blocks costs 16 bits of the figure for quantized matrices
    assert summary.quantized_bits_per_weight is not None
    assert summary.quantized_bits_per_weight > 10
    assert "output_norm.weight" not in summary.fallen_back


@pytest.mark.usefixtures("numbered")
def test_a_window_that_llama_cpp_leaves_out_is_told(tmp_path: Path) -> None:
    directory = write_model("mistral", tmp_path / "model", sliding_window=64)
    summary = export_gguf(directory, tmp_path / "model.gguf")
    assert summary.notes == (
        "the model attends to the last 64 tokens, llama.cpp computes llama with attention to all; up to 64 tokens "
        "that is the same",
    )


@pytest.mark.usefixtures("numbered")
def test_one_dimensional_tensors_and_routers_stay_float32(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("qwen3moe", "gemma4-moe", "gemma4-e2b"):
        export_gguf(small_model(name), tmp_path / f"{name}.gguf", file_type=FileType.Q8_0)
        for tensor in read(tmp_path / f"{name}.gguf")[1].values():
            if len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name:
                assert tensor.tensor_type.name == "F32", tensor.name


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("name", ["qwen3moe", "gemma3", "gemma4-moe", "gemma4-e2b", "smollm2"])
def test_quantized_files_load(name: str, small_model: Callable[[str], Path], tmp_path: Path) -> None:
    export_gguf(small_model(name), tmp_path / "model.gguf", file_type=FileType.Q4_0)
    with LlamaCpp(tmp_path / "model.gguf", exact=True) as model:
        assert model.complete([1, 2, 3], 4)


def test_the_same_model_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.gguf", "two.gguf")]
    for path in paths:
        export_gguf(tiny_llama, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_encoder_can_be_plugged_in(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_export(tiny_llama, file_type=FileType.Q8_0)

    def zeros(plan: Any, tensor: Any) -> list[Any]:
        columns = tensor.shape[-1]
        return [quantize(torch.zeros(torch.Size(tensor.shape).numel() // columns, columns), plan.types[tensor.name])]

    write_plan(plan, tmp_path / "model.gguf", encode=zeros)
    tensor = read(tmp_path / "model.gguf")[1]["blk.0.ffn_up.weight"]
    assert not dequantize(np.asarray(tensor.data), GGMLType.Q8_0).any()


@pytest.fixture
def damaged(tiny_llama: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], Any]], Path]:
    """A copy of tiny-llama whose tensors were changed."""

    def make(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        directory = Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))

        def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            change(tensors)
            return tensors

        return rewrite(directory, changed)

    return make


def refused(directory: Path, tmp_path: Path, error: type[SRDError] = CheckpointError, **options: Any) -> str:
    """The message with which an export ends, and no file."""
    with pytest.raises(error) as caught:
        export_gguf(directory, tmp_path / "out" / "model.gguf", **options)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("file_type", [FileType.Q4_K_M, FileType.F32])
@pytest.mark.parametrize("name", ["model.layers.7.mlp.down_proj.weight", "model.layers.7.input_layernorm.weight"])
def test_a_weight_that_is_not_finite_is_named(
    name: str, file_type: FileType, value: float, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    directory = damaged(lambda tensors: tensors[name].view(-1)[3].fill_(value))
    message = refused(directory, tmp_path, file_type=file_type)
    assert (
        message == f"{directory / 'model.safetensors'}: {name}: the weight has entries that are not finite in float32"
    )


def test_a_weight_that_is_too_large_for_its_type_is_named(damaged: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.7.mlp.down_proj.weight"
    directory = damaged(lambda tensors: tensors[name].view(-1)[3].fill_(1e6))
    message = refused(directory, tmp_path)
    assert message.startswith(f"{directory / 'model.safetensors'}: {name}: the weight has an entry of magnitude")
    assert message.endswith("too large for Q6_K")


@pytest.mark.usefixtures("numbered")
def test_the_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    directory = write_model("qwen3moe", tmp_path / "model")
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / "model.safetensors").items()}
    tensors[name][0, 0] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    assert f"{name}: the weight has entries that are not finite in float32" in refused(directory, tmp_path)


def test_a_truncated_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is truncated" in refused(directory, tmp_path)


def test_a_missing_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for path in directory.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(directory, tmp_path, SRDError)


def test_an_unsupported_rope_scaling_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(config))
    message = refused(directory, tmp_path, SRDError)
    assert message.startswith(f"{directory / 'config.json'}: rope type 'dynamic' is not one that llama.cpp computes")


def test_an_override_that_matches_nothing_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    message = refused(tiny_llama, tmp_path, ConfigError, overrides=[("experts", GGMLType.Q8_0)])
    assert "'experts' matches no tensor" in message


def test_importance_that_is_not_there_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    message = refused(tiny_llama, tmp_path, SRDError, imatrix_output=tmp_path / "imatrix.gguf")
    assert message == f"there is no importance to write to {tmp_path / 'imatrix.gguf'}: this export uses none"


@pytest.mark.parametrize("option", ["output", "imatrix_output"])
def test_an_existing_file_is_refused_before_a_weight_is_read(
    option: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(weights: ModelWeights, name: str) -> torch.Tensor:
        pytest.fail(f"read {name}")

    monkeypatch.setattr(ModelWeights, "tensor", read)
    (tmp_path / "there.gguf").touch()
    options = {"output": tmp_path / "model.gguf", option: tmp_path / "there.gguf"}
    with pytest.raises(SRDError, match="already exists"):
        export_gguf(tiny_llama, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("numbered")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 300 MB whose largest tensor has 16 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of memory")
    directory = write_model(
        "tinyllama",
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    assert (directory / "model.safetensors").stat().st_size > 300_000_000

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.005)

    plan = plan_export(directory)
    thread = threading.Thread(target=watch)
    before = resident()
    thread.start()
    try:
        write_plan(plan, tmp_path / "model.gguf")
    finally:
        done.set()
        thread.join()
    assert peak[0] - before < 100_000_000
