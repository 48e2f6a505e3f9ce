"""Divergence by depth: what is read out after the last layer must be what the models themselves say."""

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_llama
from small_models import write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from srd_modifier.evaluation import depth as depth_module
from srd_modifier.evaluation.depth import depth_divergence, record_depths
from srd_modifier.evaluation.load import LoadedModel

INPUTS = torch.randint(1, 60, (3, 20), generator=torch.Generator().manual_seed(5))


def gpt2(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=2, n_layer=layers, vocab_size=64, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """With a head of its own, with norms of other names, and with sliding windows and a cap on the logits."""
    sizes: dict[str, Any] = {"vocab_size": 64, "initializer_range": 0.3, "num_hidden_layers": 3}
    capped = write_model("gemma3-pattern", tmp_path_factory.mktemp("gemma3"), eos_token_id=1, vocab_size=64)
    return {
        "llama": make_llama(**sizes),
        "gpt2": gpt2(),
        "gemma3, capped": AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32).eval(),
    }


def loaded(model: Any) -> LoadedModel:
    return LoadedModel("model", model, Path("model"), None)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if isinstance(model, GPT2LMHeadModel) else model.model.layers  # type: ignore[union-attr, return-value]


def curve(reference: Any, model: Any) -> tuple[float, ...] | None:
    theirs, ours = record_depths(loaded(reference), INPUTS), record_depths(loaded(model), INPUTS)
    assert theirs is not None
    assert ours is not None
    return depth_divergence(theirs, ours)


def changed(model: nn.Module, layer: int) -> nn.Module:
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layers_of(model)[layer].parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def mean_kld(reference: Any, model: Any) -> float:
    """Of the models' own logits, every position counted."""
    with torch.no_grad():
        expected, found = (each(input_ids=INPUTS).logits.double().softmax(-1) for each in (reference, model))
    return float((expected * (expected.log() - found.log())).sum(-1).mean())


def read_out_by_hand(model: nn.Module) -> list[Tensor]:
    """Log-probabilities after each layer, from the hidden states that Transformers gives of a model."""
    with torch.no_grad():
        states = model(input_ids=INPUTS, output_hidden_states=True).hidden_states
        body = model.transformer if isinstance(model, GPT2LMHeadModel) else model.model
        norm = body.ln_f if isinstance(model, GPT2LMHeadModel) else body.norm
        cap = getattr(model.config, "final_logit_softcapping", None)
        found = []
        for place, state in enumerate(states[1:]):
            last = place == len(states) - 2  # has gone through the norm already
            logits = model.get_output_embeddings()(state if last else norm(state))
            found.append((logits if cap is None else cap * torch.tanh(logits / cap)).double().log_softmax(-1))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3, capped"])
def test_the_last_value_is_the_divergence_of_the_models_themselves(families, name):
    model = families[name]
    other = changed(changed(model, 0), 2)
    values = curve(model, other)
    assert values is not None
    assert len(values) == len(layers_of(model))
    assert values[-1] == pytest.approx(mean_kld(model, other), rel=1e-4)
    assert values[-1] > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3, capped"])
def test_every_value_is_that_of_the_logit_lens(families, name):
    model = families[name]
    other = changed(model, 0)
    theirs, ours = read_out_by_hand(model), read_out_by_hand(other)
    expected = [
        float((before.exp() * (before - after)).sum(-1).mean()) for before, after in zip(theirs, ours, strict=True)
    ]
    assert curve(model, other) == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3, capped"])
def test_a_model_does_not_diverge_from_itself_at_any_depth(families, name):
    model = families[name]
    assert curve(model, copy.deepcopy(model)) == (0.0,) * len(layers_of(model))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_nothing_diverges_before_the_layer_that_differs(families, layer):
    values = curve(families["llama"], changed(families["llama"], layer))
    assert values is not None
    assert [value > 0 for value in values] == [number >= layer for number in range(3)]


def test_the_norm_and_head_of_each_are_its_own(families):
    """A candidate whose head alone differs diverges after every layer."""
    model = copy.deepcopy(families["llama"])
    model.lm_head.weight.data.mul_(1.5)
    values = curve(families["llama"], model)
    assert values is not None
    assert min(values) > 1e-3


def test_slices_of_rows_change_nothing(families, monkeypatch):
    other = changed(families["llama"], 1)
    whole = curve(families["llama"], other)
    monkeypatch.setattr(depth_module, "_SLICE_VALUES", 7 * 64)
    assert curve(families["llama"], other) == pytest.approx(whole, rel=1e-9)


def test_nothing_is_left_behind_in_the_model():
    model = make_llama(vocab_size=64)
    record_depths(loaded(model), INPUTS)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_that_was_wrapped_is_called(families):
    """As accelerate wraps it, to place a model on several devices."""
    model = copy.deepcopy(families["llama"])
    model.forward = update_wrapper(partial(model.forward), model.forward)
    assert curve(families["llama"], model) == (0.0, 0.0, 0.0)


# unlike architectures


def test_models_of_unequal_depth_have_no_curve(families):
    assert curve(families["llama"], make_llama(vocab_size=64, num_hidden_layers=4)) is None


def without_norm(model: Any) -> None:
    """Under a name that is not known."""
    model.model.last_norm = model.model.norm
    del model.model.norm


def without_head(model: Any) -> None:
    model.get_output_embeddings = lambda: None


def without_layers(model: Any) -> None:
    model.config.num_hidden_layers = 7


@pytest.mark.parametrize("damage", [without_norm, without_head, without_layers])
def test_a_model_whose_parts_are_not_found_has_no_depth(families, damage: Callable[[Any], None]):
    model = copy.deepcopy(families["llama"])
    damage(model)
    assert record_depths(loaded(model), INPUTS) is None
