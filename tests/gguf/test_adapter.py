"""Adapters: the factorization against the exact one, the file against torch and against llama.cpp."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA
from torch import Tensor

from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf.adapter import export_adapter, factorize, write_adapter
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import ExportPlan, plan_export, write_plan
from srd_modifier.gguf.reader import GGUFFile


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the factorization -----------------------------------------------------------------------------------------------


def second_moment(columns: int) -> Tensor:
    inputs = normal(3 * columns, columns, seed=1) @ normal(columns, columns, seed=2)
    return inputs.T @ inputs / len(inputs)


WEIGHINGS: dict[str, Callable[[int], Tensor | None]] = {
    "alike": lambda columns: None,
    "mean-squares": lambda columns: normal(columns, seed=1).exp().square(),
    "second-moment": second_moment,
}


@pytest.mark.parametrize("weighing", WEIGHINGS.values(), ids=list(WEIGHINGS))
@pytest.mark.parametrize(("rows", "columns"), [(96, 160), (160, 96), (1, 40), (40, 1)])
@pytest.mark.parametrize("rank", [1, 12])
def test_no_matrix_of_the_rank_leaves_much_less_of_the_output(rows, columns, rank, weighing):
    """Of all matrices of a rank, the truncated singular value decomposition leaves the least (Eckart and Young)."""
    residual, importance = normal(rows, columns), weighing(columns)
    rank = min(rank, rows, columns)
    moment = torch.eye(columns) if importance is None else importance
    root = torch.linalg.cholesky(moment.diag() if moment.dim() == 1 else moment)
    A, B = factorize(residual, rank, importance)
    assert (A.shape, B.shape) == ((rank, columns), (rows, rank))
    least = torch.linalg.svdvals(residual @ root)[rank:].norm()
    left = ((residual - B @ A) @ root).norm()
    assert left <= 1.005 * least + 1e-4 * (residual @ root).norm()


@pytest.mark.parametrize("weighing", WEIGHINGS.values(), ids=list(WEIGHINGS))
def test_the_full_rank_leaves_nothing(weighing):
    residual = normal(48, 80)
    A, B = factorize(residual, 48, weighing(80))
    torch.testing.assert_close(B @ A, residual, rtol=0, atol=1e-4)


def test_the_factors_are_balanced():
    A, B = factorize(1e-6 * normal(48, 80), 5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    assert B.abs().max() > 1e-5  # with all of it in one factor, float16 would have lost the other


def test_inputs_without_any_importance_count_alike():
    residual = normal(48, 80)
    for found, expected in zip(factorize(residual, 5, torch.zeros(80)), factorize(residual, 5), strict=True):
        assert torch.equal(found, expected)


def test_a_residual_of_zero_is_zero():
    A, B = factorize(torch.zeros(48, 80), 5)
    assert torch.equal(B @ A, torch.zeros(48, 80))


def test_the_factors_are_the_same_every_time_and_leave_torchs_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = factorize(normal(48, 80), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert all(map(torch.equal, first, factorize(normal(48, 80), 5)))


# --- the file --------------------------------------------------------------------------------------------------------


def export(source: Path, path: Path, file_type: FileType = FileType.Q4_0, **types: GGMLType) -> ExportPlan:
    plan = plan_export(source, file_type=file_type, overrides=list(types.items()))
    write_plan(plan, path)
    return plan


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportPlan, Path]:
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    return export(TINY_LLAMA, path), path


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


class Adapted(GGUFFile):
    """A file whose tensors have an adapter added, for torch to compute with."""

    def __init__(self, path: Path, adapter: Path) -> None:
        super().__init__(path)
        _, self.factors = read_adapter(adapter)

    def tensor(self, name: str) -> Tensor:
        weight = super().tensor(name)
        if f"{name}.lora_a" not in self.factors:
            return weight
        return weight + self.factors[f"{name}.lora_b"] @ self.factors[f"{name}.lora_a"]


def divergence(file: GGUFFile, original: Any, ids: Tensor) -> float:
    with torch.no_grad():
        found = build_model(file, torch.float32).eval()(ids).logits.double().log_softmax(-1)
        wanted = original(ids).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def original() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    from transformers import AutoTokenizer

    text = (TINY_LLAMA.parent / "text" / "demo.txt").read_text(encoding="utf-8")
    return torch.tensor(AutoTokenizer.from_pretrained(TINY_LLAMA)(text[:8000])["input_ids"][:1536]).view(3, 512)


def input_moments(model: Any, plan: ExportPlan, ids: Tensor) -> dict[str, Tensor]:
    """Second moments of the inputs, by GGUF name."""
    moments: dict[str, Tensor] = {}
    modules = {tensor.name: tensor.pieces[0].module for tensor in plan.tensors if tensor.pieces}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: moments.update({name: inputs[0].flatten(0, 1).T @ inputs[0].flatten(0, 1)})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return {tensor: moments[module] for tensor, module in modules.items() if module in moments}


@pytest.mark.slow
def test_the_more_an_adapter_knows_the_closer_it_brings_the_file_to_the_original(quantized, original, ids, tmp_path):
    plan, path = quantized
    moments = input_moments(original, plan, ids[:2])

    def with_adapter(rank: int, importance: Mapping[str, Tensor] | None) -> float:
        adapter = tmp_path / "adapter.gguf"
        write_adapter(
            adapter,
            gguf_file=path,
            tensors=plan.tensors,
            weights=plan.weights,
            rank=rank,
            importance=importance,
            overwrite=True,
        )
        return divergence(Adapted(path, adapter), original, ids[2:])

    found = [
        divergence(GGUFFile(path), original, ids[2:]),
        with_adapter(16, None),
        with_adapter(16, {name: moment.diagonal() for name, moment in moments.items()}),
        with_adapter(16, moments),
        with_adapter(64, moments),
    ]
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.85 * found[0]
    assert found[4] < 0.7 * found[0]


def test_what_llamacpp_needs_to_know_is_in_the_file(quantized, tmp_path):
    plan, path = quantized
    adapter = tmp_path / "adapter.gguf"
    export_adapter(plan, path, adapter, rank=4)
    metadata, tensors = read_adapter(adapter)
    assert (metadata["general.type"], metadata["general.architecture"]) == ("adapter", "llama")
    assert (metadata["adapter.type"], metadata["adapter.lora.alpha"]) == ("lora", 4.0)
    quantized_matrices = {name for name in GGUFFile(path).tensors if "norm" not in name and "token_embd" not in name}
    assert {name.rpartition(".")[0] for name in tensors} == quantized_matrices
    assert tensors["blk.3.ffn_down.weight.lora_a"].shape == (4, 768)
    assert tensors["blk.3.ffn_down.weight.lora_b"].shape == (256, 4)


def test_the_same_input_gives_the_same_bytes(quantized, tmp_path):
    plan, path = quantized
    for name in ("first.gguf", "second.gguf"):
        export_adapter(plan, path, tmp_path / name, rank=4)
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def square_model(directory: Path, model_type: str) -> Path:
    """A random model whose matrices but for the embeddings are all 64 wide and high, with tiny-llama's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_llamacpp_with_an_adapter_of_full_rank_generates_what_the_original_generates(model_type, tmp_path):
    """Ties aside: llama.cpp rounds what a quantized matrix multiplies, and an adapter does not bring that back."""
    directory = square_model(tmp_path / "model", model_type)
    whole, coarse, adapter = (tmp_path / f"{name}.gguf" for name in ("whole", "coarse", "adapter"))
    export(directory, whole, FileType.F32)
    export_adapter(export(directory, coarse, token_embd=GGMLType.F32), coarse, adapter, rank=64)
    prompts = torch.randint(0, 4096, (60, 6), generator=torch.Generator().manual_seed(0)).tolist()

    def generated(path: Path, lora: Path | None = None) -> list[int]:
        with LlamaCpp(path, context=64, lora=lora) as llama:
            return [token for prompt in prompts for token in llama.complete(prompt, 1)]

    wanted = generated(whole)

    def agreement(found: list[int]) -> float:
        return sum(map(int.__eq__, found, wanted)) / len(wanted)

    assert agreement(generated(coarse)) < 0.7
    assert agreement(generated(coarse, adapter)) > 0.85


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [-1, 0, 129])
def test_a_rank_that_a_matrix_cannot_have_is_refused(quantized, tmp_path, rank):
    plan, path = quantized
    with pytest.raises(
        ConfigError, match=rf"rank must be from 1 to 128, the rank of blk\.0\.attn_k\.weight, got {rank}$"
    ):
        export_adapter(plan, path, tmp_path / "adapter.gguf", rank=rank)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_model_of_another_shape_is_refused(quantized, tmp_path):
    plan, _ = quantized
    path = tmp_path / "other.gguf"
    export(square_model(tmp_path / "model", "llama"), path)
    difference = r"blk\.0\.attn_k\.weight is \[64, 64\], the model's is \[128, 256\]$"
    with pytest.raises(CheckpointError, match=r"other\.gguf is not an export of this model: " + difference):
        export_adapter(plan, path, tmp_path / "adapter.gguf", rank=4)


def test_a_file_of_a_model_of_the_same_shape_is_refused(random_llama, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = Path(shutil.copytree(random_llama, tmp_path / "model"))
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(random_llama)).save_pretrained(other)
    path = tmp_path / "other.gguf"
    export(other, path)
    message = (
        r"other\.gguf is not an export of this model: blk\.0\.attn_q\.weight differs by more than the model's whole"
    )
    with pytest.raises(CheckpointError, match=message):
        export_adapter(plan_export(random_llama, file_type=FileType.Q4_0), path, tmp_path / "adapter.gguf", rank=4)
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_file_that_lost_nothing_is_refused(tmp_path):
    path = tmp_path / "whole.gguf"
    plan = export(TINY_LLAMA, path, FileType.BF16)
    with pytest.raises(
        CheckpointError, match=r"whole\.gguf has no quantized matrix, so there is no residual to put into"
    ):
        export_adapter(plan, path, tmp_path / "adapter.gguf", rank=4)


def test_a_damaged_file_is_refused(quantized, tmp_path):
    plan, path = quantized
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"damaged\.gguf is not a whole GGUF file"):
        export_adapter(plan, damaged, tmp_path / "adapter.gguf", rank=4)


def test_an_adapter_is_replaced_only_if_asked(quantized, tmp_path):
    plan, path = quantized
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(b"mine")
    with pytest.raises(SRDError, match=r"adapter\.gguf already exists; choose another name or pass --overwrite$"):
        export_adapter(plan, path, adapter, rank=4)
    assert adapter.read_bytes() == b"mine"
    export_adapter(plan, path, adapter, rank=4, overwrite=True)
    assert read_adapter(adapter)[0]["adapter.type"] == "lora"
