"""Fake-quantized modules in a model, and out of it again."""

import copy

import pytest
import torch
from random_models import make_llama
from torch import nn

from srd_modifier.errors import ConfigError
from srd_modifier.qat.grid import Grid, search_grid
from srd_modifier.qat.linear import FakeQuantizedLinear, fake_quantize, fake_quantized_modules, finish, set_width

TOKENS = torch.arange(24).view(2, 12)


def llama() -> nn.Module:
    return make_llama(num_hidden_layers=2).float().eval()


def grids_of(model: nn.Module) -> dict[str, Grid]:
    return {
        name: search_grid(module.weight, group_size=32)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def test_the_state_dict_keeps_its_names_and_values():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grids = grids_of(model)
    fake_quantize(model, grids)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert {*after} - {*before} == {f"{name}.fake_quantizer.scale" for name in grids}


def test_the_forward_pass_is_that_of_a_model_with_rounded_weights():
    model, rounded = llama(), llama()
    rounded.load_state_dict(model.state_dict())
    grids = grids_of(model)
    with torch.no_grad():
        for name, grid in grids.items():
            weight = rounded.get_submodule(name).weight
            weight.copy_(grid.nearest(weight))
    fake_quantize(model, grids)
    assert torch.equal(model(TOKENS).logits, rounded(TOKENS).logits)


@pytest.mark.parametrize("learned", [False, True])
def test_a_finished_model_is_an_ordinary_one_that_computes_the_same(learned):
    model = llama()
    fake_quantize(model, grids_of(model), learned_scales=learned)
    if learned:
        for module in fake_quantized_modules(model).values():
            nn.init.uniform_(module.fake_quantizer.log_factor, -0.02, 0.02)
    expected = model(TOKENS).logits
    grids = finish(model)
    assert torch.equal(model(TOKENS).logits, expected)
    assert {*model.state_dict()} == {*llama().state_dict()}
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    for name, grid in grids.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(grid.values(grid.levels(weight)), weight), "the levels can be read from the weights"


def test_the_width_of_all_modules_is_set_at_once():
    model = llama()
    expected = model(TOKENS).logits
    fake_quantize(model, grids_of(model))
    set_width(model, 16)
    assert torch.equal(model(TOKENS).logits, expected)
    differences = []
    for width in (12, 8, 6, 4):
        set_width(model, width)
        differences.append((model(TOKENS).logits - expected).square().mean().item())
    assert differences == sorted(differences)
    assert differences[0] > 0


def test_a_loss_flows_back_through_the_whole_model():
    """Against differences of the loss of a model whose weights move in a straight line from their rounded values."""
    model = llama()
    fake_quantize(model, grids_of(model))
    modules = fake_quantized_modules(model)

    def loss_of(own: nn.Module) -> torch.Tensor:
        return own(TOKENS, labels=TOKENS).loss

    loss_of(model).backward()
    directions = {name: module.weight.grad / module.weight.grad.norm() for name, module in modules.items()}
    slopes = {name: module.weight.grad.norm().item() for name, module in modules.items()}
    finish(model)
    step = 0.02
    for name, direction in directions.items():
        weight = model.get_submodule(name).weight
        rounded = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(rounded + step * direction)
            above = loss_of(model).item()
            weight.copy_(rounded - step * direction)
            below = loss_of(model).item()
            weight.copy_(rounded)
        assert (above - below) / (2 * step) == pytest.approx(slopes[name], rel=0.02), name


def test_a_copy_of_a_model_stays_fake_quantized():
    model = llama()
    fake_quantize(model, grids_of(model))
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.9.mlp.up_proj", "there is no such module"),
        ("model.norm", "expected a torch.nn.Linear"),
        ("model.embed_tokens", "expected a torch.nn.Linear"),
    ],
)
def test_what_is_no_linear_is_refused_before_anything_is_changed(name, message):
    model = llama()
    grid = Grid(torch.ones(4, 2), -8, 7)
    with pytest.raises(ConfigError, match=message):
        fake_quantize(model, {**grids_of(model), name: grid})
    assert not fake_quantized_modules(model)


def test_scales_of_another_shape_are_refused():
    model = llama()
    with pytest.raises(ConfigError, match="do not fit its weight"):
        fake_quantize(model, {"model.layers.0.mlp.up_proj": Grid(torch.ones(4, 2), -8, 7)})


def test_a_tied_weight_is_refused():
    model = make_llama(num_hidden_layers=1, tie_word_embeddings=True).float()
    with pytest.raises(ConfigError, match="tied to another"):
        fake_quantize(model, {"lm_head": search_grid(model.lm_head.weight, group_size=32)})
