import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from srd_modifier import SRDModifier
from srd_modifier.errors import SRDError

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def names(layers: Any = range(6), linears: Any = LINEARS) -> list[str]:
    return [f"model.layers.{layer}.{linear}" for layer in layers for linear in linears]


def srd_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["srd_config"]


def scheme(group_size: int = 32, targets: str = "Linear", **weights: Any) -> dict[str, Any]:
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {"group_0": {"targets": [targets], "weights": arguments | weights}}


def srd(**settings: Any) -> SRDModifier:
    return SRDModifier(**{"ignore": ["lm_head"], **settings})


def gptq(**settings: Any) -> GPTQModifier:
    return GPTQModifier(**{"config_groups": scheme(), "ignore": ["lm_head"], **settings})


def rtn(**settings: Any) -> QuantizationModifier:
    return QuantizationModifier(**{"config_groups": scheme(), "ignore": ["lm_head"], **settings})


# --- which modules are corrected


@pytest.mark.parametrize(
    ("correct", "expected"),
    [
        ("all", names()),
        ({"depth": [0.40, 0.77]}, names([3, 4])),
        ({"depth": [0.0, 1.0]}, names()),
        ({"depth": [0.9, 1.0]}, []),
        ({"chunks": ["early"]}, names([0, 1])),
        ({"chunks": ["factual"]}, names([2])),
        ({"chunks": ["reasoning"]}, names([3, 4])),
        ({"chunks": ["governance"]}, names([5])),
        ({"chunks": ["governance", "early"]}, names([0, 1, 5])),
        ({"targets": ["re:.*down_proj"]}, names(linears=["mlp.down_proj"])),
        ({"targets": ["re:.*layers.5", "model.layers.0.mlp.up_proj"]}, ["model.layers.0.mlp.up_proj", *names([5])]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["itself", "round-to-nearest"])
def test_correct_chooses_the_modules(kind, correct, expected, quantize, make_recipe, read, tmp_path):
    if not expected:  # 6 layers have none at this depth
        with pytest.raises(SRDError, match=r"correct\.depth \[0\.9, 1\.0\] takes none of the quantized modules"):
            quantize(make_recipe(kind, correct=correct), tmp_path / "srd")
        return
    output = quantize(make_recipe(kind, correct=correct), tmp_path / "srd")
    assert srd_config(output)["modules"] == expected
    assert {name for name in read(output / "srd") if name.endswith(".weight_d8")} == {
        f"{n}.weight_d8" for n in expected
    }
    # what is not corrected is quantized all the same
    assert {name for name in read(output) if name.endswith(".weight_packed")} == {f"{n}.weight_packed" for n in names()}


def test_targets_and_ignore_narrow_what_the_quantizer_takes(quantize, log, tmp_path):
    recipe = [srd(targets=["re:.*mlp", "re:.*q_proj"], ignore=["lm_head", "re:.*layers.1"]), rtn()]
    output = quantize(recipe, tmp_path / "srd")
    linears = [LINEARS[0], *LINEARS[4:]]
    assert srd_config(output)["modules"] == names([0, 2, 3, 4, 5], linears)
    (warning,) = [message for message in log if "plain W4" in message]
    assert warning == (
        "SRD leaves 22 quantized modules as plain W4 (targets, ignore): model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, model.layers.0.self_attn.o_proj, model.layers.1.self_attn.q_proj, "
        "model.layers.1.self_attn.k_proj and 17 more"
    )


def test_what_the_quantizer_ignores_is_not_corrected(quantize, log, tmp_path):
    output = quantize([srd(), rtn(ignore=["lm_head", "re:.*layers.[1-5]"])], tmp_path / "srd")
    assert srd_config(output)["modules"] == names([0])
    assert not [message for message in log if "plain W4" in message]  # not quantized, so not plain W4 either
    assert "SRD keeps the residual of 7 of 7 quantized modules" in log


def test_a_few_modules_are_all_named(quantize, log, tmp_path):
    quantize([srd(ignore=["lm_head", "re:.*layers.2.mlp"]), rtn()], tmp_path / "srd")
    expected = ", ".join(names([2], LINEARS[4:]))
    assert f"SRD leaves 3 quantized modules as plain W4 (targets, ignore): {expected}" in log


@pytest.mark.parametrize("kind", ["itself", "round-to-nearest", "gptq"])
def test_the_output_head_is_quantized_if_asked_but_never_corrected(kind, quantize, log, read, tmp_path):
    own = {"config_groups": scheme()} if kind == "itself" else {}
    others = {"itself": [], "round-to-nearest": [rtn(ignore=[])], "gptq": [gptq(ignore=[])]}[kind]
    output = quantize([SRDModifier(**own), *others], tmp_path / "srd", data=True)
    assert "lm_head.weight_packed" in read(output)
    assert srd_config(output)["modules"] == names()
    assert any("output head" in message and "lm_head" in message for message in log)


def test_embeddings_are_quantized_if_asked_but_never_corrected(quantize, log, read, tmp_path):
    scheme_of_both = scheme()
    scheme_of_both["group_0"]["targets"] = ["Linear", "Embedding"]
    output = quantize([SRDModifier(), rtn(config_groups=scheme_of_both)], tmp_path / "srd")
    assert "model.embed_tokens.weight_packed" in read(output)
    assert srd_config(output)["modules"] == names()
    assert any("embeddings" in message and "model.embed_tokens" in message for message in log)


def test_patterns_that_match_containers_too_are_no_reason_to_warn(quantize, log, tmp_path):
    output = quantize(srd(config_groups=scheme(targets="re:.*mlp")), tmp_path / "srd")
    assert srd_config(output)["modules"] == names(linears=LINEARS[4:])
    assert not [message for message in log if "output head" in message]


def test_settings_reach_srd_config(quantize, make_recipe, tmp_path):
    settings = {
        "alpha": 0.75,
        "layer_alphas": {"model.layers.0.mlp.up_proj": 0.0, "re:.*q_proj": 0.5},
        "residual_bits": 3,
        "residual_group_size": 16,
        "rounding": "stochastic",
        "density": 0.5,
        "scale_dtype": "float32",
        "seed": 7,
    }
    config = srd_config(quantize(make_recipe("itself", **settings), tmp_path / "srd"))
    assert {name: config[name] for name in ("alpha", "layer_alphas", "rounding", "density", "scale_dtype", "seed")} == {
        name: settings[name] for name in ("alpha", "layer_alphas", "rounding", "density", "scale_dtype", "seed")
    }
    assert (config["bits"], config["group_size"]) == (3, 16)
    assert (config["version"], config["sidecar"]) == (2, "srd/residual.safetensors.index.json")


# --- several SRDModifiers in one recipe


@pytest.fixture(params=["itself", "same-scheme", "gptq"])
def several(request) -> Callable[..., list[Modifier]]:
    """A recipe of two SRDModifiers, for the attention and for the rest, that quantize themselves or not."""

    def make(attention: dict[str, Any], rest: dict[str, Any]) -> list[Modifier]:
        if request.param == "gptq":
            return [srd(targets=["re:.*self_attn"], **attention), srd(targets=["re:.*mlp"], **rest), gptq()]
        if request.param == "same-scheme":
            return [
                srd(config_groups=scheme(), correct={"targets": ["re:.*self_attn"]}, **attention),
                srd(config_groups=scheme(), correct={"targets": ["re:.*mlp"]}, **rest),
            ]
        return [
            srd(config_groups=scheme(targets="re:.*self_attn"), **attention),
            srd(config_groups=scheme(targets="re:.*mlp"), **rest),
        ]

    return make


def shard_records(directory: Path) -> dict[str, Any]:
    path = directory / "srd" / "residual-00001-of-00001.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["srd"])["modules"]


def test_several_modifiers_share_one_sidecar(several, quantize, read, tmp_path):
    recipe = several({"residual_bits": 8}, {"residual_bits": 4, "residual_group_size": 32, "rounding": "dithered"})
    output = quantize(recipe, tmp_path / "srd", data=True)
    default = {
        "bits": 8,
        "group_size": 64,
        "rounding": "nearest",
        "density": 1.0,
        "scale_dtype": "bfloat16",
        "seed": 0,
    }
    config = srd_config(output)
    assert {name: config[name] for name in default} == default
    index = json.loads((output / "srd" / "residual.safetensors.index.json").read_text())
    other = default | {"bits": 4, "group_size": 32, "rounding": "dithered"}
    mlp = names(linears=LINEARS[4:])
    assert index["metadata"]["formats"] == dict.fromkeys(mlp, other)
    records = shard_records(output)
    assert {name: record["format"] for name, record in records.items()} == {
        name: other if name in mlp else default for name in names()
    }
    tensors = read(output / "srd")
    assert tensors["model.layers.0.self_attn.q_proj.weight_d8"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.up_proj.weight_d8"].shape == (128, 32)  # two codes a byte
    assert tensors["model.layers.0.mlp.up_proj.weight_d8_scale"].shape == (128, 2)


def test_srd_config_lists_the_modules_in_the_models_order(several, quantize, tmp_path):
    config = srd_config(quantize(several({}, {}), tmp_path / "srd", data=True))
    assert config["modules"] == names()


@pytest.mark.parametrize(
    ("attention", "rest"),
    [
        ({"alpha": 0.5}, {"alpha": 0.5}),
        ({"alpha": 0.5}, {"alpha": 1.0}),
        ({"layer_alphas": {"re:.*": 0.25}}, {"alpha": 1.0}),
        ({"layer_alphas": {"re:.*": 0.25}}, {"alpha": 0.75}),
        ({"layer_alphas": {"re:.*layers.3": 0.25}}, {"layer_alphas": {"re:.*up_proj": 0.0}}),
    ],
    ids=str,
)
def test_each_modifier_keeps_its_own_alphas(several, attention, rest, quantize, tmp_path):
    from srd_modifier.checkpoint.config import module_alphas, read_srd_config
    from srd_modifier.selection.patterns import pattern_value

    output = quantize(several(attention, rest), tmp_path / "srd", data=True)
    found = module_alphas(read_srd_config(output), 6)
    for name in names():
        own = attention if "self_attn" in name else rest
        assert found[name] == pattern_value(name, own.get("layer_alphas", {}), own.get("alpha", 1.0)), name


# --- what is refused, before anything runs


@dataclass(frozen=True)
class Fault:
    """A recipe that cannot work, and what is said about it."""

    name: str
    recipe: Callable[[], list[Modifier]]
    message: str


FIRST = r"model\.layers\.0\.self_attn\.q_proj"
FAULTS = [
    Fault("after-gptq", lambda: [gptq(), srd()], "SRDModifier stands after GPTQModifier in the recipe"),
    Fault("after-round-to-nearest", lambda: [rtn(), srd()], "SRDModifier stands after QuantizationModifier"),
    Fault(
        "between-two",
        lambda: [rtn(targets=["re:.*mlp"]), srd(), gptq()],
        "SRDModifier stands after QuantizationModifier",
    ),
    Fault(
        "no-quantizer",
        lambda: [srd()],
        "neither a scheme nor config_groups and no quantizer stands after it in the recipe; give it scheme: W4A16",
    ),
    Fault("only-another-srd", lambda: [srd(), srd(config_groups=scheme())], "no quantizer stands after it"),
    Fault("two-srd", lambda: [srd(), srd(), gptq()], f"two SRDModifiers correct {FIRST}"),
    Fault(
        "two-srd-that-quantize",
        lambda: [srd(config_groups=scheme()), srd(config_groups=scheme())],
        f"two SRDModifiers correct {FIRST}|{FIRST} is quantized twice",
    ),
    Fault(
        "two-quantizers",
        lambda: [srd(), gptq(), rtn()],
        f"{FIRST} is quantized twice, by GPTQModifier and QuantizationModifier; keep one",
    ),
    Fault(
        "itself-and-gptq",
        lambda: [srd(config_groups=scheme()), gptq()],
        f"{FIRST} is quantized twice, by SRDModifier and GPTQModifier; keep one",
    ),
    Fault(
        "itself-and-round-to-nearest",
        lambda: [srd(config_groups=scheme()), rtn()],
        f"{FIRST} is quantized twice, by SRDModifier and QuantizationModifier; keep one",
    ),
    Fault(
        "gptq-and-itself",
        lambda: [gptq(), srd(config_groups=scheme())],
        f"SRDModifier stands after GPTQModifier|{FIRST} is quantized twice",
    ),
    Fault("w8a16", lambda: [srd(scheme="W8A16")], f"SRDModifier gives {FIRST} 8-bit int weights, expected 4-bit int"),
    Fault("w8a16-gptq", lambda: [srd(), gptq(config_groups=None, scheme="W8A16")], f"GPTQModifier gives {FIRST} 8-bit"),
    Fault("w4a8", lambda: [srd(scheme="W4A8")], f"SRDModifier gives {FIRST} quantized activations"),
    Fault("w4afp8", lambda: [srd(scheme="W4AFP8")], f"SRDModifier gives {FIRST} quantized activations"),
    Fault("fp8", lambda: [srd(scheme="FP8_DYNAMIC")], "SRDModifier gives .*, expected 4-bit int"),
    Fault("nvfp4", lambda: [srd(scheme="NVFP4A16")], f"SRDModifier gives {FIRST} 4-bit float weights"),
    Fault(
        "tensor-strategy",
        lambda: [srd(config_groups=scheme(strategy="tensor", group_size=None))],
        f"SRDModifier gives {FIRST} tensor scales, expected group or channel",
    ),
    Fault(
        "one-group-of-two-is-8-bit",
        lambda: [
            srd(
                config_groups={
                    "a": scheme(targets="re:.*self_attn")["group_0"],
                    "b": scheme(targets="re:.*mlp", num_bits=8)["group_0"],
                }
            )
        ],
        r"SRDModifier gives model\.layers\.0\.mlp\.gate_proj 8-bit int weights",
    ),
    Fault("targets-match-nothing", lambda: [srd(targets=["re:.*nowhere"]), gptq()], "no module is left to correct"),
    Fault("ignore-takes-all", lambda: [srd(ignore=["re:.*"]), gptq()], "no module is left to correct"),
    Fault(
        "quantizer-takes-nothing",
        lambda: [srd(), gptq(config_groups=scheme(targets="re:.*nowhere"))],
        "no module is left to correct: the recipe quantizes 0 Linear modules",
    ),
    Fault(
        "scheme-takes-nothing",
        lambda: [srd(config_groups=scheme(targets="re:.*nowhere"))],
        "no module is left to correct: the recipe quantizes 0 Linear modules",
    ),
    Fault(
        "correct-targets-match-nothing",
        lambda: [srd(correct={"targets": ["re:.*down_proj", "re:.*nowhere"]}), gptq()],
        r"correct\.targets: 're:\.\*nowhere' matches no quantized module",
    ),
    Fault(
        "correct-targets-no-regex",
        lambda: [srd(correct={"targets": ["re:("]}), gptq()],
        r"the pattern 're:\(' is not a regular expression",
    ),
    Fault(
        "layer-alphas-no-regex",
        lambda: [srd(layer_alphas={"re:(": 0.5}), gptq()],
        r"the pattern 're:\(' is not a regular expression",
    ),
    Fault("group-size", lambda: [srd(), gptq(config_groups=scheme(48))], f"{FIRST}.*48"),
    Fault("group-size-itself", lambda: [srd(config_groups=scheme(48))], f"{FIRST}.*48"),
    Fault(
        "group-size-unchecked-upstream",
        lambda: [srd(config_groups=scheme(48), bypass_divisibility_checks=True)],
        f"{FIRST}.*48",
    ),
    Fault("spool-dir", lambda: [srd(spool_dir="/nowhere/at/all"), gptq()], "/nowhere/at/all"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=attrgetter("name"))
def test_a_recipe_that_cannot_work_is_refused_before_calibration(fault, quantize, forwards, tmp_path):
    with pytest.raises((SRDError, ValueError), match=f"(?s){fault.message}") as refused:
        quantize(fault.recipe(), tmp_path / "srd", data=True)
    assert isinstance(refused.value, SRDError), "a command prints only these without a traceback"
    assert "\n" not in str(refused.value)
    assert not forwards
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", ["itself", "gptq"])
def test_weights_that_are_not_finite_are_refused(kind, value, random_llama, quantize, make_recipe, forwards, tmp_path):
    damaged = Path(shutil.copytree(random_llama, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.4.mlp.down_proj.weight"][5, 7] = value
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SRDError, match=r"^model\.layers\.4\.mlp\.down_proj\.weight has NaN or infinite entries"):
        quantize(make_recipe(kind), tmp_path / "srd", model=damaged, data=True)
    assert not forwards
    assert not (tmp_path / "srd").exists()


def test_a_damaged_weight_that_is_not_corrected_is_not_ours_to_refuse(
    random_llama, quantize, make_recipe, read, tmp_path
):
    damaged = Path(shutil.copytree(random_llama, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"][5, 7] = float("inf")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    output = quantize(make_recipe("itself"), tmp_path / "srd", model=damaged)
    assert read(output)["lm_head.weight"][5, 7] == float("inf")


SETTINGS = [
    ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
    ({"alpha": -0.1}, "alpha is -0.1, expected a number from 0 to 1"),
    ({"alpha": float("nan")}, "alpha is nan, expected a number from 0 to 1"),
    ({"layer_alphas": {"re:.*q_proj": 2.0}}, r"layer_alphas\['re:\.\*q_proj'\] is 2.0, expected a number from 0 to 1"),
    ({"residual_bits": 7}, r"bits is 7, expected one of \(8, 6, 5, 4, 3, 2, 1\)"),
    ({"residual_bits": 0}, "bits is 0, expected"),
    ({"residual_group_size": 4}, "group_size is 4, expected 8 or more columns"),
    ({"residual_group_size": 0}, "group_size is 0, expected"),
    ({"rounding": "up"}, "rounding is 'up', expected one of"),
    ({"density": 0.0}, "density is 0.0, expected above 0 and at most 1"),
    ({"density": 1.1}, "density is 1.1, expected"),
    ({"scale_dtype": "float16"}, "scale_dtype is 'float16', expected one of"),
    ({"seed": -1}, "seed is -1, expected a whole number"),
    ({"seed": 2**63}, "seed is 9223372036854775808, expected a whole number|less than or equal to"),
    ({"correct": "most"}, "correct is 'most', expected 'all' or one of"),
    ({"correct": None}, "correct is None, expected 'all' or one of"),
    ({"correct": {"depth": [0.7, 0.4]}}, r"correct\.depth is \[0\.7, 0\.4\], expected \[start, end\]"),
    ({"correct": {"depth": 0.5}}, r"correct\.depth is 0\.5, expected a list"),
    ({"correct": {"chunks": ["late"]}}, "chunk 'late' is unknown, expected some of"),
    ({"correct": {"targets": "re:.*q_proj"}}, r"correct\.targets is 're:\.\*q_proj', expected a list"),
    ({"correct": {"chunks": ["early"], "depth": [0, 1]}}, "correct is .*, expected 'all' or one of"),
    ({"scheme": "W4A16", "base_rounding": "up"}, r"base_rounding is 'up', expected one of \('nearest', 'feedback'\)"),
    (
        {"base_rounding": "feedback"},
        "base_rounding is set, but the quantizer that follows SRDModifier rounds; give SRD",
    ),
    ({"balance": 1.5}, r"balance is 1\.5, expected a number from 0 \(best W4\) to 1 \(best with the residual\)"),
    ({"balance": -0.1}, r"balance is -0\.1, expected a number from 0"),
    ({"balance": float("nan")}, "balance is nan, expected a number from 0"),
    ({"sensitivity": "much"}, r"sensitivity is 'much', expected one of \('off', 'auto', 'gradient', 'forward'\)"),
    ({"sensitivity_tokens": 0}, "sensitivity_tokens is 0, expected a whole number above 0"),
    ({"sensitivity_tokens": -5}, "sensitivity_tokens is -5, expected a whole number above 0"),
    ({"sensitivity_tokens": 1.5}, r"sensitivity_tokens\s+Input should be a valid integer"),
    (
        {"candidates": [{"bits": 4}]},
        "candidates are what a budget chooses from; set correct to a budget, or leave them",
    ),
    ({"correct": {"budget": "5bpw"}, "candidates": []}, "candidates is empty, expected at least one format"),
    (
        {"correct": {"budget": "5bpw"}, "residual_bits": 4},
        "residual_bits is 4, but a budget chooses it; set candidates",
    ),
    ({"correct": {"budget": "5bpw"}, "density": 0.5}, r"density is 0\.5, but a budget chooses it"),
    ({"correct": {"budget": "5bpw"}, "rounding": "dithered"}, "rounding is 'dithered', but a budget takes feedback"),
    (
        {"correct": {"budget": "5bpw"}, "candidates": [{"bits": 4}, {"bit": 4}]},
        r"candidates\[1\] has 'bit', expected only \('bits', 'group_size', 'density', 'scale_dtype'\)",
    ),
    (
        {"correct": {"budget": "5bpw"}, "candidates": [{"rounding": "nearest"}]},
        r"candidates\[0\] has 'rounding', expec",
    ),
    ({"correct": {"budget": "5bpw"}, "candidates": [{"bits": 7}]}, r"candidates\[0\]\.bits is 7, expected one of"),
    ({"correct": {"budget": "5bpw"}, "candidates": [4]}, r"candidates\.0\s+Input should be a valid dictionary"),
    ({"correct": {"budget": "5bpw"}, "sensitivity": "off"}, "sensitivity is 'off', but a budget is spent by it; leave"),
    ({"correct": {"max_divergence": 1e-3}, "sensitivity": "off"}, "sensitivity is 'off', but a budget is spent by it"),
    ({"correct": {"budget": "5.5"}}, r"correct\.budget is '5\.5', expected a size such as 13MB"),
    ({"correct": {"budget": 5.5}}, r"correct\.budget is 5\.5, expected a size such as 13MB"),
    ({"correct": {"budget": 0}}, r"correct\.budget is 0, expected a size such as 13MB"),
    ({"correct": {"budget": "lots"}}, r"correct\.budget is 'lots', expected a size such as 13MB"),
    ({"correct": {"max_divergence": 0}}, r"correct\.max_divergence is 0, expected a number above 0 such as 1e-3"),
    ({"correct": {"max_divergence": "small"}}, r"correct\.max_divergence is 'small', expected a number above 0"),
    ({"correct": {"budget": "5bpw", "max_divergence": 1}}, "correct is .*, expected 'all' or one of .*{budget: ...}"),
    ({"residual_bit": 4}, r"residual_bit\s+Extra inputs are not permitted"),
    ({"alpha": "much"}, "alpha\n  Input should be a valid number"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_a_setting_out_of_range_is_a_validation_error_of_the_recipe(settings, message):
    with pytest.raises(ValidationError, match=message):
        SRDModifier(**settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("residual_bits: 7", "bits is 7, expected one of"),
        ("residual_bit: 4", "Extra inputs are not permitted"),
        ("correct: {chunks: [late]}", "chunk 'late' is unknown"),
        ("base_rounding: up", "base_rounding is 'up', expected one of"),
        ("sensitivity_tokens: 0", "sensitivity_tokens is 0, expected"),
        ("correct: {budget: 5.5}", r"correct\.budget is 5\.5, expected a size such as"),
        ("correct: {budget: 5bpw}, candidates: []", "candidates is empty"),
        ("correct: {max_divergence: 1e-3}, sensitivity: 'off'", "sensitivity is 'off', but a budget is spent by it"),
        ("correct: {max_divergence: 1e-3}, sensitivity: off", "sensitivity is 'off', but a budget is spent by it"),
    ],
)
def test_yaml_settings_are_checked_in_the_same_way(line, message, quantize, forwards, tmp_path):
    recipe = f"quant_stage:\n  quant_modifiers:\n    SRDModifier: {{scheme: W4A16, {line}}}\n"
    with pytest.raises(ValueError, match=message):
        quantize(recipe, tmp_path / "srd", data=True)
    assert not forwards
    assert list(tmp_path.iterdir()) == []
