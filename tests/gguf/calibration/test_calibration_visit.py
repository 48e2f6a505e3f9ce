"""What every matrix is given, against hooks on the whole model: as it is, and with weights that replaced its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import VOCABULARY, rewrite, write_model
from torch import Tensor, nn
from torch.nn import functional

from srd_modifier.errors import SRDError
from srd_modifier.gguf.calibration import layers, visit
from srd_modifier.gguf.calibration.layers import LayeredModel, Place
from srd_modifier.gguf.calibration.visit import Moments, visit_in_order, visit_unchanged
from srd_modifier.gguf.families import GGUFTensor

Layered = Callable[[str | Path], LayeredModel]
Whole = Callable[[str | Path], Any]

EVERY_KIND = ["llama3", "llama-biases", "mistral", "qwen3", "qwen3moe", "gemma3", "gemma4", "gemma4-moe", "gemma4-e2b"]


@dataclass
class Visit:
    """One call of a visitor."""

    tensor: GGUFTensor
    number: int
    weight: Tensor
    moments: Moments | None


@dataclass
class Visitor:
    """Keeps what it is shown, and gives what `change` makes of it."""

    change: Callable[[GGUFTensor, Tensor], Tensor | None] = lambda tensor, weight: None
    visits: list[Visit] = field(default_factory=list)

    def __call__(self, tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> Tensor | None:
        self.visits.append(Visit(tensor, number, weight.clone(), moments))
        return self.change(tensor, weight)

    @property
    def names(self) -> list[str]:
        return [visit.tensor.name for visit in self.visits]

    def of(self, name: str) -> list[Visit]:
        return [visit for visit in self.visits if visit.tensor.name == name]

    def by_piece(self) -> dict[tuple[str, int], Visit]:
        return {(visit.tensor.name, visit.number): visit for visit in self.visits}


@torch.no_grad()
def inputs_of(whole: Any, samples: list[list[int]]) -> dict[Place, Tensor]:
    """The inputs `[tokens, in]` of every matrix of the whole model, those of each expert by themselves."""
    found: dict[Place, list[Tensor]] = {}

    def keep(place: Place, rows: Tensor) -> None:
        found.setdefault(place, []).append(rows.reshape(-1, rows.shape[-1]).clone())

    def of_experts(name: str, experts: Any, hidden: Tensor, chosen: Tensor) -> None:
        for expert in range(experts.num_experts):
            rows = hidden[(chosen == expert).any(dim=-1)]
            if len(rows):
                keep(Place(f"{name}.gate_up_proj", expert), rows)
                gate, up = functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
                keep(Place(f"{name}.down_proj", expert), experts.act_fn(gate) * up)

    handles = []
    for name, module in whole.named_modules():

        def hook(own: nn.Module, args: Any, name: str = name) -> None:
            if name.endswith("experts"):
                of_experts(name, own, args[0], args[1])
            else:
                keep(Place(f"{name}.weight"), args[0])

        if isinstance(module, nn.Linear) or name.endswith(("experts", "mlp.gate")):
            handles.append(module.register_forward_pre_hook(hook))
    for length in dict.fromkeys(map(len, samples)):
        whole(torch.tensor([sample for sample in samples if len(sample) == length]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {place: torch.cat(rows) for place, rows in found.items()}


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def inside(model: LayeredModel) -> list[tuple[Place, str, int]]:
    """The matrices of the layers, and a head of its own: their places, tensors and numbers of the piece."""
    return [
        (place, occupant.tensor.name, occupant.number)
        for place, occupants in model.places.items()
        for occupant in occupants
        if ".layers." in place.parameter or (place == model.head != model.embedding)
    ]


def coarse(tensor: GGUFTensor, weight: Tensor) -> Tensor:
    """A replacement that is the same in every order of rows, and far from the weight."""
    return (weight * 6).round() / 6


@torch.no_grad()
def coarsen(model: LayeredModel, whole: Any) -> None:
    """The same of the whole model, whose norms and biases stay."""
    parameters = dict(whole.named_parameters())
    for place in model.places:
        own = parameters[place.parameter]
        own.copy_((own * 6).round() / 6)


# order


def test_the_order_is_that_of_use(layered: Layered, samples: list[list[int]]) -> None:
    visitor = Visitor()
    visit_in_order(layered("llama3"), samples, visitor)
    kinds = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    own = [f"blk.{layer}.{kind}.weight" for layer in range(4) for kind in kinds]
    assert visitor.names == ["token_embd.weight", *own, "output.weight"]


def test_experts_come_after_their_router(layered: Layered, samples: list[list[int]]) -> None:
    visitor = Visitor()
    visit_in_order(layered("qwen3moe"), samples, visitor)
    layer = [(visit.tensor.name, visit.number) for visit in visitor.visits if visit.tensor.name.startswith("blk.1.ffn")]
    assert layer[0] == ("blk.1.ffn_gate_inp.weight", 0)
    first = layer[1:13]
    assert sorted(first) == [
        (f"blk.1.ffn_{kind}_exps.weight", expert) for kind in ("gate", "up") for expert in range(6)
    ]
    assert layer[13:] == [("blk.1.ffn_down_exps.weight", expert) for expert in range(6)]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_matrix_is_visited_once(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model, visitor = layered(name), Visitor()
    visit_in_order(model, samples, visitor)
    expected = [(own.tensor.name, own.number) for occupants in model.places.values() for own in occupants]
    assert sorted((visit.tensor.name, visit.number) for visit in visitor.visits) == sorted(expected)
    # what is looked up comes first, and has no inputs
    outside = [visit for visit in visitor.visits if not visit.tensor.name.startswith(("blk.", "output."))]
    assert visitor.visits[: len(outside)] == outside
    assert all(visit.moments is None for visit in outside)


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gemma4-e2b"])
@pytest.mark.parametrize("go", [visit_in_order, visit_unchanged])
def test_weights_are_in_the_order_of_the_file(name: str, go: Any, layered: Layered, samples: list[list[int]]) -> None:
    model, visitor = layered(name), Visitor()
    go(model, samples, visitor)
    for own in visitor.visits:
        assert torch.equal(own.weight, own.tensor.pieces[own.number].read(model.weights))


def test_progress(layered: Layered, samples: list[list[int]]) -> None:
    seen: list[tuple[int, int]] = []
    visit_in_order(layered("llama3"), samples, Visitor(), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 4) for done in range(5)]


# inputs


@pytest.mark.parametrize("name", EVERY_KIND)
def test_without_replacements_the_inputs_are_the_models(
    name: str, layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    model, visitor = layered(name), Visitor()
    visit_in_order(model, samples, visitor)
    expected, found = inputs_of(whole(name), samples), visitor.by_piece()
    for place, tensor, number in inside(model):
        moments = found[tensor, number].moments
        if place not in expected:
            assert moments is None
            continue
        rows = expected[place]
        assert moments is not None
        assert moments.tokens == len(rows)
        assert_near(moments.second, rows.T @ rows / len(rows))
        assert_near(moments.original_squares, rows.square().mean(dim=0), 0.01)
        if place.expert is None:
            assert moments.cross is not None
            assert_near(moments.cross, rows.T @ rows / len(rows), 0.01)  # of bfloat16
        else:
            assert moments.cross is None


@pytest.mark.parametrize("name", EVERY_KIND)
def test_inputs_come_from_what_replaced_the_weights_before(
    name: str, layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    """Every input is that of a whole model all of whose weights are replaced, beside that of the original one."""
    model, visitor = layered(name), Visitor(coarse)
    visit_in_order(model, samples, visitor)
    other = whole(name)
    originals = inputs_of(other, samples)
    coarsen(model, other)
    replaced, found = inputs_of(other, samples), visitor.by_piece()
    compared = 0
    for place, tensor, number in inside(model):
        moments = found[tensor, number].moments
        assert (moments is None) == (place not in replaced)
        if moments is None:
            continue
        rows = replaced[place]
        assert moments.tokens == len(rows)
        assert_near(moments.second, rows.T @ rows / len(rows))
        if place.expert is None:
            original = originals[place]
            assert moments.cross is not None
            assert_near(moments.cross, original.T @ rows / len(rows), 0.01)
            assert_near(moments.original_squares, original.square().mean(dim=0), 0.01)
            compared += not torch.allclose(moments.cross, moments.second, rtol=0.1)
    assert compared >= model.layers  # or the replacement would be too near to show anything


def test_in_small_batches_the_means_are_the_same(
    layered: Layered, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, in_parts = Visitor(coarse), Visitor(coarse)
    visit_in_order(layered("qwen3moe"), samples, at_once)
    monkeypatch.setattr(layers, "_BATCH_TOKENS", 1)
    visit_in_order(layered("qwen3moe"), samples, in_parts)
    assert in_parts.by_piece().keys() == at_once.by_piece().keys()
    for key, own in at_once.by_piece().items():
        moments = in_parts.by_piece()[key].moments
        assert (own.moments is None) == (moments is None)
        if own.moments is not None and moments is not None:
            assert moments.tokens == own.moments.tokens
            assert_near(moments.second, own.moments.second)


def test_matrices_with_the_same_input_share_its_moments(layered: Layered, samples: list[list[int]]) -> None:
    visitor = Visitor()
    visit_in_order(layered("llama3"), samples, visitor)
    moments = {name: visitor.of(f"blk.2.{name}.weight")[0].moments for name in ("attn_q", "attn_k", "attn_v")}
    assert moments["attn_q"] is moments["attn_k"] is moments["attn_v"]
    gate, up, output = (visitor.of(f"blk.2.{name}.weight")[0].moments for name in ("ffn_gate", "ffn_up", "attn_output"))
    assert gate is up
    assert gate is not moments["attn_q"]
    assert gate is not output


def test_experts_that_no_token_reaches_have_no_inputs(layered: Layered, whole: Whole) -> None:
    model, visitor = layered("qwen3moe"), Visitor()
    visit_in_order(model, [[3, 4]], visitor)
    reached = inputs_of(whole("qwen3moe"), [[3, 4]])
    for layer in range(4):
        for kind, part in (("gate", "gate_up"), ("down", "down")):
            without = [own.number for own in visitor.of(f"blk.{layer}.ffn_{kind}_exps.weight") if own.moments is None]
            name = f"model.layers.{layer}.mlp.experts.{part}_proj"
            assert without == [expert for expert in range(6) if Place(name, expert) not in reached]
            assert 2 <= len(without) <= 4


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gemma4-e2b"])
def test_looking_without_replacing(name: str, layered: Layered, samples: list[list[int]]) -> None:
    looked, visited = Visitor(coarse), Visitor()
    visit_unchanged(layered(name), samples, looked)
    visit_in_order(layered(name), samples, visited)
    expected = visited.by_piece()
    assert {key for key in expected if key[0].startswith("blk.")} == looked.by_piece().keys()
    for key, own in looked.by_piece().items():
        moments = expected[key].moments
        assert (own.moments is None) == (moments is None)
        if own.moments is not None and moments is not None:
            assert own.moments.cross is None
            assert own.moments.tokens == moments.tokens
            assert_near(own.moments.second, moments.second)
            assert torch.equal(own.moments.original_squares, own.moments.second.diagonal())


# replacing


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gemma4-moe", "gemma4-e2b"])
def test_replacing_every_weight_with_itself_changes_nothing(
    name: str, layered: Layered, samples: list[list[int]]
) -> None:
    left, replaced = Visitor(), Visitor(lambda tensor, weight: weight.clone())
    visit_in_order(layered(name), samples, left)
    visit_in_order(layered(name), samples, replaced)
    for own, other in zip(replaced.visits, left.visits, strict=True):
        assert own.tensor.name == other.tensor.name
        assert (own.moments is None) == (other.moments is None)
        if own.moments is not None and other.moments is not None:
            assert torch.equal(own.moments.second, other.moments.second)


def test_replaced_rows_go_back_to_where_they_came_from(
    layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    """The file has the rows of queries and keys in another order than the model."""

    def fade(tensor: GGUFTensor, weight: Tensor) -> Tensor | None:
        if not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            return None
        rows = tensor.pieces[0].rows
        assert rows is not None
        assert rows.tolist() != list(range(len(rows)))
        return weight * (rows % 5).unsqueeze(1)

    visitor = Visitor(fade)
    visit_in_order(layered("llama3"), samples, visitor)
    other = whole("llama3")
    with torch.no_grad():
        for layer in other.model.layers:
            for own in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                own.mul_((torch.arange(len(own)) % 5).unsqueeze(1))
    rows = inputs_of(other, samples)[Place("lm_head.weight")]
    (head,) = visitor.of("output.weight")
    assert head.moments is not None
    assert_near(head.moments.second, rows.T @ rows / len(rows))


@pytest.mark.parametrize("kind", ["attn_q", "attn_output", "ffn_down_exps", "token_embd"])
def test_replacing_with_zeros_changes_what_comes_after(kind: str, layered: Layered, samples: list[list[int]]) -> None:
    def clear(tensor: GGUFTensor, weight: Tensor) -> Tensor | None:
        return torch.zeros_like(weight) if kind in tensor.name else None

    left, cleared = Visitor(), Visitor(clear)
    visit_in_order(layered("qwen3moe"), samples, left)
    visit_in_order(layered("qwen3moe"), samples, cleared)
    before, after = left.of("output.weight")[0].moments, cleared.of("output.weight")[0].moments
    assert before is not None
    assert after is not None
    assert not torch.allclose(before.second, after.second, rtol=0.01)
    assert torch.equal(before.original_squares, after.original_squares)  # of the original model all the same


# what is in memory, and errors


@pytest.mark.parametrize("go", [visit_in_order, visit_unchanged])
def test_layers_are_freed(go: Any, layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")

    def look(tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> None:
        loaded = [
            number
            for number, layer in enumerate(model._decoder.layers)
            if not all(parameter.is_meta for parameter in layer.parameters())
        ]
        assert len(loaded) <= 1

    go(model, samples, look)
    assert all(parameter.is_meta for layer in model._decoder.layers for parameter in layer.parameters())


def test_the_models_in_memory_share_no_keys(layered: Layered, samples: list[list[int]]) -> None:
    """Layers leave keys and values for later ones in what they are called with."""
    model = layered("gemma4-e2b")
    with torch.no_grad():
        first, second = (model.enter(samples) for _ in range(2))
    (key,) = {key for key, value in first[0].calls[0].kwargs.items() if key.startswith("shared")}
    of_layers = {id(call.kwargs[key]) for call in first[0].calls}
    assert len(of_layers) == 1  # one for all layers, another for every batch and for every entrance
    assert len({id(own.calls[0].kwargs[key]) for own in (*first, *second)}) == len(first) + len(second)


@pytest.mark.parametrize("go", [visit_in_order, visit_unchanged])
def test_no_samples(go: Any, layered: Layered) -> None:
    with pytest.raises(SRDError, match="there are no samples to calibrate on"):
        go(layered("llama3"), [], Visitor())


@pytest.mark.parametrize("go", [visit_in_order, visit_unchanged])
def test_a_token_that_the_model_does_not_know(go: Any, layered: Layered) -> None:
    with pytest.raises(SRDError, match=f"token id {VOCABULARY + 3}, but"):
        go(layered("llama3"), [[VOCABULARY + 3]], Visitor())


@pytest.mark.parametrize("go", [visit_in_order, visit_unchanged])
def test_a_model_that_gives_infinity(go: Any, layered: Layered, samples: list[list[int]], tmp_path: Path) -> None:
    directory = write_model("llama3", tmp_path / "broken")
    rewrite(directory, lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), 3e38)})
    with pytest.raises(SRDError, match="broken: the model gives NaN or infinity in layer 1"):
        go(layered(directory), samples, Visitor())


def test_a_layer_is_computed_no_further_than_it_takes(
    layered: Layered, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layered("llama3")
    layer = model.load_layer(0)
    with torch.no_grad():
        entrance = model.enter(samples)[0]
        monkeypatch.setattr(layer.mlp, "forward", lambda *args: pytest.fail("the layer was computed to its end"))
        names = [f"model.layers.0.self_attn.{own}_proj.weight" for own in "qkv"]
        found = visit._inputs(model, layer, model.path(0), names, entrance.hidden, entrance.calls[0])
    assert [place.parameter for place in found] == names
