import pytest
import torch
from torch import nn

from srd_modifier.errors import CheckpointError
from srd_modifier.transformers.weights import find_module, find_weight


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.arange(3 * 8 * 2).view(3, 8, 2).float())
        self.down_proj = nn.Parameter(torch.arange(3 * 2 * 4).view(3, 2, 4).float())


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(2, 3), "experts": Experts()})])


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(3, 5)


@pytest.fixture
def model() -> Model:
    return Model()


def test_a_module_by_its_own_name(model):
    assert find_weight(model, "model.layers.0.proj") is model.model.layers[0]["proj"].weight
    assert find_weight(model, "lm_head") is model.lm_head.weight
    assert find_module(model, "lm_head") is model.lm_head


def test_a_body_whose_checkpoint_has_the_prefix(model):
    body = model.model
    body.base_model_prefix = "model"
    assert find_weight(body, "model.layers.0.proj") is body.layers[0]["proj"].weight
    assert find_module(body, "model.layers.0.proj") is body.layers[0]["proj"]


def test_a_model_whose_checkpoint_lacks_the_prefix(model):
    assert find_weight(model, "layers.0.proj") is model.model.layers[0]["proj"].weight


@pytest.mark.parametrize("expert", range(3))
def test_an_expert_is_a_view_of_the_stack(expert, model):
    experts = model.model.layers[0]["experts"]
    name = f"model.layers.0.experts.{expert}"
    with torch.no_grad():
        assert torch.equal(find_weight(model, f"{name}.gate_proj"), experts.gate_up_proj[expert, :4])
        assert torch.equal(find_weight(model, f"{name}.up_proj"), experts.gate_up_proj[expert, 4:])
        assert torch.equal(find_weight(model, f"{name}.down_proj"), experts.down_proj[expert])
        find_weight(model, f"{name}.up_proj").zero_()
    assert not experts.gate_up_proj[expert, 4:].any()
    assert find_module(model, f"{name}.up_proj") is None


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.proj", "model.layers.0.experts.1.side_proj", "model.layers.0.experts.x.up_proj", "model.layers.0"],
)
def test_what_the_model_does_not_have_is_named(name, model):
    with pytest.raises(CheckpointError, match=f"^the checkpoint has a residual for {name}, which Model does not have"):
        find_weight(model, name)
