"""A model read layer by layer against the same model as Transformers loads it."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, VOCABULARY, rewrite, write_model
from torch import Tensor, nn
from torch.nn import functional

from srd_modifier.errors import SRDError
from srd_modifier.gguf.calibration import layers
from srd_modifier.gguf.calibration.layers import LayeredModel, Place
from srd_modifier.gguf.families import family_of
from srd_modifier.gguf.weights import ModelWeights

Layered = Callable[[str | Path], LayeredModel]
Whole = Callable[[str | Path], Any]
Seen = list[tuple[Place, Tensor, Tensor | None]]

WITH_EXPERTS = ["qwen3moe", "gemma4-moe"]


@torch.no_grad()
def run(model: LayeredModel, samples: Sequence[Sequence[int]]) -> list[tuple[Tensor, list[Tensor], Tensor]]:
    """Token ids, the hidden states before every layer and behind the last, and the logits of each batch."""
    results = []
    for entrance in model.enter(samples):
        states = [entrance.hidden]
        for number in range(model.layers):
            layer = model.load_layer(number)
            states.append(entrance.calls[number](layer, states[-1]))
            model.unload(layer)
        results.append((entrance.ids, states, model.logits(model.load_norm()(states[-1]), model.read_head())))
    return results


@torch.no_grad()
def assert_computes_the_same(model: LayeredModel, whole: Any, samples: Sequence[Sequence[int]]) -> None:
    decoder = whole.get_decoder()
    states: list[Tensor] = []
    handles = [decoder.layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    for layer in decoder.layers:
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    for ids, found, logits in run(model, samples):
        states.clear()
        expected = whole(ids, use_cache=False).logits
        assert len(found) == len(states) == model.layers + 1
        for own, other in zip(found, states, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for handle in handles:
        handle.remove()


def copy_of(model: LayeredModel, directory: Path, name: str) -> Path:
    """A copy of a model's directory, for changing."""
    return Path(shutil.copytree(model.weights.directory, directory / name))


def empty(module: nn.Module) -> list[bool]:
    return [parameter.is_meta for parameter in module.parameters()]


# the computation


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_is_the_whole_model(name: str, layered: Layered, whole: Whole, samples: list[list[int]]) -> None:
    assert_computes_the_same(layered(name), whole(name), samples)


def test_a_text_model_that_is_a_part_of_another(tmp_path: Path, samples: list[list[int]], layered: Layered) -> None:
    """As Gemma 3 comes with its tower for images: other names on disk, and a configuration within one."""
    directory = write_model("gemma3", tmp_path / "model")
    plain = run(layered(directory), samples)
    rewrite(
        directory,
        lambda tensors: (
            {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
            | {"model.vision_tower.patch.weight": torch.ones(2)}
        ),
    )
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}}))
    model = layered(directory)
    for (_, _, found), (_, _, expected) in zip(run(model, samples), plain, strict=True):
        assert torch.equal(found, expected)


def test_experts_that_share_two_tensors_on_disk(
    tmp_path: Path, samples: list[list[int]], layered: Layered, whole: Whole
) -> None:
    """Qwen 3 as a checkpoint of Transformers' own form in memory; as saved, each expert has tensors of its own."""
    directory = write_model("qwen3moe", tmp_path / "model")
    before = run(layered(directory), samples)
    fused = {name: tensor for name, tensor in whole(directory).state_dict().items() if ".experts." in name}
    assert all(tensor.dim() == 3 for tensor in fused.values())
    rewrite(directory, lambda tensors: {name: own for name, own in tensors.items() if ".experts." not in name} | fused)
    for (_, _, found), (_, _, expected) in zip(run(layered(directory), samples), before, strict=True):
        assert torch.equal(found, expected)


def test_weights_in_bfloat16_are_computed_in_float32(
    tmp_path: Path, samples: list[list[int]], layered: Layered, whole: Whole
) -> None:
    directory = write_model("qwen3", tmp_path / "model")
    rewrite(directory, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    model = layered(directory)
    assert_computes_the_same(model, whole(directory), samples)
    assert {parameter.dtype for parameter in model.load_layer(0).parameters()} == {torch.float32}


def test_what_is_computed_from_the_settings_is_not_read(
    tmp_path: Path, samples: list[list[int]], layered: Layered
) -> None:
    """Old checkpoints hold the frequencies of RoPE, rounded to the weights' type; Transformers ignores them."""
    directory = write_model("tinyllama", tmp_path / "model")
    expected = run(layered(directory), samples)
    rewrite(directory, lambda tensors: tensors | {"model.rotary_emb.inv_freq": torch.zeros(4)})
    for (_, _, found), (_, _, logits) in zip(run(layered(directory), samples), expected, strict=True):
        assert torch.equal(found, logits)


# what is in memory


@pytest.mark.parametrize("name", ["llama-biases", "qwen3moe", "gemma4-e2b"])
def test_only_the_layer_at_hand_is_in_memory(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model = layered(name)
    with torch.no_grad():
        model.enter(samples)
    decoder = model._decoder
    assert all(empty(decoder))
    layer = model.load_layer(1)
    assert not any(empty(layer))
    assert all(all(empty(other)) for number, other in enumerate(decoder.layers) if number != 1)
    assert all(empty(decoder.embed_tokens))
    model.unload(layer)
    assert all(empty(decoder))


def test_a_layer_is_a_copy_of_what_is_on_disk(layered: Layered) -> None:
    model = layered("llama3")
    layer = model.load_layer(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    model.unload(layer)
    again = model.load_layer(0)
    on_disk = model.weights.tensor("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(again.self_attn.q_proj.weight, on_disk)
    assert on_disk.any()


def test_samples_of_one_length_go_together(
    layered: Layered, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layered("llama3")
    with torch.no_grad():
        assert [tuple(entrance.ids.shape) for entrance in model.enter(samples)] == [(2, 40), (2, 7), (1, 23)]
        monkeypatch.setattr(layers, "_BATCH_TOKENS", 20)
        entrances = model.enter([*samples, samples[1]])
    assert [tuple(entrance.ids.shape) for entrance in entrances] == [(1, 40), (1, 40), (2, 7), (1, 7), (1, 23)]
    assert sorted(row for entrance in entrances for row in entrance.ids.tolist()) == sorted([*samples, samples[1]])


def test_weights_may_be_replaced_before_samples_enter(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")

    def halve(decoder: nn.Module) -> None:
        decoder.embed_tokens.weight.mul_(0.5)

    with torch.no_grad():
        before, halved, after = model.enter(samples), model.enter(samples, halve), model.enter(samples)
    for own, half, same in zip(before, halved, after, strict=True):
        assert torch.equal(half.hidden, 0.5 * own.hidden)
        assert torch.equal(same.hidden, own.hidden)


# places


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gemma3", "gemma4-moe", "gemma4-e2b"])
def test_every_matrix_has_a_place_that_holds_it(name: str, layered: Layered, whole: Whole) -> None:
    model = layered(name)
    parameters = dict(whole(name).named_parameters())
    occupants = [(place, occupant) for place, own in model.places.items() for occupant in own]
    tensors = family_of(model.weights.config).tensors(model.weights)
    pieces = [(tensor.name, number) for tensor in tensors for number, piece in enumerate(tensor.pieces) if piece.module]
    assert sorted((occupant.tensor.name, occupant.number) for _, occupant in occupants) == sorted(pieces)
    for place, (tensor, number, part) in occupants:
        own = parameters[place.parameter][part]
        assert own.dim() == 2
        piece = tensor.pieces[number]
        read = piece.read(model.weights)
        assert torch.equal(own if piece.rows is None else own[piece.rows], read)
        assert place.expert is None or part[0] == place.expert


@pytest.mark.parametrize(
    ("name", "head"), [("llama3", "lm_head.weight"), ("gemma3", "model.embed_tokens.weight")], ids=["own", "tied"]
)
def test_the_head(name: str, head: str, layered: Layered, whole: Whole) -> None:
    model = layered(name)
    assert model.head == Place(head)
    assert (model.head == model.embedding) == (name == "gemma3")
    assert torch.equal(model.read_head(), whole(name).get_output_embeddings().weight)


# watching


def watched(model: LayeredModel, number: int, entrance: layers.Entrance) -> tuple[nn.Module, Seen]:
    """Everything that is seen in a layer, whose inputs here are the embeddings."""
    layer = model.load_layer(number)
    found: Seen = []
    with torch.no_grad(), model.watch(model.path(number), layer, lambda *seen: found.append(seen)):
        entrance.calls[number](layer, entrance.hidden)
    return layer, found


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma3", "gemma4-moe"])
def test_linears_are_seen_with_inputs_and_outputs(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model = layered(name)
    with torch.no_grad():
        entrance = model.enter(samples)[0]
    layer, found = watched(model, 0, entrance)
    hooked: dict[str, tuple[Tensor, Tensor]] = {}
    for own_name, module in layer.named_modules():
        if isinstance(module, nn.Linear):

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = own_name) -> None:
                hooked[f"model.layers.0.{name}.weight"] = args[0], output

            module.register_forward_hook(keep)
    with torch.no_grad():
        entrance.calls[0](layer, entrance.hidden)
    seen = {place.parameter: (inputs, outputs) for place, inputs, outputs in found if place.expert is None}
    assert seen.keys() == hooked.keys()
    for parameter, (inputs, outputs) in hooked.items():
        assert torch.equal(seen[parameter][0], inputs)
        assert seen[parameter][1] is not None
        assert torch.equal(seen[parameter][1], outputs)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_expert_is_seen_with_its_tokens(name: str, layered: Layered, samples: list[list[int]]) -> None:
    model = layered(name)
    with torch.no_grad():
        entrance = model.enter(samples)[0]
    layer, found = watched(model, 0, entrance)
    (experts,) = (module for own, module in layer.named_modules() if own.endswith("experts"))
    routed: list[Any] = []
    experts.register_forward_pre_hook(lambda module, args: routed.append(args))
    with torch.no_grad():
        entrance.calls[0](layer, entrance.hidden)
    ((hidden, chosen, _),) = routed
    path = "model.layers.0.mlp.experts" if name == "qwen3moe" else "model.layers.0.experts"
    seen = {place: (inputs, outputs) for place, inputs, outputs in found if place.expert is not None}
    reached = sorted(set(chosen.flatten().tolist()))
    assert sorted(place.expert for place in seen if place.parameter == f"{path}.gate_up_proj") == reached
    assert sorted(place.expert for place in seen if place.parameter == f"{path}.down_proj") == reached
    for expert in reached:
        inputs, outputs = seen[Place(f"{path}.gate_up_proj", expert)]
        own = hidden[(chosen == expert).any(dim=-1)]
        # in another order
        assert torch.equal(torch.sort(inputs, dim=0).values, torch.sort(own, dim=0).values)
        assert torch.equal(outputs, functional.linear(inputs, experts.gate_up_proj[expert]))
        down, result = seen[Place(f"{path}.down_proj", expert)]
        gate, up = outputs.chunk(2, dim=-1)
        torch.testing.assert_close(down, experts.act_fn(gate) * up)
        assert torch.equal(result, functional.linear(down, experts.down_proj[expert]))


def test_a_product_is_seen_before_and_after(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")
    with torch.no_grad():
        entrance = model.enter(samples)[0]
    _, found = watched(model, 2, entrance)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [place.parameter.split(".")[-2] for place, _, _ in found] == [name for name in order for _ in range(2)]
    assert [outputs is None for _, _, outputs in found] == [True, False] * 7
    assert found[0][1] is found[2][1] is found[4][1]  # one input for queries, keys and values


def test_products_with_other_weights_are_not_seen(layered: Layered) -> None:
    model = layered("llama3")
    layer = model.load_layer(0)
    found: Seen = []
    with model.watch(model.path(0), layer, lambda *seen: found.append(seen)):
        functional.linear(torch.ones(1, 64), torch.ones(3, 64))
        functional.linear(torch.ones(1, 64), layer.self_attn.q_proj.weight.clone())
        assert not found
        functional.linear(torch.ones(1, 64), layer.self_attn.q_proj.weight)
    functional.linear(torch.ones(1, 64), layer.self_attn.q_proj.weight)
    assert [place.parameter for place, _, _ in found] == ["model.layers.0.self_attn.q_proj.weight"] * 2


# errors


def test_no_samples(layered: Layered) -> None:
    with pytest.raises(SRDError, match="there are no samples to calibrate on"):
        layered("llama3").enter([])


def test_a_token_that_the_model_does_not_know(layered: Layered) -> None:
    model = layered("llama3")
    with pytest.raises(SRDError, match=f"token id {VOCABULARY}, but the model has only {VOCABULARY} embeddings"):
        model.enter([[1, 2], [3, VOCABULARY]])
    assert all(empty(model._decoder))
    assert len(model.enter([[1, 2]])) == 1  # and goes on with others


@pytest.mark.parametrize("missing", ["self_attn.q_norm.weight", "mlp.experts.3.up_proj.weight"])
def test_a_tensor_that_is_missing(missing: str, layered: Layered, tmp_path: Path) -> None:
    complete = layered("qwen3moe")
    directory = copy_of(complete, tmp_path, "incomplete")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.2.{missing}"]
    save_file(tensors, path)
    tensors_of_the_complete = family_of(complete.weights.config).tensors(complete.weights)
    model = LayeredModel(ModelWeights.open(directory), tensors_of_the_complete, "cpu")
    model.load_layer(1)
    with pytest.raises(SRDError, match=rf"incomplete.* model\.layers\.2\.{re.escape(missing)}"):
        model.load_layer(2)
