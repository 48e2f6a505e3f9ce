"""What experts are shown, and the switch of llm-compressor that decides it."""

import sys

import pytest
import torch
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag, moe_calibration_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from random_models import make_llama, make_routed_mixture
from torch import nn

from srd_modifier.selection.routing import experts_among, input_gains, routed_tokens_only


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return linearize_moe(make_routed_mixture(vocab_size=128))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))


def test_experts_by_their_names():
    one = nn.Linear(1, 1)
    names = ["model.layers.0.mlp.experts.11.up_proj", "model.layers.0.experts.0.w1", "experts.0.down_proj"]
    others = ["model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"]
    assert list(experts_among(dict.fromkeys([*names, *others], one))) == names


@pytest.mark.parametrize("fails", [False, True])
def test_the_switch_is_put_back(fails):
    with moe_calibration_context():
        try:
            with routed_tokens_only():
                assert not get_calibrate_all_experts_flag()
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert get_calibrate_all_experts_flag()
    with routed_tokens_only():
        assert not get_calibrate_all_experts_flag()
    assert not get_calibrate_all_experts_flag()


def test_nothing_to_switch_without_llm_compressor(monkeypatch):
    monkeypatch.delitem(sys.modules, "llmcompressor.modeling.moe.context")
    with routed_tokens_only():
        pass


def test_gains_are_ratios_of_what_the_experts_saw(model, ids):
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in linears(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with moe_calibration_context():
        gains = input_gains(lambda: model(ids), linears(model))
    assert {name.split(".experts.")[1][0] for name in gains} == set("01234")  # the last one gets no token
    for name, gain in gains.items():
        shown, routed = (rows.square().sum(-1).mean() for rows in seen[name])
        assert len(seen[name][0]) == 128 > len(seen[name][1])
        assert gain == pytest.approx(float(routed / shown), rel=1e-5)


def test_gains_are_one_if_calibration_shows_routed_tokens_only(model, ids):
    assert set(input_gains(lambda: model(ids), linears(model)).values()) == {1.0}


def test_a_dense_model_does_not_run():
    assert input_gains(lambda: pytest.fail("ran"), linears(make_llama())) == {}
