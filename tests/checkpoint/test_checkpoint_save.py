"""Base and sidecar bound together, and what saving leaves alone."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoint import (
    BIG,
    CORRECTED,
    DEFAULT,
    DENSE,
    SHAPES,
    UNCORRECTED,
    base_tensors,
    digests,
    flip_bit,
    write_sidecar,
)
from torch import Tensor

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import SRDConfig, read_srd_config
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import ResidualFormat


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_sidecar(tmp_path / "scratch")


def base_digests(seed: int = 0) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in base_tensors(seed).items()
        if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_zero_point")
    }


# --- attach_sidecar --------------------------------------------------------------------------------------------------


def test_binds_the_sidecar_to_the_base(base: Path, files: list[Path]) -> None:
    returned = attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, base_digests=base_digests())
    config = read_srd_config(base)
    assert config == returned
    assert config is not None
    assert config.base_digest == BaseCheckpoint(base).digest()
    assert config.base_fingerprint == BaseCheckpoint(base).fingerprint()
    assert (config.modules, config.format, config.alpha, config.layer_alphas) == (CORRECTED, DEFAULT, 1.0, {})
    Sidecar.open(base).verify()


def test_writes_the_dial(base: Path, files: list[Path]) -> None:
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, alpha=0.25, layer_alphas={BIG: 0.5})
    config = read_srd_config(base)
    assert isinstance(config, SRDConfig)
    assert (config.alpha, config.layer_alphas) == (0.25, {BIG: 0.5})


def test_the_files_of_the_sidecar_are_those_that_were_given(base: Path, files: list[Path]) -> None:
    given = {f"srd/{path.name}": path.read_bytes() for path in files}
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT)
    written = {str(path.relative_to(base)): path for path in (base / "srd").iterdir()}
    assert set(written) == set(given)
    assert all(path.read_bytes() == given[name] for name, path in written.items() if name.endswith(".safetensors"))


def test_only_srd_config_is_added_to_config_json(base: Path, files: list[Path]) -> None:
    before, others = json.loads((base / "config.json").read_text()), digests(base)
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT)
    after = json.loads((base / "config.json").read_text())
    assert list(after) == [*before, "srd_config"]
    assert {name: value for name, value in after.items() if name != "srd_config"} == before
    unchanged = {name: digest for name, digest in digests(base).items() if name in others and name != "config.json"}
    assert unchanged == {name: digest for name, digest in others.items() if name != "config.json"}


def test_importance_is_kept_as_it_was_given(base: Path, files: list[Path]) -> None:
    importance = {module: torch.rand(shape[1]) for module, shape in SHAPES.items()}  # not only the corrected ones
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, importance=importance)
    found = load_file(base / "srd" / "importance.safetensors")
    assert set(found) == {f"{module}.importance" for module in SHAPES}
    for module, expected in importance.items():
        assert found[f"{module}.importance"].dtype == torch.float32
        assert torch.equal(found[f"{module}.importance"], expected)


@pytest.mark.parametrize("importance", [None, {}])
def test_without_importance_there_is_no_file(base: Path, files: list[Path], importance: Any) -> None:
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, importance=importance)
    assert not (base / "srd" / "importance.safetensors").exists()


def test_a_base_that_was_changed_since_calibration_is_refused(base: Path, files: list[Path]) -> None:
    flip_bit(base / "model.safetensors", f"{DENSE}.weight_packed", 0.5)
    message = (
        rf"^{re.escape(str(base))}: {re.escape(DENSE)}.weight_packed was saved with other bytes than its residual "
        "was computed from; the model was changed between calibration and saving"
    )
    with pytest.raises(CheckpointError, match=message):
        attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, base_digests=base_digests())
    assert not (base / "srd").exists()


def test_a_base_that_lacks_a_corrected_module_is_refused(base: Path, files: list[Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight_packed is not among the saved tensors; the architecture renames"
    ):
        attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, base_digests={"lm_head.weight_packed": "0" * 64})


def test_tensors_without_a_residual_may_differ(base: Path, files: list[Path]) -> None:
    flip_bit(base / "model.safetensors", f"{UNCORRECTED}.weight_packed")
    known = {name: digest for name, digest in base_digests().items() if not name.startswith(UNCORRECTED)}
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT, base_digests=known)
    Sidecar.open(base).verify()


def test_a_directory_without_weights_is_refused(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty has neither"):
        attach_sidecar(tmp_path / "empty", files, modules=CORRECTED, fmt=DEFAULT)


def test_the_scratch_files_are_no_longer_needed(base: Path, files: list[Path]) -> None:
    attach_sidecar(base, files, modules=CORRECTED, fmt=DEFAULT)
    shutil.rmtree(files[0].parent)
    Sidecar.open(base).verify()


# --- a whole oneshot -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(
    quantize: Callable[..., Path], group_scheme: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the same oneshot saves without SRD."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(config_groups=group_scheme(32), ignore=["lm_head"])
    return quantize(recipe, tmp_path_factory.mktemp("plain") / "w4")


def test_the_base_is_what_the_same_oneshot_saves_without_srd(finished_checkpoint: Path, plain: Path) -> None:
    with_srd, without = digests(finished_checkpoint), digests(plain)
    own = {"config.json", "recipe.yaml"}
    added = {name for name in with_srd if name.startswith("srd/")}
    assert added == {"srd/residual-00001-of-00001.safetensors", "srd/residual.safetensors.index.json"}
    assert set(with_srd) - added == set(without)
    assert "model.safetensors" in without
    assert {name: with_srd[name] for name in without if name not in own} == {
        name: digest for name, digest in without.items() if name not in own
    }


def test_config_json_is_what_the_same_oneshot_saves_without_srd(finished_checkpoint: Path, plain: Path) -> None:
    with_srd, without = (json.loads((path / "config.json").read_text()) for path in (finished_checkpoint, plain))
    assert "srd_config" not in without
    assert with_srd["quantization_config"] == without["quantization_config"]
    assert {name: value for name, value in with_srd.items() if name != "srd_config"} == without


def test_srd_config_covers_every_quantized_module(finished_checkpoint: Path) -> None:
    config = read_srd_config(finished_checkpoint)
    assert config is not None
    assert sorted(config.modules) == sorted(BaseCheckpoint(finished_checkpoint).quantized_modules)
    assert config.format == ResidualFormat(group_size=32)
    assert json.loads((finished_checkpoint / "config.json").read_text())["srd_config"] == config.to_dict()


def test_a_model_can_be_saved_twice(
    random_llama: Path, group_scheme: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """To keep a copy elsewhere, or again after a disk was full."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from srd_modifier import SRDModifier

    model = AutoModelForCausalLM.from_pretrained(random_llama)
    oneshot(model=model, recipe=SRDModifier(config_groups=group_scheme(32), ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "first")
    expected = digests(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    model.save_pretrained(tmp_path / "first")
    assert digests(tmp_path / "second") == digests(tmp_path / "first") == expected
    Sidecar.open(tmp_path / "first").verify()


def test_importance_is_the_mean_square_of_the_inputs(
    quantize: Callable[..., Path],
    group_scheme: Callable[..., dict[str, Any]],
    random_llama: Path,
    calibration: Any,
    tmp_path: Path,
) -> None:
    """Calibrated on the original weights, by round-to-nearest in one pass; compared with hooks on the model itself."""
    from transformers import AutoModelForCausalLM

    from srd_modifier import SRDModifier

    scheme = group_scheme(32)
    scheme["group_0"]["weights"]["observer"] = "minmax"
    recipe = SRDModifier(config_groups=scheme, ignore=["lm_head"], correct={"targets": ["re:.*[.]0[.]mlp[.].*"]})
    output = quantize(recipe, tmp_path / "out", data=True, pipeline="basic")
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    sums: dict[str, Tensor] = {}

    def add(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, torch.zeros(module.in_features, dtype=torch.float64)) + inputs[0].flatten(
            0, -2
        ).double().square().sum(0)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(partial(add, name))
    with torch.no_grad():
        for row in calibration["input_ids"]:
            model(torch.tensor([row]))
    found = load_file(output / "srd" / "importance.safetensors")
    assert set(found) == {f"{name}.importance" for name in sums}
    for name, total in sums.items():
        importance = found[f"{name}.importance"]
        assert (importance.dtype, importance.shape) == (torch.float32, total.shape)
        # bfloat16 activations differ in their last bits between two ways to run a model
        assert torch.allclose(importance.double(), total / (8 * 64), rtol=0.05)
    Sidecar.open(output).verify()
