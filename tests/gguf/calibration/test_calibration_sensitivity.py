"""What errors cost, against plain autograd on the whole model."""

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
from srd_modifier.gguf.calibration import sensitivity as module
from srd_modifier.gguf.calibration.layers import LayeredModel, Place
from srd_modifier.gguf.calibration.sensitivity import measure_sensitivity

Layered = Callable[[str | Path], LayeredModel]
Whole = Callable[[str | Path], Any]

DENSE = ["llama3", "llama-biases", "qwen3", "gemma3", "gemma3-pattern", "gemma4"]


def batches_of(samples: list[list[int]]) -> list[Tensor]:
    """Those of one length together, in the order in which the lengths come up."""
    lengths = dict.fromkeys(map(len, samples))
    return [torch.tensor([sample for sample in samples if len(sample) == length]) for length in lengths]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


@dataclass
class Reference:
    """Sums over the tokens of a text, by plain autograd through the whole model."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | float = 0.0
    head_inputs: Tensor | float = 0.0
    experts: list[tuple[str, Any, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    tokens: int = 0


def reference(whole: Any, samples: list[list[int]], seed: int = 0) -> Reference:
    """Labels drawn from the model's own predictions by the same generator, the rest is PyTorch's."""
    whole.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    result = Reference()
    seen: dict[str, Tensor] = {}
    routed: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(own: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            output.retain_grad()
            seen[name] = output
            routed[name] = args
            return output

        return hook

    names = {name: own for name, own in whole.named_modules() if isinstance(own, nn.Linear)}
    names |= {name: own for name, own in whole.named_modules() if name.endswith("experts")}
    names["embedding"] = whole.get_input_embeddings()
    handles = [own.register_forward_hook(keep(name)) for name, own in names.items()]
    for ids in batches_of(samples):
        logits = whole(ids, use_cache=False).logits.flatten(0, 1)
        uniform = torch.rand(len(logits), 1, generator=generator)
        labels = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), uniform).clamp(max=VOCABULARY - 1)
        functional.cross_entropy(logits, labels.squeeze(1), reduction="sum").backward()
        for name, output in seen.items():
            if output.grad is None:
                continue
            gradient = output.grad.flatten(0, -2)
            if name == "embedding":
                # of what is looked up, which some models scale
                row = whole.get_input_embeddings().weight[ids].flatten(0, -2)
                gradient = gradient * (output.detach().flatten(0, -2) / row)
                result.embedding = result.embedding + gradient.T @ gradient
            elif name.endswith("experts"):
                result.experts.append((name, names[name], *(own.detach() for own in routed[name]), gradient))
            else:
                result.outputs[name] = result.outputs.get(name, 0) + gradient.square().sum(0)
        entering = routed["lm_head"][0].detach().flatten(0, -2)
        result.head_inputs = result.head_inputs + entering.T @ entering
        result.tokens += ids.numel()
        seen.clear()
    for handle in handles:
        handle.remove()
    return result


def expected_of_experts(found: Reference) -> dict[Place, Tensor]:
    """The sums for every expert, from the gradient of what all of them give together."""
    sums: dict[Place, Tensor] = {}
    for name, experts, hidden, chosen, shares, gradient in found.experts:
        for expert in range(experts.num_experts):
            tokens, choice = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens) == 0:
                continue
            gate_up = functional.linear(hidden[tokens], experts.gate_up_proj[expert]).requires_grad_(True)
            gate, up = gate_up.chunk(2, dim=-1)
            down = functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            given = (down * shares[tokens, choice, None] * gradient[tokens]).sum()
            for part, own in zip(
                ("gate_up_proj", "down_proj"), torch.autograd.grad(given, [gate_up, down]), strict=True
            ):
                place = Place(f"{name}.{part}", expert)
                sums[place] = sums.get(place, torch.zeros(())) + own.square().sum(0)
    return sums


# gradients


@pytest.mark.parametrize("name", DENSE)
def test_equals_plain_autograd_on_the_same_labels(
    name: str, layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    found = measure_sensitivity(layered(name), samples, seed=3)
    expected = reference(whole(name), samples, seed=3)
    assert found.tokens == expected.tokens == sum(map(len, samples))
    expected.outputs.pop("lm_head")
    assert {place.parameter for place in found.outputs} == {f"{own}.weight" for own in expected.outputs}
    for own, squares in expected.outputs.items():
        assert_near(found.outputs[Place(f"{own}.weight")], squares / expected.tokens)
    assert isinstance(expected.head_inputs, Tensor)
    assert_near(found.head_inputs, expected.head_inputs / expected.tokens)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3", "gemma4"])
def test_the_embedding_is_what_is_looked_up(
    name: str, layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    """Gemma multiplies it by the square root of its width: an error in it costs that much more."""
    found = measure_sensitivity(layered(name), samples, seed=3)
    expected = reference(whole(name), samples, seed=3).embedding
    assert isinstance(expected, Tensor)
    assert_near(found.embedding, expected / found.tokens)


@pytest.mark.parametrize("name", ["qwen3moe", "gemma4-moe"])
def test_every_expert_that_tokens_reach(name: str, layered: Layered, whole: Whole, samples: list[list[int]]) -> None:
    model = layered(name)
    found = measure_sensitivity(model, samples, seed=1)
    through = reference(whole(name), samples, seed=1)
    expected = expected_of_experts(through)
    assert len(expected) > 2 * model.layers
    assert {place for place in found.outputs if place.expert is not None} == expected.keys()
    for place, squares in expected.items():
        assert_near(found.outputs[place], squares / through.tokens)


def test_layers_that_use_the_keys_of_others(layered: Layered, whole: Whole, samples: list[list[int]]) -> None:
    """What they cost through keys and values is not counted; from there on everything is."""
    model = layered("gemma4-e2b")
    found = measure_sensitivity(model, samples, seed=2)
    expected = reference(whole("gemma4-e2b"), samples, seed=2)
    for number in range(4, 8):
        for place, own in found.outputs.items():
            if place.parameter.startswith(model.path(number)):
                squares = expected.outputs[place.parameter.removesuffix(".weight")]
                assert_near(own, squares / expected.tokens)
    earlier = [own for place, own in found.outputs.items() if place.parameter.startswith(model.path(0))]
    assert len(earlier) == 9
    assert all(bool(own.isfinite().all()) and bool(own.any()) for own in earlier)


# the head


@pytest.mark.parametrize("name", ["llama3", "gemma3-pattern"], ids=["plain", "soft cap"])
def test_errors_of_logits_by_enumerating_every_label(
    name: str, layered: Layered, whole: Whole, samples: list[list[int]]
) -> None:
    """The mean squared gradient of what the head gives, which a cap comes after."""
    model = whole(name)
    cap = getattr(model.config, "final_logit_softcapping", None)
    expected = torch.zeros(VOCABULARY)
    with torch.no_grad():
        states = torch.cat([model.get_decoder()(ids).last_hidden_state.flatten(0, 1) for ids in batches_of(samples)])
    products = functional.linear(states, model.get_output_embeddings().weight).requires_grad_(True)
    logits = products if cap is None else cap * torch.tanh(products / cap)
    surprise = -logits.log_softmax(-1)
    for label in range(VOCABULARY):
        (gradient,) = torch.autograd.grad(surprise[:, label].sum(), products, retain_graph=True)
        expected += ((-surprise[:, label]).exp()[:, None] * gradient.square()).sum(0).detach()
    found = measure_sensitivity(layered(name), samples)
    assert_near(found.logits, expected / len(states))


def test_frequencies_are_those_of_the_text(layered: Layered, samples: list[list[int]]) -> None:
    ids = [token for sample in samples for token in sample]
    found = measure_sensitivity(layered("qwen3"), samples)
    assert found.frequency.tolist() == pytest.approx([ids.count(token) / len(ids) for token in range(VOCABULARY)])


def test_logits_in_parts(layered: Layered, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole_at_once = measure_sensitivity(layered("qwen3"), samples)
    monkeypatch.setattr(module, "_LOGITS", 7 * VOCABULARY)
    in_parts = measure_sensitivity(layered("qwen3"), samples)
    for name in ("logits", "head_inputs"):
        assert_near(getattr(in_parts, name), getattr(whole_at_once, name))
    assert in_parts.tokens == whole_at_once.tokens


def test_labels_are_drawn_from_the_models_predictions(layered: Layered, whole: Whole) -> None:
    """One text many times over: the mean over as many labels is near the expectation over all of them."""
    text = [5, 17, 60, 3]
    model = whole("llama3").requires_grad_(False)
    states: list[Tensor] = []

    def keep(own: nn.Module, args: Any, output: Tensor) -> Tensor:
        states.append(output.detach().requires_grad_(True))
        return states[-1]

    model.get_decoder().layers[-1].mlp.down_proj.register_forward_hook(keep)
    surprise = -model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
    expected = torch.zeros(states[-1].shape[-1])
    for place in range(len(text)):
        for label in range(VOCABULARY):
            (gradient,) = torch.autograd.grad(surprise[place, label], states[-1], retain_graph=True)
            expected += (-surprise[place, label]).exp().detach() * gradient.flatten(0, -2).square().sum(0)
    own = Place("model.layers.3.mlp.down_proj.weight")
    found = measure_sensitivity(layered("llama3"), [text] * 600, tokens=10**6).outputs[own]
    assert found.sum() == pytest.approx(float(expected.sum()) / len(text), rel=0.1)
    torch.testing.assert_close(found, expected / len(text), rtol=0.35, atol=0.05 * float(expected.max()))


# choice of text and labels


def test_samples_are_taken_until_there_are_enough_tokens(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("qwen3")
    assert measure_sensitivity(model, samples, tokens=41).tokens == 47
    assert measure_sensitivity(model, samples, tokens=40).tokens == 40
    first = measure_sensitivity(model, samples[:2])
    assert_near(measure_sensitivity(model, samples, tokens=41).embedding, first.embedding)


def test_the_seed_decides_the_labels(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("qwen3")
    first, again, other = (measure_sensitivity(model, samples, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)
    assert torch.equal(first.logits, other.logits)


def test_progress_counts_forward_and_backward(layered: Layered, samples: list[list[int]]) -> None:
    seen: list[tuple[int, int]] = []
    measure_sensitivity(layered("llama3"), samples, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(9)]


def test_nothing_stays_in_memory(layered: Layered, samples: list[list[int]]) -> None:
    model = layered("llama3")
    measure_sensitivity(model, samples)
    assert all(parameter.is_meta for layer in model._decoder.layers for parameter in layer.parameters())


# errors


def test_no_samples(layered: Layered) -> None:
    with pytest.raises(SRDError, match="there are no samples to calibrate on"):
        measure_sensitivity(layered("llama3"), [])


def test_a_model_that_gives_nan(tmp_path: Path, layered: Layered, samples: list[list[int]]) -> None:
    directory = write_model("llama3", tmp_path / "broken")
    rewrite(
        directory,
        lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), 3e38)},
    )
    with pytest.raises(SRDError, match="broken: the model gives NaN or infinity"):
        measure_sensitivity(layered(directory), samples)
