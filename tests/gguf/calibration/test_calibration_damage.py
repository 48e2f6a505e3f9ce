"""The predicted damage against its definition, and against the divergence that is measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import VOCABULARY
from torch import Tensor

from srd_modifier.gguf import ggml
from srd_modifier.gguf.calibration.damage import Damage
from srd_modifier.gguf.calibration.layers import LayeredModel
from srd_modifier.gguf.calibration.sensitivity import measure_sensitivity
from srd_modifier.gguf.calibration.visit import Moments, visit_unchanged
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.residual.hessian import Hessian

Layered = Callable[[str | Path], LayeredModel]
Whole = Callable[[str | Path], Any]

REPOSITORY = Path(__file__).parents[3]


def measured(model: LayeredModel, samples: list[list[int]]) -> tuple[Damage, dict[tuple[str, int], Hessian]]:
    hessians: dict[tuple[str, int], Hessian] = {}

    def keep(tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> None:
        if moments is not None:
            hessians[tensor.name, number] = Hessian.prepare(moments.second)

    visit_unchanged(model, samples, keep)
    return Damage.of_model(model, measure_sensitivity(model, samples)), hessians


def tensor_of(model: LayeredModel, name: str) -> GGUFTensor:
    return next(own.tensor for occupants in model.places.values() for own in occupants if own.tensor.name == name)


@torch.no_grad()
def divergence(whole: Any, ids: Tensor, expected: Tensor) -> float:
    found = whole(ids, use_cache=False).logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@torch.no_grad()
def predicted_and_measured(
    model: LayeredModel,
    known: tuple[Damage, dict[tuple[str, int], Hessian]],
    whole: Any,
    ids: Tensor,
    piece_name: tuple[str, int],
    change: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """What a change of one matrix is predicted to do to a model, and what it does."""
    (damage, hessians), (name, number) = known, piece_name
    expected = whole(ids, use_cache=False).logits.double().log_softmax(-1)
    tensor = tensor_of(model, name)
    piece = tensor.pieces[number]
    weight = piece.read(model.weights).float()
    new = change(weight)
    hessian = hessians.get((name, number), Hessian.prepare(torch.eye(weight.shape[1])))
    predicted = damage.of(tensor, number, new - weight, hessian)
    ((path, part),) = (
        (place.parameter, own.part)
        for place, occupants in model.places.items()
        for own in occupants
        if (own.tensor.name, own.number) == (name, number)
    )
    parameter = whole.get_parameter(path)
    before = parameter.clone()
    parameter[part] = piece.to_hugging_face(new)
    after = divergence(whole, ids, expected)
    parameter.copy_(before)
    return predicted, after


def texts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


# the definition


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gemma4-moe"])
def test_costs_are_in_the_order_of_the_file(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model = layered(name)
    sensitivity = measure_sensitivity(model, samples)
    costs = Damage.of_model(model, sensitivity).costs
    found = 0
    for place, occupants in model.places.items():
        for tensor, number, part in occupants:
            if place not in sensitivity.outputs:
                assert (tensor.name, number) not in costs
                continue
            own = sensitivity.outputs[place]
            piece = tensor.pieces[number]
            # as the rows of a column of numbers would go into the file
            column = torch.empty(model._model.get_parameter(place.parameter).shape[:-1])
            column[(place.expert,) if place.expert is not None else ...] = own
            expected = column[part]
            assert torch.equal(costs[tensor.name, number], expected if piece.rows is None else expected[piece.rows])
            assert costs[tensor.name, number].shape == tensor.shape[-2:-1]
            found += 1
    assert found == len(costs) > 20


def test_the_damage_of_a_layers_matrix(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")
    damage, hessians = measured(model, samples)
    key = ("blk.1.attn_k.weight", 0)
    tensor = tensor_of(model, key[0])
    error = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    moment = hessians[key].regularized - torch.diag(hessians[key].added)
    expected = sum(
        0.5 * float(cost) * float(row @ moment @ row) for cost, row in zip(damage.costs[key], error, strict=True)
    )
    assert damage.of(tensor, 0, error, hessians[key]) == pytest.approx(expected, rel=1e-4)
    assert damage.of(tensor, 0, 3 * error, hessians[key]) == pytest.approx(9 * expected, rel=1e-4)
    assert damage.of(tensor, 0, torch.zeros_like(error), hessians[key]) == 0


@pytest.mark.parametrize("name", ["llama3", "qwen3"], ids=["a head of its own", "tied"])
def test_the_damage_outside_of_the_layers(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model = layered(name)
    damage, _ = measured(model, samples)
    unused = Hessian.prepare(torch.eye(64))
    error = torch.randn(VOCABULARY, 64, generator=torch.Generator().manual_seed(0))
    found = damage.sensitivity
    looked_up = sum(0.5 * float(found.frequency[i] * (e @ found.embedding @ e)) for i, e in enumerate(error))
    predicted = sum(0.5 * float(found.logits[i] * (e @ found.head_inputs @ e)) for i, e in enumerate(error))
    embedding = damage.of(tensor_of(model, "token_embd.weight"), 0, error, unused)
    if name == "qwen3":
        assert embedding == pytest.approx(looked_up + predicted, rel=1e-4)
        mixture = found.embedding + found.logits.sum() * found.head_inputs
        torch.testing.assert_close(damage.moment_outside(model.head), mixture)
    else:
        assert embedding == pytest.approx(looked_up, rel=1e-4)
        head = damage.of(tensor_of(model, "output.weight"), 0, error, unused)
        assert head == pytest.approx(predicted, rel=1e-4)
        assert torch.equal(damage.moment_outside(model.head), found.head_inputs)
        assert torch.equal(damage.moment_outside(model.embedding), found.embedding)


def test_an_expert_that_no_token_reaches_costs_nothing(layered: Layered) -> None:
    model = layered("qwen3moe")
    damage = Damage.of_model(model, measure_sensitivity(model, [[3, 4]]))
    tensor = tensor_of(model, "blk.0.ffn_up_exps.weight")
    known = [number for number in range(6) if (tensor.name, number) in damage.costs]
    assert 2 <= len(known) <= 4
    identity = Hessian.prepare(torch.eye(64))
    ones = torch.ones(tensor.shape[1:])
    assert [damage.of(tensor, number, ones, identity) > 0 for number in range(6)] == [n in known for n in range(6)]


# against what is measured


@pytest.mark.parametrize(
    ("model", "name", "number"),
    [
        ("llama3", "token_embd.weight", 0),
        ("llama3", "output.weight", 0),
        ("llama3", "blk.1.attn_q.weight", 0),
        ("llama3", "blk.3.ffn_down.weight", 0),
        ("qwen3", "token_embd.weight", 0),
        ("qwen3moe", "blk.2.ffn_gate_exps.weight", 3),
        ("qwen3moe", "blk.3.ffn_down_exps.weight", 1),
        ("gemma3", "token_embd.weight", 0),
        ("gemma3-pattern", "token_embd.weight", 0),
        ("gemma3", "blk.6.ffn_down.weight", 0),
        ("gemma4-moe", "blk.5.ffn_gate_up_exps.weight", 2),
    ],
)
def test_the_damage_of_small_errors_is_the_divergence(
    model: str, name: str, number: int, layered: Layered, whole: Whole
) -> None:
    generator = torch.Generator().manual_seed(1)

    def change(weight: Tensor) -> Tensor:
        return weight + 0.002 * weight.std() * torch.randn(weight.shape, generator=generator)

    own, samples = layered(model), texts(24, 40)
    predicted, after = predicted_and_measured(
        own, measured(own, samples), whole(model), torch.tensor(samples), (name, number), change
    )
    assert after > 1e-9
    assert 0.6 < predicted / after < 1.7


@pytest.mark.slow
def test_the_damage_of_quantizing_a_trained_model(tiny_llama: Path, layered: Layered, whole: Whole) -> None:
    from transformers import AutoTokenizer

    text = (REPOSITORY / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text[:9000])["input_ids"]
    samples = [ids[start : start + 256] for start in range(0, 2048, 256)]
    model, other = layered(tiny_llama), whole(tiny_llama)
    known = measured(model, samples)
    ratios = {}
    for name in ("token_embd", "blk.0.attn_q", "blk.1.ffn_down", "blk.3.attn_output", "blk.4.ffn_up", "blk.7.attn_v"):
        for ggml_type in (GGMLType.Q4_0, GGMLType.Q6_K):

            def change(weight: Tensor, ggml_type: GGMLType = ggml_type) -> Tensor:
                return ggml.dequantize(ggml.quantize(weight, ggml_type), ggml_type)

            piece = (f"{name}.weight", 0)
            predicted, after = predicted_and_measured(model, known, other, torch.tensor(samples), piece, change)
            ratios[name, ggml_type.value] = predicted / after
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
