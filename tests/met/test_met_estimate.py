import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rtn import write_checkpoint

from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.met import Policy, build_met, estimate_met
from srd_modifier.residual import ResidualFormat


def without_headers(met: dict[str, Any]) -> dict[str, Any]:
    """What an estimate can know."""
    files = {name: size for name, size in met["files"].items() if name in ("base_bytes", "residual_bytes")}
    kept = {name: met[name] for name in ("model", "chunks", "layers", "hydration", "budgets")}
    return kept | {"files": files, "pinned": met["pinned"]["bytes"]}


def config_of(directory: Path, tmp_path: Path, **changes: Any) -> Path:
    """A config.json on its own, with no weights beside it."""
    values = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    return tmp_path / "config.json"


def test_an_estimate_is_marked_as_one(tiny_llama):
    met = estimate_met(tiny_llama)
    assert met["measured"] is False
    assert met["source"] == {
        "kind": "config",
        "files": {},
        "assumed": {
            "bits": 4,
            "group_size": 128,
            "undivided": 0,
            "dtype": "bfloat16",
            "residual": {"bits": 8, "group_size": 64, "density": 1.0, "scale_dtype": "bfloat16"},
        },
    }
    assert met["files"]["header_bytes"] == 0


def test_it_needs_no_weights_and_comes_to_what_is_measured_later(tiny_llama, dense_checkpoint, tmp_path):
    met = estimate_met(config_of(tiny_llama, tmp_path), group_size=64)
    assert without_headers(met) == without_headers(build_met(dense_checkpoint))


def test_it_comes_to_what_llm_compressor_saves(random_llama, finished_checkpoint):
    met = estimate_met(random_llama, group_size=32, residual=ResidualFormat(group_size=32))
    assert without_headers(met) == without_headers(build_met(finished_checkpoint))


def test_a_mixture_comes_to_what_is_measured_later(mixture_with_tokenizer, tmp_path):
    """Transformers stacks the experts of a layer, the quantized model has a module for each."""
    checkpoint = write_checkpoint(mixture_with_tokenizer, tmp_path / "srd", group_size=32)
    met = estimate_met(mixture_with_tokenizer, group_size=32, residual=ResidualFormat(group_size=32))
    assert met["model"]["experts"] == {"count": 4, "active": 2, "active_fraction": 0.5}
    assert met["chunks"]["early"]["expert_residual_bytes"] > 0
    assert without_headers(met) == without_headers(build_met(checkpoint))


def test_a_checkpoint_that_is_quantized_already_is_estimated_as_its_original(tiny_llama, dense_checkpoint):
    assert estimate_met(dense_checkpoint) == estimate_met(tiny_llama)


def test_narrow_residuals_and_none(tiny_llama, tmp_path):
    fmt = ResidualFormat(bits=4, group_size=32, density=0.5, scale_dtype="float32")
    checkpoint = write_checkpoint(tiny_llama, tmp_path / "narrow", fmt=fmt)
    met = estimate_met(tiny_llama, group_size=64, residual=fmt)
    assert without_headers(met) == without_headers(build_met(checkpoint))
    plain = estimate_met(tiny_llama, group_size=64, residual=None)
    assert plain["files"] == {**met["files"], "residual_bytes": 0, "total_bytes": met["files"]["base_bytes"]}
    assert plain["source"]["assumed"]["residual"] is None


def test_weights_that_the_group_does_not_divide_stay_as_they_are(tiny_llama, tmp_path):
    config = config_of(tiny_llama, tmp_path, intermediate_size=520)
    estimates = [estimate_met(config, group_size=size) for size in (8, 64)]  # 520 columns are 65 groups of 8
    assert [met["source"]["assumed"]["undivided"] for met in estimates] == [0, 8]  # down_proj of every layer
    divided, left = (met["chunks"]["governance"] for met in estimates)
    others = (256 + 2 * 128 + 256 + 2 * 520) * 256  # weights of q, k, v, o, gate and up, whose 256 columns both divide
    down = 256 * 520
    assert divided["base_bytes"] - left["base_bytes"] == (
        others * 2 // 8 - others * 2 // 64 + down // 2 + down * 2 // 8 + 16 - down * 2
    )
    assert divided["residual_bytes"] - left["residual_bytes"] == down + 256 * 9 * 2


def test_one_scale_per_row(tiny_llama, tmp_path):
    checkpoint = write_checkpoint(tiny_llama, tmp_path / "rows", group_size=-1)
    met = estimate_met(tiny_llama, group_size=-1)
    assert without_headers(met) == without_headers(build_met(checkpoint))


def test_policy_and_speed_are_taken_over(tiny_llama):
    met = estimate_met(tiny_llama, policy=Policy({"AUDIT": ("early",)}), storage_speed=1e6)
    assert met["hydration"] == {"AUDIT": ["early"]}
    assert met["budgets"]["AUDIT"]["load_seconds"] == pytest.approx(met["budgets"]["AUDIT"]["memory_bytes"] / 1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, r"config\.json: model_type is 'nothing', which this version of Transformers does"),
        ({"model_type": None}, r"config\.json: model_type is None, which this version of Transformers does not know"),
        ({"model_type": ["llama"]}, r"config\.json: model_type is \['llama'\], which this version of Transformers"),
        ({"num_attention_heads": 0}, r"config\.json: Transformers cannot build such a model: "),
        ({"hidden_size": "wide"}, r"config\.json: Transformers cannot build such a model: "),
    ],
)
def test_what_transformers_cannot_build_is_refused_in_one_sentence(changes, message, tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        estimate_met(config_of(tiny_llama, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_model_without_layers(tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json has no decoder layers"):
        estimate_met(config_of(tiny_llama, tmp_path, num_hidden_layers=0))


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        estimate_met(tmp_path)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_size_out_of_range(group_size, tiny_llama):
    with pytest.raises(ConfigError, match=f"group size is {group_size}, expected a number of columns such as 128"):
        estimate_met(tiny_llama, group_size=group_size)


@pytest.mark.parametrize("name", ["architectures", "dtype"])
def test_a_config_that_does_not_name_everything(name, tiny_llama, tmp_path):
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    values = json.loads((directory / "config.json").read_text())
    values.pop(name, None)
    (directory / "config.json").write_text(json.dumps(values))
    assert estimate_met(directory)["chunks"] == estimate_met(tiny_llama)["chunks"]
