"""`g` against plain autograd, its prediction against the measured divergence, and the forward method against both."""

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag, moe_calibration_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from random_models import make_llama, make_routed_mixture
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import srd_modifier.selection.sensitivity as sensitivity
from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.selection.sensitivity import OutputSensitivity, output_sensitivity

VOCABULARY = 128
METHODS = ("gradient", "forward")
REPOSITORY = Path(__file__).parents[2]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two small layers; weights larger than usual, so that its predictions are not all alike."""
    return make_llama(intermediate_size=96, vocab_size=VOCABULARY, initializer_range=0.15)


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Two batches of three rows of 16 tokens."""
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(VOCABULARY, (3, 16), generator=generator)} for _ in range(2)]


def reference(
    model: Any, batches: Iterable[Mapping[str, Tensor]], modules: Mapping[str, nn.Linear], seed: int = 0
) -> dict[str, Tensor]:
    """Plain autograd: row by row, cross-entropy from PyTorch, gradients of weights and all."""
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros(module.out_features) for name, module in modules.items()}
    labels_seen = 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        draws = torch.zeros(mask.shape, dtype=torch.float64)
        draws[mask] = torch.rand(int(mask.sum()), generator=generator, dtype=torch.float64)
        for ids, kept, draw in zip(batch["input_ids"], mask, draws, strict=True):
            outputs: list[tuple[str, Tensor]] = []

            def keep(name: str, module: nn.Module, args: Any, output: Tensor, kept: list = outputs) -> None:
                output.retain_grad()
                kept.append((name, output))

            handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
            logits = model(input_ids=ids[None], attention_mask=kept[None].long()).logits[0]
            for handle in handles:
                handle.remove()
            cumulative = logits.detach().float().softmax(-1).double().cumsum(-1)
            labels = (cumulative <= draw[:, None] * cumulative[:, -1:]).sum(-1)
            nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").backward()
            for name, output in outputs:
                if output.grad is not None:
                    sums[name] += output.grad.flatten(0, -2).square().sum(0)
            model.zero_grad()
        labels_seen += int(mask.sum())
    return {name: squares / labels_seen for name, squares in sums.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-4) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * float(value.max()), msg=name)


# --- the gradient method


def test_equals_plain_autograd_on_the_same_labels(model: LlamaForCausalLM, batches: list) -> None:
    modules = linears(model)
    assert "lm_head" in modules
    found = output_sensitivity(model, batches, modules, seed=3)
    assert (found.tokens, found.method) == (96, "gradient")
    assert_same(found.values, reference(model, batches, modules, seed=3))
    for name, value in found.values.items():
        assert (value.dtype, value.shape) == (torch.float32, (modules[name].out_features,))
        assert bool((value > 0).all())


@pytest.mark.parametrize("left", [False, True])
def test_padding_gets_no_label(model: LlamaForCausalLM, batches: list, left: bool) -> None:
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :11] = 0
    padded = [batch | {"attention_mask": mask if left else mask.flip(1)} for batch in batches]
    found = output_sensitivity(model, padded, linears(model))
    assert found.tokens == 2 * (16 + 11 + 5)
    if not left:  # what a padded position before the text does to its neighbours is the model's own business
        for batch in padded:
            batch["input_ids"] = batch["input_ids"].where(mask.flip(1).bool(), 0)
        assert_same(output_sensitivity(model, padded, linears(model)).values, found.values)
    assert_same(found.values, reference(model, padded, linears(model)))


def test_every_layer_runs_again_and_gives_what_it_gives_without(
    model: LlamaForCausalLM, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {name: 0 for name in linears(model)}

    def count(name: str, module: nn.Module, args: Any) -> None:
        calls[name] += 1

    for name, module in linears(model).items():
        module.register_forward_pre_hook(partial(count, name))
    checkpointed = output_sensitivity(model, batches, linears(model))
    assert {name: times for name, times in calls.items() if times != 4} == {"lm_head": 2}

    calls = dict.fromkeys(calls, 0)
    monkeypatch.setattr(sensitivity, "_is_layer", lambda name: False)
    plain = output_sensitivity(model, batches, linears(model))
    assert set(calls.values()) == {2}
    assert_same(checkpointed.values, plain.values, rtol=1e-6)


def test_works_without_recognisable_layers(batches: list) -> None:
    class Shared(nn.Module):
        """Calls one Linear twice."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 16)
            self.mix = nn.Linear(16, 16)
            self.head = nn.Linear(16, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            hidden = self.mix(self.mix(self.embed(input_ids)).tanh())
            hidden += 1.0  # in place, on an output that is watched
            return SimpleNamespace(logits=self.head(hidden))

    torch.manual_seed(0)
    model = Shared()
    found = output_sensitivity(model, batches, {"mix": model.mix})
    assert_same(found.values, reference(model, batches, {"mix": model.mix}))
    once = output_sensitivity(model, batches, {"mix": model.mix}, method="forward").values["mix"].mean()
    assert float(once) > 0


def test_a_module_deep_in_the_model_alone(model: LlamaForCausalLM, batches: list) -> None:
    name = "model.layers.1.mlp.up_proj"
    alone = output_sensitivity(model, batches, {name: linears(model)[name]})
    assert_same(alone.values, {name: output_sensitivity(model, batches, linears(model)).values[name]}, rtol=1e-6)
    assert output_sensitivity(model, batches, {}).values == {}


def test_seed_and_repetition(model: LlamaForCausalLM, batches: list) -> None:
    first = output_sensitivity(model, batches, linears(model), seed=1)
    torch.manual_seed(99)  # the global generator has no part in it
    again = output_sensitivity(model, batches, linears(model), seed=1)
    other = output_sensitivity(model, batches, linears(model), seed=2)
    for name, value in first.values.items():
        assert torch.equal(value, again.values[name])
        assert not torch.equal(value, other.values[name])


def test_labels_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3, 0.0]]).expand(20000, -1)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    labels = sensitivity._sample(probabilities, uniforms)
    assert labels[:2].tolist() == [1, 4]
    shares = labels.bincount(minlength=6) / 20000
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.02)
    assert shares[[0, 3, 5]].tolist() == [0, 0, 0]


def test_slices_of_a_large_vocabulary_make_no_difference(
    model: LlamaForCausalLM, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {method: output_sensitivity(model, batches, linears(model), method=method) for method in METHODS}
    monkeypatch.setattr(sensitivity, "_SLICE_VALUES", 5 * VOCABULARY)
    for method, found in whole.items():
        sliced = output_sensitivity(model, batches, linears(model), method=method)
        assert_same(sliced.values, found.values, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 16), (16, 16), (17, 32), (48, 48), (49, 64), (10**6, 96)])
def test_takes_whole_rows_until_there_are_enough_tokens(
    model: LlamaForCausalLM, batches: list, tokens: int, expected: int
) -> None:
    modules = {"lm_head": model.lm_head}
    for method in METHODS:
        assert output_sensitivity(model, iter(batches), modules, tokens=tokens, method=method).tokens == expected


def test_reads_no_more_batches_than_it_needs(model: LlamaForCausalLM, batches: list) -> None:
    left = iter(batches)
    output_sensitivity(model, left, {"lm_head": model.lm_head}, tokens=48)
    assert len(list(left)) == 1


def test_keeps_a_batch_whole_if_a_tensor_has_no_rows(model: LlamaForCausalLM, batches: list) -> None:
    shared = [batch | {"position_ids": torch.arange(16)[None]} for batch in batches]
    assert output_sensitivity(model, shared, {"lm_head": model.lm_head}, tokens=1).tokens == 48


def test_ignores_labels_of_the_batch(model: LlamaForCausalLM, batches: list) -> None:
    labelled = [batch | {"labels": batch["input_ids"]} for batch in batches]
    found = output_sensitivity(model, labelled, linears(model))
    assert_same(found.values, output_sensitivity(model, batches, linears(model)).values, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_sixteen_bits(
    model: LlamaForCausalLM, batches: list, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[Tensor] = []
    sample = sensitivity._sample
    monkeypatch.setattr(sensitivity, "_sample", lambda *args: labels.append(sample(*args)) or labels[-1])
    expected = output_sensitivity(model, batches, linears(model)).values
    # rounding moves a few labels, and of so few positions one can be most of the sum
    monkeypatch.setattr(sensitivity, "_sample", lambda *args: labels.pop(0))
    model.to(dtype)
    found = output_sensitivity(model, batches, linears(model)).values
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert float(found[name].mean() / value.mean()) == pytest.approx(1.0, abs=tolerance), name


def test_float16_that_overflows_is_scaled_down(
    model: LlamaForCausalLM, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(torch.float16)
    expected = output_sensitivity(model, batches, linears(model)).values
    monkeypatch.setattr(sensitivity, "_HALF_SCALE", 2.0**20)
    assert_same(output_sensitivity(model, batches, linears(model)).values, expected, rtol=0.02)
    monkeypatch.setattr(sensitivity, "_HALF_SCALE_LEAST", 2.0**19)
    with pytest.raises(SRDError, match="NaN or infinite"):
        output_sensitivity(model, batches, linears(model))


# --- mixtures of experts


class LinearExperts(nn.ModuleList):
    """Experts as separate Linears, the way llm-compressor takes a mixture apart."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            row, choice = torch.where(top_k_index == index)
            result.index_add_(0, row, expert(hidden[row]) * top_k_weights[row, choice, None])
        return result


@pytest.fixture
def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp.experts = LinearExperts(
            nn.Sequential(nn.Linear(32, 48, bias=False), nn.SiLU(), nn.Linear(48, 32, bias=False)) for _ in range(4)
        )
    return model


def test_experts(mixture: MixtralForCausalLM, batches: list) -> None:
    modules = linears(mixture)
    assert len(modules) == 2 * (4 + 8) + 1
    assert_same(output_sensitivity(mixture, batches, modules).values, reference(mixture, batches, modules))


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_is_never_reached_gets_zeros(mixture: MixtralForCausalLM, batches: list, method: str) -> None:
    for layer in mixture.model.layers:
        experts = layer.mlp.experts
        plain = experts.forward

        def others(hidden: Tensor, index: Tensor, weights: Tensor, plain: Any = plain) -> Tensor:
            return plain(hidden, index.where(index != 3, 0), weights)

        experts.forward = others
    found = output_sensitivity(mixture, batches, linears(mixture), method=method)
    for name, value in found.values.items():
        assert bool(value.any()) == (".experts.3." not in name), name
    outside = {"nowhere": nn.Linear(4, 5)}
    assert output_sensitivity(mixture, batches, outside, method=method).values["nowhere"].tolist() == [0.0] * 5


@pytest.fixture(scope="module")
def routed() -> Any:
    """A mixture whose router uses one expert seldom and one never, taken apart as llm-compressor does."""
    return linearize_moe(make_routed_mixture(vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def tokens() -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCABULARY, (64, 64), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": rows} for rows in ids.split(8)]


@pytest.fixture(scope="module")
def experts(routed: Any) -> dict[str, nn.Linear]:
    """Those of the last layer: an error before it also moves tokens to other experts, which no derivative sees."""
    return {name: module for name, module in linears(routed).items() if "layers.1.mlp.experts" in name}


@pytest.fixture(scope="module")
def shown_to_all(routed: Any, tokens: list, experts: dict) -> dict[str, Tensor]:
    """The second moment of the inputs that calibration shows an expert: those of all tokens."""
    with moe_calibration_context():
        return {name: second_moment(routed, tokens, module) for name, module in experts.items()}


@pytest.fixture(scope="module")
def caused(routed: Any, tokens: list, experts: dict) -> dict[str, tuple[Tensor, float]]:
    """A random error in each expert's weights, and the divergence that was measured with it."""
    before, found = log_probabilities(routed, tokens).double(), {}
    for name, module in experts.items():
        weight = module.weight.detach().clone()
        error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * 0.05
        divergences = []
        for signed in (error, -error):
            module.weight.data = weight + signed
            after = log_probabilities(routed, tokens).double()
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
        module.weight.data = weight
        found[name] = error, sum(divergences) / 2
    return found


@pytest.mark.parametrize("method", METHODS)
def test_damage_of_an_expert_is_by_how_often_it_is_used(
    routed: Any, tokens: list, experts: dict, shown_to_all: dict, caused: dict, method: str
) -> None:
    with moe_calibration_context():
        values = output_sensitivity(routed, tokens, experts, method=method).values
    predicted = {
        name: float((((error @ shown_to_all[name]) * error).sum(1) * values[name]).sum() / 2)
        for name, (error, _) in caused.items()
    }
    within = {"gradient": 1.4, "forward": 2.0}[method]  # of the seldom used one, "forward" sees 40 tokens
    total = {number: [0.0, 0.0] for number in range(6)}
    for name, (_, divergence) in caused.items():
        number = int(name.split(".experts.")[1][0])
        total[number][0] += predicted[name]
        total[number][1] += divergence
        if number < 5:
            assert 1 / within < predicted[name] / divergence < within, name
    assert total[4][1] < 0.1 * total[0][1]  # seldom used
    assert total[5] == [0.0, 0.0]  # never used


@pytest.mark.parametrize("method", METHODS)
def test_what_calibration_shows_experts_changes_only_what_their_inputs_are_counted_by(
    routed: Any, tokens: list, experts: dict, shown_to_all: dict, method: str
) -> None:
    few = tokens[:2]
    some = {name: module for name, module in experts.items() if name.endswith(("1.down_proj", "4.down_proj"))}
    plain = output_sensitivity(routed, few, some, method=method).values
    with moe_calibration_context():
        shown = output_sensitivity(routed, few, some, method=method).values
        assert get_calibrate_all_experts_flag()
        everything = {name: second_moment(routed, few, module) for name, module in some.items()}
    for name, module in some.items():
        gain = float(second_moment(routed, few, module).trace() / everything[name].trace())
        assert gain > 1.1  # experts answer louder to the tokens that they get
        torch.testing.assert_close(shown[name], plain[name] * gain)


# --- the forward method


def test_forward_gives_one_number_per_module_near_the_mean(model: LlamaForCausalLM) -> None:
    many = [{"input_ids": torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(5))}] * 2
    exact = output_sensitivity(model, many, linears(model))
    found = output_sensitivity(model, many, linears(model), method="forward")
    assert (found.tokens, found.method) == (1024, "forward")
    for name, value in found.values.items():
        assert value.shape == exact.values[name].shape
        assert bool((value == value[0]).all())
        assert 0.5 < float(value[0] / exact.values[name].mean()) < 2.0, name


def test_forward_takes_fewer_tokens(model: LlamaForCausalLM, batches: list) -> None:
    found = output_sensitivity(model, batches * 20, {"lm_head": model.lm_head}, method="forward")
    assert found.tokens == 1024


def test_forward_is_the_same_each_time_and_for_each_choice_of_modules(model: LlamaForCausalLM, batches: list) -> None:
    all_of_them = output_sensitivity(model, batches, linears(model), method="forward")
    name = "model.layers.1.self_attn.v_proj"
    alone = output_sensitivity(model, batches, {name: linears(model)[name]}, method="forward")
    assert torch.equal(alone.values[name], all_of_them.values[name])
    other = output_sensitivity(model, batches, {name: linears(model)[name]}, method="forward", seed=1)
    assert not torch.equal(other.values[name], alone.values[name])


def test_forward_counts_what_rounding_hides_as_zero(model: LlamaForCausalLM, batches: list) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    name = "model.layers.0.mlp.up_proj"
    found = output_sensitivity(model, batches, {name: linears(model)[name]}, method="forward")
    assert not bool(found.values[name].any())


def test_forward_refuses_a_broken_model(model: LlamaForCausalLM, batches: list) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for method in METHODS:
        with pytest.raises(SRDError, match="NaN or infinite"):
            output_sensitivity(model, batches, linears(model), method=method)


# --- the trained model


@pytest.fixture(scope="module")
def trained(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> list[dict[str, Tensor]]:
    """4096 tokens of the demo text in batches of 4 rows of 128."""
    words = (REPOSITORY / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(words, verbose=False)["input_ids"][:4096]
    return [{"input_ids": rows} for rows in torch.tensor(ids).view(-1, 4, 128)]


@pytest.fixture(scope="module")
def measured(trained: Any, text: list) -> OutputSensitivity:
    modules = {name: module for name, module in linears(trained).items() if name != "lm_head"}
    return output_sensitivity(trained, text, modules)


@torch.no_grad()
def log_probabilities(model: Any, text: list) -> Tensor:
    return torch.cat([model(**batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1) for batch in text])


@torch.no_grad()
def second_moment(model: Any, text: list, module: nn.Linear) -> Tensor:
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    log_probabilities(model, text)
    handle.remove()
    rows = torch.cat(inputs)
    return rows.T @ rows / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.3.mlp.gate_proj", "model.layers.6.self_attn.o_proj"])
def test_predicts_the_divergence_that_a_changed_weight_causes(
    trained: Any, text: list, measured: OutputSensitivity, name: str
) -> None:
    module = linears(trained)[name]
    weight = module.weight.detach()
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * 0.03
    H = second_moment(trained, text, module)
    predicted = float((((error @ H) * error).sum(1) * measured.values[name]).sum() / 2)
    changed = copy.deepcopy(trained)
    linears(changed)[name].weight.data += error
    before = log_probabilities(trained, text)
    caused = (before.exp() * (before - log_probabilities(changed, text))).sum(-1).mean()
    assert predicted == pytest.approx(float(caused), rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_agrees_with_the_gradients(
    trained: Any, text: list, measured: OutputSensitivity, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(trained).to(dtype)
    names = list(measured.values)[::5]  # there are 7 kinds: all of them, at several depths
    found = output_sensitivity(model, text, {name: linears(model)[name] for name in names}, method="forward")
    means = torch.tensor([measured.values[name].mean() for name in names])
    noise = torch.tensor([found.values[name].mean() for name in names])
    assert float((noise / means).min()) > 0.5
    assert float((noise / means).max()) < 2.0
    assert spearmanr(noise, means).statistic > 0.8


# --- what is left behind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(model: LlamaForCausalLM, batches: list, method: str, fails: bool) -> None:
    model.train()
    model.model.layers[0].self_attn.eval()
    model.model.norm.weight.requires_grad_(False)
    offloaded = model.model.layers[1].forward
    model.model.layers[1].forward = offloaded  # as accelerate and compressed-tensors do

    def state() -> tuple:
        return (
            [(module.training, "forward" in vars(module)) for module in model.modules()],
            [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        )

    modes: set[bool] = set()
    model.model.norm.register_forward_hook(lambda module, args, output: modes.add(module.training))
    before = state()
    bad = [*batches, {"input_ids": torch.full((1, 4), VOCABULARY)}]
    try:
        output_sensitivity(model, bad if fails else batches, linears(model), method=method)
        assert not fails
    except IndexError:
        assert fails
    assert state() == before
    assert model.model.layers[1].forward is offloaded
    assert modes == {False}


def test_works_where_gradients_are_off(model: LlamaForCausalLM, batches: list) -> None:
    expected = output_sensitivity(model, batches, linears(model))
    with torch.no_grad():
        found = output_sensitivity(model, batches, linears(model))
        assert not torch.is_grad_enabled()
    assert (found.method, model.lm_head.weight.requires_grad) == ("gradient", True)
    assert_same(found.values, expected.values, rtol=1e-6)


def test_reports_progress(model: LlamaForCausalLM, batches: list) -> None:
    steps: list[tuple[int, int]] = []
    modules = {name: module for name, module in linears(model).items() if "layers.0.mlp" in name}
    output_sensitivity(model, batches, modules, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    steps.clear()
    output_sensitivity(
        model, batches, modules, method="forward", progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


# --- falling back


class NoDerivative(torch.autograd.Function):
    """An operation as a kernel without a backward pass brings it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()


@pytest.mark.parametrize("out_of_memory", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None])
def test_falls_back_to_noise_without_backward(
    model: LlamaForCausalLM,
    batches: list,
    out_of_memory: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if out_of_memory is not None:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise out_of_memory

        monkeypatch.setattr(Tensor, "backward", fail)
    else:
        model.model.norm.register_forward_hook(lambda module, args, output: NoDerivative.apply(output))
    modules = {name: module for name, module in linears(model).items() if "layers.0" in name}
    with caplog.at_level(logging.WARNING, logger=sensitivity.__name__):
        found = output_sensitivity(model, iter(batches), modules)
    assert found.method == "forward"
    assert found.tokens == 96
    assert len(caplog.records) == 1
    assert "no gradients of the model" in caplog.text
    with pytest.raises(RuntimeError):
        output_sensitivity(model, batches, modules, method="gradient")


def test_falls_back_where_the_model_cuts_its_gradient(model: LlamaForCausalLM, batches: list) -> None:
    modules = {name: module for name, module in linears(model).items() if "layers.0" in name}
    model.model.norm.register_forward_hook(lambda module, args, output: output.detach())
    assert output_sensitivity(model, batches, modules).method == "forward"


def test_other_errors_are_not_taken_for_missing_memory(
    model: LlamaForCausalLM, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(Tensor, "backward", fail)
    with pytest.raises(RuntimeError, match="must match"):
        output_sensitivity(model, batches, linears(model))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("the derivative for 'indices' is not implemented."), True),
        (RuntimeError("Trying to backward through srd::op.default but no autograd formula was registered."), True),
        (NotImplementedError("You must implement either the backward or vjp method"), True),
        (RuntimeError("Trying to backward through the graph a second time"), False),
        (RuntimeError("expected scalar type Float but found BFloat16"), False),
    ],
)
def test_which_errors_say_that_there_is_no_gradient(error: RuntimeError, expected: bool) -> None:
    assert sensitivity._cannot_differentiate(error) is expected


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "backward"}, r"method is 'backward', expected one of \['auto', 'gradient', 'forward'\]"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
    ],
)
def test_refuses_settings(model: LlamaForCausalLM, batches: list, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        output_sensitivity(model, batches, linears(model), **settings)


def test_refuses_batches_without_tokens(model: LlamaForCausalLM, batches: list) -> None:
    with pytest.raises(SRDError, match="there are none"):
        output_sensitivity(model, [], linears(model))
    with pytest.raises(SRDError, match=r"batch 2 .* has no input_ids, only \['attention_mask'\]"):
        output_sensitivity(model, [batches[0], {"attention_mask": torch.ones(1, 4)}], linears(model))
    with pytest.raises(SRDError, match="leaves no position"):
        output_sensitivity(model, [batches[0] | {"attention_mask": torch.zeros(3, 16)}], linears(model))


def test_refuses_a_model_that_gives_logits_of_some_positions_only(model: LlamaForCausalLM, batches: list) -> None:
    short = [batch | {"logits_to_keep": 1} for batch in batches]
    with pytest.raises(SRDError, match="logits of every token"):
        output_sensitivity(model, short, linears(model))
