import json
import re
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.checkpoint.config import (
    SIDECAR_INDEX,
    VERSION,
    SRDConfig,
    check_alphas,
    module_alphas,
    read_json,
    read_model_config,
    read_srd_config,
)
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.residual import ResidualFormat

LAYERS = 10  # early 0 and 1, factual 2 and 3, reasoning 4 to 7, governance 8 and 9
MODULES = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS))


def make(**changes: Any) -> SRDConfig:
    values: dict[str, Any] = {
        "modules": MODULES,
        "format": ResidualFormat(bits=4, group_size=32, density=0.25, scale_dtype="float32", seed=7),
        "base_digest": "sha256:aa",
        "base_fingerprint": "sha256:bb",
        "alpha": 0.75,
        "layer_alphas": {"re:.*layers[.]0[.]": 0.0, MODULES[3]: 0.5},
    }
    return SRDConfig(**values | changes)


def changed(**changes: Any) -> dict[str, Any]:
    return make().to_dict() | changes


# --- there and back --------------------------------------------------------------------------------------------------


def test_round_trip_through_json() -> None:
    config = make()
    assert SRDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_dictionary_has_what_the_format_promises() -> None:
    assert make().to_dict() == {
        "version": 2,
        "alpha": 0.75,
        "layer_alphas": {"re:.*layers[.]0[.]": 0.0, MODULES[3]: 0.5},
        "bits": 4,
        "group_size": 32,
        "rounding": "nearest",
        "density": 0.25,
        "scale_dtype": "float32",
        "seed": 7,
        "sidecar": "srd/residual.safetensors.index.json",
        "base_digest": "sha256:aa",
        "base_fingerprint": "sha256:bb",
        "modules": list(MODULES),
    }


def test_what_is_not_set_is_full_correction() -> None:
    config = SRDConfig(modules=(), format=ResidualFormat(), base_digest="a", base_fingerprint="b")
    assert (config.alpha, config.layer_alphas, config.sidecar) == (1.0, {}, SIDECAR_INDEX)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 1, 0, "2", None, 1.5])
def test_an_unknown_version_is_refused(version: Any) -> None:
    remedy = "quantize again with this srd-modifier" if version in (0, 1) else "upgrade srd-modifier"
    message = f"srd_config.version is {version!r}, this srd-modifier reads {VERSION}; {remedy}"
    with pytest.raises(ConfigError, match=f"{message}$"):
        SRDConfig.from_dict(changed(version=version))


def test_a_version_that_is_missing_is_refused() -> None:
    values = make().to_dict()
    del values["version"]
    with pytest.raises(ConfigError, match=r"srd_config.version is None.*upgrade srd-modifier"):
        SRDConfig.from_dict(values)


@pytest.mark.parametrize("field", sorted(set(make().to_dict()) - {"version"}))
def test_a_field_that_is_missing_is_refused(field: str) -> None:
    """A default in its place would be another checkpoint: alpha 1 for 0.5, seed 0 for 7."""
    values = make().to_dict()
    del values[field]
    with pytest.raises(ConfigError, match=f"srd_config.{field} is missing"):
        SRDConfig.from_dict(values)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown residual setting 'colour'"):
        SRDConfig.from_dict(changed(colour="blue"))


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan"), float("inf"), True, False, "1", None, [1.0]], ids=repr)
def test_an_alpha_that_is_no_share_is_refused(alpha: Any) -> None:
    message = re.escape(f"alpha is {alpha!r}, expected a number from 0 to 1")
    with pytest.raises(ConfigError, match=message):
        check_alphas(alpha)
    with pytest.raises(ConfigError, match=message):
        SRDConfig.from_dict(changed(alpha=alpha))


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, 0.5])
def test_an_alpha_from_0_to_1_is_accepted(alpha: float) -> None:
    assert SRDConfig.from_dict(changed(alpha=alpha)).alpha == alpha


@pytest.mark.parametrize("alpha", [2, -1, True, "half", None], ids=repr)
def test_a_layer_alpha_that_is_no_share_is_refused(alpha: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"layer_alphas['some.module'] is {alpha!r}")):
        SRDConfig.from_dict(changed(layer_alphas={"some.module": alpha}))


@pytest.mark.parametrize("layer_alphas", [None, [], ["some.module"], "some.module", 5], ids=repr)
def test_layer_alphas_that_are_no_object_are_refused(layer_alphas: Any) -> None:
    with pytest.raises(ConfigError, match="layer_alphas"):
        SRDConfig.from_dict(changed(layer_alphas=layer_alphas))


@pytest.mark.parametrize("modules", [None, "model.layers.0.mlp.up_proj", 5, {}, [5], [None]], ids=repr)
def test_modules_that_are_no_names_are_refused(modules: Any) -> None:
    with pytest.raises(ConfigError, match="modules"):
        SRDConfig.from_dict(changed(modules=modules))


@pytest.mark.parametrize("field", ["base_digest", "base_fingerprint", "sidecar"])
@pytest.mark.parametrize("value", [None, 5, ["sha256:aa"]], ids=repr)
def test_a_text_field_that_is_no_text_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SRDConfig.from_dict(changed(**{field: value}))


@pytest.mark.parametrize("field", ["bits", "group_size", "rounding", "density", "scale_dtype", "seed"])
def test_a_format_that_is_out_of_range_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is -5"):
        SRDConfig.from_dict(changed(**{field: -5}))


@pytest.mark.parametrize("sidecar", ["/etc/passwd", "../other/index.json", "srd/../../index.json", "srd/.."])
def test_a_sidecar_outside_the_checkpoint_is_refused(sidecar: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"srd_config.sidecar is {sidecar!r}, expected a path inside")):
        make(sidecar=sidecar)


# --- alphas ----------------------------------------------------------------------------------------------------------


def alphas(config: SRDConfig, **dial: Any) -> list[float]:
    found = module_alphas(config, LAYERS, **dial)
    assert tuple(found) == config.modules
    return list(found.values())


def test_layer_alphas_stand_over_alpha() -> None:
    assert alphas(make()) == [0.0, 0.75, 0.75, 0.5, *[0.75] * 6]


def test_the_first_pattern_that_matches_counts() -> None:
    config = make(layer_alphas={"re:.*[.]3[.]": 0.1, MODULES[3]: 0.9, "re:.*": 0.2})
    assert alphas(config) == [0.2] * 3 + [0.1] + [0.2] * 6


def test_an_alpha_of_the_caller_replaces_the_layer_alphas_too() -> None:
    assert alphas(make(), alpha=0.25) == [0.25] * 10
    assert alphas(make(), alpha=0) == [0] * 10


def test_layer_alphas_of_the_caller_replace_only_those() -> None:
    assert alphas(make(), layer_alphas={MODULES[1]: 0.1}) == [0.75, 0.1, *[0.75] * 8]
    assert alphas(make(), layer_alphas={}) == [0.75] * 10


def test_alpha_and_layer_alphas_of_the_caller() -> None:
    assert alphas(make(), alpha=0.5, layer_alphas={MODULES[9]: 1.0}) == [0.5] * 9 + [1.0]


@pytest.mark.parametrize(
    ("chunks", "chosen"),
    [
        (["early"], {0, 1}),
        (["factual", "governance"], {2, 3, 8, 9}),
        (["reasoning"], {4, 5, 6, 7}),
        ("reasoning", {4, 5, 6, 7}),
        ([], set()),
        (["early", "factual", "reasoning", "governance"], set(range(10))),
    ],
)
def test_chunks_leave_the_others_at_zero(chunks: Any, chosen: set[int]) -> None:
    found = alphas(make(layer_alphas={}), chunks=chunks)
    assert found == [0.75 if layer in chosen else 0.0 for layer in range(10)]


def test_chunks_keep_the_layer_alphas_of_what_they_choose() -> None:
    assert alphas(make(), chunks=["factual"]) == [0.0, 0.0, 0.75, 0.5, *[0.0] * 6]


def test_modules_outside_the_layers_are_in_no_chunk() -> None:
    config = make(modules=("model.projector", *MODULES), layer_alphas={})
    assert module_alphas(config, LAYERS)["model.projector"] == 0.75
    assert module_alphas(config, LAYERS, chunks=["early", "governance"])["model.projector"] == 0.0


def test_the_dial_of_the_caller_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1.1"):
        module_alphas(make(), LAYERS, alpha=1.1)
    with pytest.raises(ConfigError, match=r"layer_alphas\['a'\] is -1"):
        module_alphas(make(), LAYERS, layer_alphas={"a": -1})
    with pytest.raises(ConfigError, match="'middle' is unknown"):
        module_alphas(make(), LAYERS, chunks=["middle"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        module_alphas(make(), LAYERS, layer_alphas={"re:(": 1.0})


# --- files -----------------------------------------------------------------------------------------------------------


def write_config(directory: Path, **values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return directory


def test_reads_srd_config_from_config_json(tmp_path: Path) -> None:
    assert read_srd_config(write_config(tmp_path, srd_config=make().to_dict())) == make()
    assert read_model_config(tmp_path)["model_type"] == "llama"


def test_a_model_without_srd_config_has_none(tmp_path: Path) -> None:
    assert read_srd_config(write_config(tmp_path)) is None


@pytest.mark.parametrize("values", [{}, [], "text", 5, False, [["version", 1]]], ids=repr)
def test_an_srd_config_that_is_none_names_the_file(values: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: "):
        read_srd_config(write_config(tmp_path, srd_config=values))


@pytest.mark.parametrize("change", [{"alpha": 1.5}, {"version": 9}, {"layer_alphas": []}, {"modules": None}], ids=str)
def test_an_srd_config_with_a_fault_names_file_and_field(change: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, srd_config=changed(**change))
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: .*{next(iter(change))}"):
        read_srd_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .*x.json"),
        (b"{", "cannot read .*x.json"),
        (b'"\xff"', "cannot read .*x.json"),
        (b"[" * 200_000, "cannot read .*x.json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot read .*x.json"),
        (b"[1]", "x.json is not a JSON object"),
        (b"null", "x.json is not a JSON object"),
    ],
    ids=["empty", "cut_off", "not_utf8", "nested_without_end", "number_without_end", "a_list", "null"],
)
def test_a_file_that_is_no_json_object_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'config.json'} is missing")):
        read_srd_config(tmp_path)


def test_a_directory_is_no_json_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"cannot read {tmp_path}")):
        read_json(tmp_path)
