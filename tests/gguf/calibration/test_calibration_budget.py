"""The damage of types, measured, and the best choice within a number of bytes."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import write_model
from torch import Tensor

from srd_modifier.errors import ConfigError
from srd_modifier.gguf.calibration.budget import candidate_types, measure_candidates, spend_on_types
from srd_modifier.gguf.calibration.damage import Damage
from srd_modifier.gguf.calibration.layers import LayeredModel
from srd_modifier.gguf.calibration.search import QUICK, quantize_calibrated
from srd_modifier.gguf.calibration.sensitivity import measure_sensitivity
from srd_modifier.gguf.calibration.visit import Moments, visit_unchanged
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.ggml import GGMLType, bits_per_weight
from srd_modifier.residual.hessian import Hessian

Layered = Callable[[str | Path], LayeredModel]


def damage_of(model: LayeredModel, samples: list[list[int]]) -> Damage:
    return Damage.of_model(model, measure_sensitivity(model, samples))


# candidates


@pytest.mark.parametrize(
    ("columns", "types"),
    [
        (256, [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0]),
        (4096, [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0]),
        (96, [GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]),
        (576, [GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]),
        (72, []),
    ],
)
def test_candidates_fit_the_rows(columns: int, types: list[GGMLType]) -> None:
    found = candidate_types(columns)
    assert set(types) <= set(found)
    assert (not found) == (not types)
    assert all(columns % own.block_weights == 0 for own in found)
    sizes = [own.row_bytes(columns) for own in found]
    assert sizes == sorted(sizes)


# measuring


def test_more_bits_do_less_damage(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")
    names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.2.ffn_down.weight", "output.weight"]
    found = measure_candidates(model, samples, names, damage_of(model, samples))
    assert found.keys() == set(names)
    for own in found.values():
        assert list(own) == list(candidate_types(64))
        values = [damage for ggml_type, damage in own.items() if bits_per_weight(ggml_type) in (4.5, 5.5, 8.5)]
        assert values == sorted(values, reverse=True)
        assert values[-1] > 0
        assert values[0] > 20 * values[-1]


def test_the_damage_is_that_of_the_quantized_weight(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")
    damage = damage_of(model, samples)
    name = "blk.1.attn_k.weight"
    seen: list[tuple[GGUFTensor, Tensor, Moments]] = []

    def keep(tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> None:
        if tensor.name == name:
            assert moments is not None
            seen.append((tensor, weight.clone(), moments))

    visit_unchanged(model, samples, keep)
    ((tensor, weight, moments),) = seen
    hessian = moments.hessian()
    found = measure_candidates(model, samples, [name], damage)[name]
    for ggml_type, value in found.items():
        error = quantize_calibrated(weight, ggml_type, hessian, QUICK).dequantize() - weight
        assert value == pytest.approx(damage.of(tensor, 0, error, hessian), rel=1e-3)


def test_an_embedding_that_is_the_head_counts_once(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("qwen3")
    damage = damage_of(model, samples)
    name = "token_embd.weight"
    found = measure_candidates(model, samples, [name], damage)[name]
    tensor = model.places[model.embedding][0].tensor
    weight = tensor.pieces[0].read(model.weights).float()
    hessian = Hessian.prepare(damage.moment_outside(model.head))
    error = quantize_calibrated(weight, GGMLType.Q8_0, hessian, QUICK).dequantize() - weight
    assert found[GGMLType.Q8_0] == pytest.approx(damage.of(tensor, 0, error, hessian), rel=1e-3)


def test_all_experts_of_a_tensor_together(layered: Layered, samples: list[list[int]], tmp_path: Path) -> None:
    directory = write_model("qwen3moe", tmp_path / "wide", moe_intermediate_size=64)
    model = layered(directory)
    damage = damage_of(model, samples)
    name = "blk.1.ffn_down_exps.weight"
    found = measure_candidates(model, samples, [name], damage)[name]
    parts: dict[int, float] = {}

    def look(tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> None:
        if tensor.name == name and moments is not None:
            hessian = moments.hessian()
            error = quantize_calibrated(weight, GGMLType.Q4_0, hessian, QUICK).dequantize() - weight
            parts[number] = damage.of(tensor, number, error, hessian)

    visit_unchanged(model, samples, look)
    assert len(parts) > 3
    assert found[GGMLType.Q4_0] == pytest.approx(sum(parts.values()), rel=1e-3)


def test_the_order_is_the_same_every_time(layered: Layered, samples: list[list[int]]) -> None:
    """Ties are broken by it."""
    model = layered("llama3")
    names = ["output.weight", "token_embd.weight", "blk.3.attn_v.weight", "blk.0.attn_q.weight"]
    found = measure_candidates(model, samples, names, damage_of(model, samples))
    assert list(found) == ["blk.0.attn_q.weight", "blk.3.attn_v.weight", "token_embd.weight", "output.weight"]


# spending

TYPES = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0]


@st.composite
def choices(draw: st.DrawFn) -> tuple[dict[str, dict[GGMLType, float]], dict[str, dict[GGMLType, int]]]:
    damages: dict[str, dict[GGMLType, float]] = {}
    sizes: dict[str, dict[GGMLType, int]] = {}
    for number in range(draw(st.integers(1, 4))):
        weights = draw(st.integers(1, 50)) * 256
        worst = draw(st.floats(1e-6, 1.0))
        damages[f"t{number}"] = {own: worst / 4**i * draw(st.floats(0.5, 1.5)) for i, own in enumerate(TYPES)}
        sizes[f"t{number}"] = {own: own.row_bytes(weights) for own in TYPES}
    return damages, sizes


@settings(max_examples=40)
@given(given_choices=choices(), share=st.floats(0, 1.1))
def test_the_best_within_the_bytes(
    given_choices: tuple[dict[str, dict[GGMLType, float]], dict[str, dict[GGMLType, int]]], share: float
) -> None:
    damages, sizes = given_choices
    least = sum(min(own.values()) for own in sizes.values())
    most = sum(max(own.values()) for own in sizes.values())
    limit = least + int(share * (most - least))
    chosen, damage = spend_on_types(damages, sizes, limit)
    assert chosen.keys() == damages.keys()
    assert sum(sizes[name][own] for name, own in chosen.items()) <= limit
    assert damage == pytest.approx(sum(damages[name][own] for name, own in chosen.items()))
    best = min(
        sum(damages[name][own] for name, own in zip(damages, combination, strict=True))
        for combination in product(TYPES, repeat=len(damages))
        if sum(sizes[name][own] for name, own in zip(damages, combination, strict=True)) <= limit
    )
    assert damage == pytest.approx(best, rel=1e-4)


def test_more_bytes_never_do_more_damage() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"t{number}" for number in range(30)]
    worst = torch.rand(len(names), generator=generator).tolist()
    damages = {
        name: {own: value / 4**i for i, own in enumerate(TYPES)} for name, value in zip(names, worst, strict=True)
    }
    sizes = {name: {own: own.row_bytes(1024) for own in TYPES} for name in names}
    least = sum(own[GGMLType.Q4_K] for own in sizes.values())
    found = [spend_on_types(damages, sizes, limit)[1] for limit in range(least, 2 * least, least // 20)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(found))
    assert found[-1] < found[0] / 10


def test_bytes_that_others_take() -> None:
    damages = {"a": {own: 1.0 / 4**i for i, own in enumerate(TYPES)}}
    sizes = {"a": {own: own.row_bytes(2560) for own in TYPES}}
    assert spend_on_types(damages, sizes, sizes["a"][GGMLType.Q6_K])[0] == {"a": GGMLType.Q6_K}
    assert spend_on_types(damages, sizes, sizes["a"][GGMLType.Q6_K], 1)[0] == {"a": GGMLType.Q5_K}


def test_too_few_bytes() -> None:
    damages = {"a": dict.fromkeys(TYPES, 1.0), "b": dict.fromkeys(TYPES, 1.0)}
    sizes = {name: {own: own.row_bytes(256 * 100) for own in TYPES} for name in damages}
    with pytest.raises(ConfigError, match="28,799 bytes are too few, the smallest types take 28,800"):
        spend_on_types(damages, sizes, 28_799)
    with pytest.raises(ConfigError, match="28,899 bytes are too few, the smallest types take 28,900"):
        spend_on_types(damages, sizes, 28_899, 100)
    assert set(spend_on_types(damages, sizes, 28_900, 100)[0].values()) == {GGMLType.Q4_K}
