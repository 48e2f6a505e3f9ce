"""`srd/sensitivity.json`: what it predicts, what it is bound to, and what is refused in it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import (
    BIG,
    CORRECTED,
    DAMAGES,
    DEFAULT,
    DENSE,
    INDEX,
    SPARSE_MODULE,
    UNCORRECTED,
    edit_json,
    write_base,
    write_checkpoint,
    write_sidecar,
)

from srd_modifier.checkpoint.config import SENSITIVITY, module_alphas, read_srd_config
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity, read_sensitivity
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.summary import summarize
from srd_modifier.errors import CheckpointError, ConfigError

# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_damage_is_that_of_the_interpolated_error(alpha: float) -> None:
    """The form evaluated on the matrices themselves: 1/2 sum_r (E H E^T)_rr g_r."""
    generator = np.random.default_rng(0)
    inputs, g = generator.normal(size=(30, 6)), generator.uniform(size=4)
    e0, e1 = generator.normal(size=(2, 4, 6))
    h = inputs.T @ inputs / 30

    def form(left: Any, right: Any) -> float:
        return float(0.5 * (np.einsum("ri,ij,rj->r", left, h, right) * g).sum())

    module = ModuleSensitivity(w4=form(e0, e0), corrected=form(e1, e1), mixed=form(e0, e1))
    error = (1 - alpha) * e0 + alpha * e1
    assert module.damage(alpha) == pytest.approx(form(error, error))


def test_the_ends_of_the_dial_are_exact() -> None:
    module = ModuleSensitivity(w4=0.1, corrected=0.3, mixed=-0.05)
    assert (module.damage(0.0), module.damage(1.0), module.removed) == (0.1, 0.3, 0.1 - 0.3)


def test_without_a_residual_the_dial_does_nothing() -> None:
    module = ModuleSensitivity(w4=0.1)
    assert (module.damage(0.0), module.damage(0.5), module.damage(1.0), module.removed) == (0.1, 0.1, 0.1, 0.0)


def test_rounded_numbers_give_no_negative_damage() -> None:
    assert ModuleSensitivity(w4=1.0, corrected=1.0, mixed=-1.0000001).damage(0.5) == 0.0


def test_the_prediction_is_the_sum_over_all_modules() -> None:
    assert DAMAGES.predicted({}) == pytest.approx(8e-3 + 2e-3 + 1e-3 + 5e-4)
    assert DAMAGES.predicted(dict.fromkeys(CORRECTED, 1.0)) == pytest.approx(2e-5 + 1e-5 + 4e-4 + 5e-4)
    half = 0.25 * 8e-3 + 0.5 * 1e-5 + 0.25 * 2e-5
    assert DAMAGES.predicted({BIG: 0.5}) == pytest.approx(half + 2e-3 + 1e-3 + 5e-4)


def test_an_alpha_of_an_unknown_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^alphas has 'lm_head', which is not among the modules of the sensitivity$"):
        DAMAGES.predicted({"lm_head": 1.0})


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read(sensitive: Path) -> None:
    assert read_sensitivity(sensitive) == DAMAGES
    assert read_sensitivity(str(sensitive)) == DAMAGES
    assert Sensitivity.from_dict(DAMAGES.to_dict()) == DAMAGES


def test_the_file_is_bound_to_base_and_residual(sensitive: Path) -> None:
    values = json.loads((sensitive / SENSITIVITY).read_text())
    assert list(values) == ["version", "base_digest", "residual_digest", "method", "tokens", "modules"]
    assert values["version"] == 1
    config = json.loads((sensitive / "config.json").read_text())["srd_config"]
    assert values["base_digest"] == config["base_digest"]
    assert values["residual_digest"] == json.loads((sensitive / INDEX).read_text())["metadata"]["residual_digest"]
    assert values["modules"][SPARSE_MODULE] == {"w4": 1e-3, "corrected": 4e-4, "mixed": 2e-4}
    assert values["modules"][UNCORRECTED] == {"w4": 5e-4, "output": 1.0}


def test_the_sidecar_lists_it(sensitive: Path, small_template: Path) -> None:
    assert sensitive / SENSITIVITY in Sidecar.open(sensitive).files()
    assert small_template / SENSITIVITY not in Sidecar.open(small_template).files()


def test_the_summary_has_the_prediction(sensitive: Path, small_template: Path) -> None:
    summary, found, config = summarize(sensitive), read_sensitivity(sensitive), read_srd_config(sensitive)
    assert found is not None
    assert config is not None
    assert summary.predicted_kld_w4 == found.predicted({})
    assert summary.predicted_kld == found.predicted(module_alphas(config, 2))
    assert summarize(small_template).predicted_kld is None


def test_a_checkpoint_without_the_file_has_none(small_template: Path) -> None:
    assert read_sensitivity(small_template) is None


def test_a_plain_model_has_none(sensitive: Path) -> None:
    edit_json(sensitive / "config.json", lambda config: config.pop("srd_config"))
    assert read_sensitivity(sensitive) is None


@pytest.mark.parametrize("field", ["base_digest", "residual_digest"])
def test_that_of_another_checkpoint_is_refused(sensitive: Path, tmp_path: Path, field: str) -> None:
    """Same names and shapes: another base, or the same base with another residual."""
    other = write_checkpoint(tmp_path / "other", tmp_path / "scratch", seed=1, sensitivity=DAMAGES)
    foreign = json.loads((other / SENSITIVITY).read_text())
    edit_json(sensitive / SENSITIVITY, lambda values: values.update({field: foreign[field]}))
    with pytest.raises(CheckpointError) as caught:
        read_sensitivity(sensitive)
    assert str(caught.value) == (
        f"{sensitive / SENSITIVITY} belongs to another checkpoint ({field} differs); copy it from the same checkpoint "
        "or remove it"
    )


def of(module: str, **numbers: Any) -> Callable[[dict[str, Any]], Any]:
    """Change the numbers of one module; None removes one."""

    def change(values: dict[str, Any]) -> None:
        for name, number in numbers.items():
            if number is None:
                values["modules"][module].pop(name)
            else:
                values["modules"][module][name] = number

    return change


FAULTS = {
    "another version": (lambda v: v.update(version=2), "version is 2, this srd-modifier reads 1"),
    "no version": (lambda v: v.pop("version"), "version is None, this srd-modifier reads 1"),
    "no base digest": (lambda v: v.pop("base_digest"), "base_digest is missing"),
    "no residual digest": (lambda v: v.pop("residual_digest"), "residual_digest is missing"),
    "no method": (lambda v: v.pop("method"), "method is missing"),
    "another method": (
        lambda v: v.update(method="guess"),
        "method is 'guess', expected one of ('gradient', 'forward')",
    ),
    "a list as method": (lambda v: v.update(method=[]), "method is [], expected one of ('gradient', 'forward')"),
    "no tokens": (lambda v: v.update(tokens=0), "tokens is 0, expected a whole number of at least 1"),
    "half a token": (lambda v: v.update(tokens=1.5), "tokens is 1.5, expected a whole number of at least 1"),
    "true tokens": (lambda v: v.update(tokens=True), "tokens is True, expected a whole number of at least 1"),
    "an unknown field": (lambda v: v.update(seed=0), "seed is unknown, expected method, tokens, modules"),
    "modules as a list": (lambda v: v.update(modules=[]), "modules is not an object"),
    "a module as a number": (
        lambda v: v["modules"].update({BIG: 1}),
        f"modules['{BIG}'] is 1, expected an object",
    ),
    "no w4": (of(UNCORRECTED, w4=None), f"modules['{UNCORRECTED}'].w4 is missing"),
    "negative w4": (of(BIG, w4=-1e-9), f"modules['{BIG}'].w4 is -1e-09, expected a number of at least 0"),
    "negative corrected": (of(BIG, corrected=-1), f"modules['{BIG}'].corrected is -1, expected a number of at least 0"),
    "negative output": (of(BIG, output=-1), f"modules['{BIG}'].output is -1, expected a number of at least 0"),
    "nan": (of(BIG, w4=math.nan), f"modules['{BIG}'].w4 is nan, expected a number of at least 0"),
    "infinite mixed": (of(BIG, mixed=-math.inf), f"modules['{BIG}'].mixed is -inf, expected a finite number"),
    "text": (of(BIG, w4="1e-3"), f"modules['{BIG}'].w4 is '1e-3', expected a number of at least 0"),
    "true": (of(BIG, w4=True), f"modules['{BIG}'].w4 is True, expected a number of at least 0"),
    "a huge whole number": (of(BIG, w4=10**400), f"modules['{BIG}'].w4 is 1{'0' * 400}, expected a number of at"),
    "null": (
        lambda v: v["modules"][UNCORRECTED].update(corrected=None),
        f"modules['{UNCORRECTED}'].corrected is None, expected a number of at least 0",
    ),
    "an unknown number": (
        of(BIG, w8=0.0),
        f"modules['{BIG}'].w8 is unknown, expected w4, corrected, mixed, output",
    ),
    "no mixed": (of(BIG, mixed=None), f"modules['{BIG}'].mixed is missing, expected it beside corrected"),
    "only mixed": (of(BIG, corrected=None), f"modules['{BIG}'].corrected is missing, expected it beside mixed"),
    "no corrected": (
        of(DENSE, corrected=None, mixed=None),
        f"modules['{DENSE}'].corrected is missing, the module has a residual",
    ),
    "a module is missing": (
        lambda v: v["modules"].pop(DENSE),
        f"modules['{DENSE}'].corrected is missing, the module has a residual",
    ),
    "a corrected module too many": (
        of(UNCORRECTED, corrected=0.0, mixed=0.0),
        f"modules['{UNCORRECTED}'].corrected is extra, the module has no residual",
    ),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_name_file_and_field(sensitive: Path, change: Callable[..., Any], message: str) -> None:
    edit_json(sensitive / SENSITIVITY, change)
    with pytest.raises(CheckpointError) as caught:
        read_sensitivity(sensitive)
    assert str(caught.value).startswith(f"{sensitive / SENSITIVITY}: {message}")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1'])
def test_what_is_no_json_object_is_named(sensitive: Path, content: str) -> None:
    (sensitive / SENSITIVITY).write_text(content)
    with pytest.raises(CheckpointError, match=r"sensitivity\.json"):
        read_sensitivity(sensitive)


def test_a_sensitivity_of_other_residuals_is_not_saved(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    files = write_sidecar(tmp_path / "scratch")
    fewer = replace(DAMAGES, modules={name: DAMAGES.modules[name] for name in (BIG, DENSE)})
    with pytest.raises(ConfigError, match=r"1.mlp.up_proj'\].corrected is missing, the module has a residual"):
        attach_sidecar(tmp_path / "base", files, modules=CORRECTED, fmt=DEFAULT, sensitivity=fewer)
    assert not (tmp_path / "base" / "srd").exists()
