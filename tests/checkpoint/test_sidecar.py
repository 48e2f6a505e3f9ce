"""A sidecar that is whole: what it decodes to, against the original weights and against the formula."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from small_checkpoint import (
    BIG,
    CORRECTED,
    DEFAULT,
    FIRST,
    FORMATS,
    SHAPES,
    SPARSE,
    SPARSE_MODULE,
    digests,
    edit_json,
    edit_tensors,
    flip_bit,
    residuals,
)
from torch import Tensor

from srd_modifier.checkpoint.config import read_srd_config
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import ResidualFormat, decode
from srd_modifier.residual.rounding import uniform_noise

# one layer of the random Llama for each, all in one checkpoint
LAYERS: list[dict[str, Any]] = [
    {"residual_bits": 8, "residual_group_size": 32},
    {"residual_bits": 8, "density": 0.3},
    {"residual_bits": 4, "residual_group_size": 16, "scale_dtype": "float32"},
    {"residual_bits": 3, "rounding": "stochastic", "seed": 5},
    {"residual_bits": 2, "density": 0.5, "residual_group_size": -1},
    {"residual_bits": 8, "rounding": "dithered", "seed": 11},
]


@pytest.fixture(scope="module")
def mixed(
    quantize: Callable[..., Path], group_scheme: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The random Llama as asymmetric W4A16, each of its layers with a residual of its own format."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from srd_modifier import SRDModifier

    recipe = [
        SRDModifier(targets=[rf"re:model[.]layers[.]{layer}[.].*_proj$"], **settings)
        for layer, settings in enumerate(LAYERS)
    ]
    quantizer = QuantizationModifier(config_groups=group_scheme(32, symmetric=False), ignore=["lm_head"])
    return quantize([*recipe, quantizer], tmp_path_factory.mktemp("mixed") / "srd")


@pytest.fixture(scope="module")
def original(random_llama: Path) -> dict[str, Tensor]:
    return load_file(random_llama / "model.safetensors")


def w4(directory: Path, module: str) -> Tensor:
    """The base weight, by compressed-tensors in float32."""
    tensors = load_file(directory / "model.safetensors")
    state = {
        name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")
    }
    state["weight_scale"] = state["weight_scale"].float()
    symmetric = "weight_zero_point" not in state
    weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def stored(directory: Path, module: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in (directory / "srd").glob("residual*.safetensors"):
        tensors |= {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in load_file(file).items()
            if name.startswith(f"{module}.")
        }
    return tensors


def decoded_by_hand(tensors: dict[str, Tensor], fmt: ResidualFormat, shape: tuple[int, int], module: str) -> Tensor:
    """`(levels - noise) * scale` of the kept entries, from the stored bytes alone, in NumPy."""
    in_features = shape[1]
    raw = tensors["weight_d8"].numpy().view(np.uint8)
    if "weight_d8_mask" in tensors:
        mask = np.unpackbits(tensors["weight_d8_mask"].numpy(), axis=1, bitorder="little")[:, :in_features].astype(bool)
    else:
        mask = np.ones(shape, dtype=bool)
    columns = int(mask.sum()) if fmt.sparse else in_features
    bits = np.unpackbits(raw, axis=1, bitorder="little")[:, : columns * fmt.bits].reshape(len(raw), columns, fmt.bits)
    codes = (bits.astype(np.int64) << np.arange(fmt.bits)).sum(-1)
    codes = np.where(codes >= 2 ** (fmt.bits - 1), codes - 2**fmt.bits, codes).astype(np.float64)
    dense = np.zeros(shape)
    dense[mask] = codes.reshape(-1) + (0.0 if fmt.bits == 8 else 0.5)
    if fmt.rounding == "dithered":
        dense -= uniform_noise(shape, fmt.seed, module).numpy() * mask
    scale = tensors["weight_d8_scale"].double().numpy()
    width = in_features if fmt.group_size == -1 else fmt.group_size
    return torch.from_numpy(dense * np.repeat(scale, width, axis=1)[:, :in_features])


# --- the small checkpoint --------------------------------------------------------------------------------------------


def test_opens_what_was_written(small_template: Path) -> None:
    sidecar = Sidecar.open(small_template)
    assert tuple(sidecar.entries) == sidecar.config.modules == CORRECTED
    assert {module: (entry.out_features, entry.in_features) for module, entry in sidecar.entries.items()} == {
        module: SHAPES[module] for module in CORRECTED
    }
    assert {module: entry.format for module, entry in sidecar.entries.items()} == FORMATS
    assert sidecar.config.format == DEFAULT
    sidecar.verify()


def test_opens_a_directory_by_its_name(small_template: Path) -> None:
    assert Sidecar.open(str(small_template)).directory == small_template


def test_takes_a_config_that_has_been_read_already(small_template: Path) -> None:
    config = read_srd_config(small_template)
    assert Sidecar.open(small_template, config).config is config


@pytest.mark.parametrize("module", CORRECTED)
def test_gives_back_the_tensors_that_were_written(small_template: Path, module: str) -> None:
    found, expected = Sidecar.open(small_template).encoded(module), residuals()[module]
    assert (found.mask is None) == (expected.mask is None)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)


@pytest.mark.parametrize("module", CORRECTED)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_corrects_by_alpha_times_the_residual(small_template: Path, module: str, alpha: float) -> None:
    sidecar = Sidecar.open(small_template)
    residual = decode(residuals()[module], FORMATS[module], in_features=SHAPES[module][1], key=module)
    expected = sidecar.base.dequantize(module).double() + alpha * residual.double()
    assert torch.allclose(sidecar.correct(module, alpha).double(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("module", SHAPES)
def test_alpha_0_is_the_base_exactly(small_template: Path, module: str) -> None:
    sidecar = Sidecar.open(small_template)
    found, base = sidecar.correct(module, 0), sidecar.base.dequantize(module)
    assert torch.equal(found.view(torch.int32), base.view(torch.int32))  # -0.0 included


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("module", CORRECTED)
def test_alpha_0_is_what_another_loader_computes_in_the_models_dtype(
    small: Path, module: str, dtype: torch.dtype
) -> None:
    """It casts the scales and then multiplies, also where they are stored wider."""
    edit_tensors(
        small / "model.safetensors",
        lambda tensors: tensors.update({f"{module}.weight_scale": tensors[f"{module}.weight_scale"].float() * 1.0037}),
    )
    state = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in load_file(small / "model.safetensors").items()
        if name.startswith(f"{module}.")
    }
    state["weight_scale"] = state["weight_scale"].to(dtype)
    weights = QuantizationArgs(num_bits=4, symmetric="weight_zero_point" not in state, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    shutil.copytree(small / "srd", small / "old")
    shutil.rmtree(small / "srd")
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    attach_sidecar(small, sorted((small / "old").glob("residual*")), modules=CORRECTED, fmt=DEFAULT)
    found = Sidecar.open(small).correct(module, 0, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("module", CORRECTED)
def test_the_corrected_weight_is_rounded_once(small_template: Path, module: str) -> None:
    sidecar = Sidecar.open(small_template)
    expected = sidecar.correct(module, 0.7).to(torch.bfloat16)
    assert torch.equal(sidecar.correct(module, 0.7, torch.bfloat16), expected)


def test_alpha_0_reads_no_residual(small: Path) -> None:
    flip_bit(small / FIRST, f"{BIG}.weight_d8")
    sidecar = Sidecar.open(small)
    assert torch.equal(sidecar.correct(BIG, 0), sidecar.base.dequantize(BIG))


def test_decoding_leaves_the_files_alone(small: Path) -> None:
    before = digests(small)
    sidecar = Sidecar.open(small)
    for module in CORRECTED:
        first = sidecar.correct(module, 1.0)
        first.zero_()
        assert torch.equal(sidecar.correct(module, 1.0), Sidecar.open(small).correct(module, 1.0))
    assert digests(small) == before


def test_lists_its_files(small_template: Path) -> None:
    assert [str(path.relative_to(small_template)) for path in Sidecar.open(small_template).files()] == [
        "srd/importance.safetensors",
        "srd/residual-00001-of-00002.safetensors",
        "srd/residual-00002-of-00002.safetensors",
        "srd/residual.safetensors.index.json",
    ]


def test_other_files_beside_it_do_not_matter(small: Path) -> None:
    (small / "README.md").write_text("a model card")
    (small / "srd" / "notes.txt").write_text("notes")
    (small / "srd" / "importance.safetensors").unlink()
    sidecar = Sidecar.open(small)
    sidecar.verify()
    assert len(sidecar.files()) == 3


def test_a_checkpoint_can_be_moved_and_linked(small: Path, tmp_path: Path) -> None:
    """The hub's cache holds links into a store of blobs."""
    snapshot = tmp_path / "snapshot"
    for number, path in enumerate(sorted(path for path in small.rglob("*") if path.is_file())):
        blob, link = tmp_path / "blobs" / str(number), snapshot / path.relative_to(small)
        blob.parent.mkdir(exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, blob)
        link.symlink_to(blob)
    Sidecar.open(snapshot).verify()


def test_a_sidecar_may_have_another_place(small: Path) -> None:
    (small / "srd").rename(small / "residual")
    edit_json(
        small / "config.json",
        lambda config: config["srd_config"].update(sidecar="residual/residual.safetensors.index.json"),
    )
    Sidecar.open(small).verify()


def test_a_w4_model_is_not_an_srd_checkpoint(small: Path) -> None:
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    with pytest.raises(CheckpointError, match=r"config.json has no srd_config: this is not an SRD checkpoint"):
        Sidecar.open(small)


# --- checkpoints of the modifier -------------------------------------------------------------------------------------


def test_a_dense_d8_is_within_half_a_step_of_the_original(
    finished_checkpoint: Path, original: dict[str, Tensor]
) -> None:
    sidecar = Sidecar.open(finished_checkpoint)
    sidecar.verify()
    assert len(sidecar.entries) == 42
    for module in sidecar.entries:
        scale = stored(finished_checkpoint, module)["weight_d8_scale"].double().repeat_interleave(32, dim=1)
        base, weight = w4(finished_checkpoint, module), original[f"{module}.weight"].double()
        assert torch.equal(sidecar.base.dequantize(module), base)
        assert torch.equal(sidecar.correct(module, 0), base)
        error = (sidecar.correct(module, 1.0).double() - weight).abs()
        assert bool((error <= scale / 2 * (1 + 1e-5) + 1e-9).all())
        assert bool((error <= (base.double() - weight).abs().max() / 100).all())


@pytest.mark.parametrize("layer", range(6))
def test_every_format_decodes_to_its_formula(mixed: Path, layer: int) -> None:
    sidecar = Sidecar.open(mixed)
    modules = [module for module in sidecar.entries if f".layers.{layer}." in module]
    assert len(modules) == 7
    for module in modules:
        entry = sidecar.entries[module]
        shape = (entry.out_features, entry.in_features)
        residual = decoded_by_hand(stored(mixed, module), entry.format, shape, module)
        expected = w4(mixed, module).double() + 0.5 * residual
        assert torch.allclose(sidecar.correct(module, 0.5).double(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("layer", range(6))
def test_every_format_is_the_one_asked_for_and_brings_the_weights_nearer(
    mixed: Path, original: dict[str, Tensor], layer: int
) -> None:
    sidecar = Sidecar.open(mixed)
    settings = {name.removeprefix("residual_"): value for name, value in LAYERS[layer].items()}
    for module, entry in sidecar.entries.items():
        if f".layers.{layer}." not in module:
            continue
        assert entry.format == ResidualFormat(**settings)
        weight = original[f"{module}.weight"].double()
        lost = (w4(mixed, module).double() - weight).square().sum()
        left = (sidecar.correct(module, 1.0).double() - weight).square().sum()
        assert left < 0.5 * lost


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_an_entry_that_is_not_clipped_is_within_a_step(mixed: Path, original: dict[str, Tensor], layer: int) -> None:
    """Half a step where rounding is to the nearest or dithered; what a narrow code clips is not counted."""
    sidecar = Sidecar.open(mixed)
    for module, entry in sidecar.entries.items():
        if f".layers.{layer}." not in module:
            continue
        tensors, fmt = stored(mixed, module), entry.format
        step = tensors["weight_d8_scale"].double().repeat_interleave(fmt.group_size, dim=1)
        step = step[:, : entry.in_features]
        lost = original[f"{module}.weight"].double() - w4(mixed, module).double()
        reach = step * (127 if fmt.bits == 8 else 2 ** (fmt.bits - 1))
        error = (sidecar.correct(module, 1.0).double() - original[f"{module}.weight"].double()).abs()
        inside = lost.abs() <= reach
        assert inside.double().mean() > 0.8
        assert bool((error <= step / 2 * (1 + 1e-5) + 1e-9)[inside].all())


def test_the_mixed_checkpoint_verifies(mixed: Path) -> None:
    sidecar = Sidecar.open(mixed)
    sidecar.verify()
    assert len(sidecar.entries) == 42
    assert sidecar.config.format == ResidualFormat(bits=8, group_size=32)


def test_a_sparse_residual_touches_only_what_its_mask_keeps(small_template: Path) -> None:
    sidecar = Sidecar.open(small_template)
    mask = stored(small_template, SPARSE_MODULE)["weight_d8_mask"].numpy()
    kept = torch.from_numpy(np.unpackbits(mask, axis=1, bitorder="little").astype(bool))
    assert int(kept.sum()) == SPARSE.kept(*SHAPES[SPARSE_MODULE])
    changed = sidecar.correct(SPARSE_MODULE, 1.0) != sidecar.base.dequantize(SPARSE_MODULE)
    assert not bool((changed & ~kept).any())
