"""Weights and residuals as int8: the layout against vLLM's and compressed-tensors' own, the values against torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from random_models import make_llama, save_model
from rtn import Scheme, write_checkpoint
from torch import Tensor
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

from srd_modifier.residual import WHOLE_ROW, ResidualFormat
from srd_modifier.residual.format import BITS
from srd_modifier.vllm.checkpoint import ServedCheckpoint
from srd_modifier.vllm.int8 import kernel_group_size, on_grid, pack_int8, to_int8

ATTENTION, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
COLUMNS = {ATTENTION: 256, DOWN: 704}  # 704 is 11 times 64, and five and a half times 128
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]

Served = Callable[..., ServedCheckpoint]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": COLUMNS[ATTENTION], "intermediate_size": COLUMNS[DOWN]}
    return save_model(make_llama(**sizes), tmp_path_factory.mktemp("int8") / "model")


@pytest.fixture
def served(one_layer: Path, tmp_path: Path) -> Served:
    """An SRD checkpoint of one layer, served with an alpha."""

    def serve(alpha: float = 1, layer_alphas: dict[str, float] | None = None, **options: Any) -> ServedCheckpoint:
        directory = write_checkpoint(one_layer, tmp_path / "checkpoint", **options)
        return ServedCheckpoint.open(directory, {"alpha": alpha, "layer_alphas": layer_alphas or {}})

    return serve


def every_code() -> Tensor:
    """Two rows with all codes, in an order that has no period of four."""
    codes = torch.arange(-128, 128).to(torch.int8)
    return torch.stack([codes, codes[torch.randperm(256, generator=torch.Generator().manual_seed(0))]])


def residual(checkpoint: ServedCheckpoint, module: str) -> Tensor:
    """`alpha * residual` in float32."""
    return checkpoint.merged(module, torch.float32, CPU) - checkpoint.sidecar.base.dequantize(module)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Layout


def test_packing_is_compressed_tensors_own():
    assert torch.equal(pack_int8(every_code()), pack_to_int32(every_code(), 8))


def test_compressed_tensors_unpacks_the_codes():
    assert torch.equal(unpack_from_int32(pack_int8(every_code()), 8, torch.Size((2, 256))), every_code())


def test_vllm_unpacks_the_codes():
    stored = unpack_quantized_values_into_int32(pack_int8(every_code()), scalar_types.uint8b128, packed_dim=1)
    assert torch.equal(stored - scalar_types.uint8b128.bias, every_code().int())


def test_columns_of_a_rank_are_whole_words():
    """A row-parallel layer is cut along the packed columns."""
    halves = pack_int8(every_code()).chunk(2, 1)
    assert torch.equal(halves[1], pack_int8(every_code()[:, 128:]))


def test_codes_that_are_not_contiguous_are_packed():
    codes = every_code().t().contiguous().t()
    assert torch.equal(pack_int8(codes), pack_int8(every_code()))


def test_columns_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="6 columns do not fill words of 4"):
        pack_int8(torch.zeros(1, 6, dtype=torch.int8))


@pytest.mark.parametrize(
    ("preferred", "columns", "ranks", "expected"),
    [
        (128, 4096, 1, 128),
        (64, 4096, 1, 64),
        (32, 4096, 1, 32),
        (4096, 4096, 1, 128),  # one scale per row
        (64, 11008, 4, 64),
        (128, 704, 1, 64),  # does not divide the columns
        (128, 704, 2, 32),  # nor those of a rank
        (96, 768, 1, 32),  # of 64 and 32 the one that divides 96
        (48, 768, 1, 32),  # none divides 48, the largest that is no larger
        (16, 4096, 1, 32),  # the smallest that kernels have
        (64, 704, 4, None),
        (64, 100, 1, None),
    ],
)
def test_group_size_of_the_kernel(preferred, columns, ranks, expected):
    assert kernel_group_size(preferred, columns, ranks) == expected


# Weights that are on no grid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 0.02, 2e-4, 2e-5])
def test_no_entry_is_off_by_more_than_half_a_step(size, dtype):
    """At 2e-5 the scales are among float16's smallest, of which 1e-7 lies between two: what rounds down would clip."""
    weight = noise(64, 256) * size
    step = weight.view(64, 4, 64).abs().amax(-1) / 127
    spacing = torch.maximum(torch.finfo(dtype).eps * step, torch.tensor(2.0**-24 if dtype == torch.float16 else 0.0))
    bound = (step + spacing).repeat_interleave(64, 1) / 2
    quantized = to_int8(weight, 64, dtype)
    # the scale is rounded by half a spacing, or up by a whole one
    assert ((quantized.dequantize() - weight).abs() <= 1.01 * bound + 1e-12).all()


def test_the_root_mean_square_error_is_that_of_8_bits():
    """Uniform in a step, which is 1/127 of each group's largest entry."""
    weight = noise(256, 1024)
    step = weight.view(256, 16, 64).abs().amax(-1) / 127
    error = (to_int8(weight, 64, torch.bfloat16).dequantize() - weight).square().mean().sqrt()
    assert error == pytest.approx(float(step.square().mean().sqrt()) / 12**0.5, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_group_has_a_scale_of_its_own(dtype):
    weight = noise(8, 256) * torch.tensor([1e-3, 1.0]).repeat_interleave(128)
    quantized = to_int8(weight, 128, dtype)
    assert quantized.scale.dtype == dtype
    assert quantized.scale.shape == (8, 2)
    error = (quantized.dequantize() - weight).abs()
    assert error[:, :128].amax() < 1e-4 * error[:, 128:].amax() * 100  # a thousandth of the other groups' steps
    assert quantized.codes[:, :128].abs().amax() >= 126


def test_groups_of_zeros_stay_zero():
    weight = noise(2, 128)
    weight[:, :64] = 0
    quantized = to_int8(weight, 64, torch.bfloat16)
    assert not quantized.codes[:, :64].any()
    assert not quantized.scale.isnan().any()


def test_what_is_too_small_for_the_dtype_becomes_zero_or_the_smallest_number():
    quantized = to_int8(torch.full((1, 64), 1e-10), 64, torch.float16)
    assert quantized.dequantize().abs().amax() <= 2**-24


def test_codes_are_symmetric():
    """A word of four codes of -128 is zero, which no loaded tensor has."""
    codes = to_int8(noise(64, 256), 32, torch.bfloat16).codes
    assert (codes.min(), codes.max()) == (-127, 127)


def test_columns_that_the_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 64 do not divide 96 columns"):
        to_int8(torch.zeros(1, 96), 64, torch.bfloat16)


# Weights in steps of a given size


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_in_steps_is_kept(sign):
    codes = every_code()[:, :192].float().clamp(min=-127)
    step = sign * torch.tensor([[0.5, 2.0**-9, 3.0], [1.0, 7.0, 2.0**-12]])
    weight = codes * step.repeat_interleave(64, 1)
    quantized = on_grid(weight, step, torch.bfloat16)
    assert torch.equal(quantized.dequantize(), weight)
    assert torch.equal(quantized.scale.float(), step)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_that_float16_rounds_down_too_far_is_rounded_up(sign):
    step = torch.full((1, 1), sign * 1.4 * 2.0**-24)  # of two numbers, the nearer is smaller by 0.4 of 1.4
    weight = torch.arange(-127, 128).float()[None, :64] * step
    assert on_grid(weight, step, torch.float16).scale.item() == sign * 2.0**-23


# Modules of a checkpoint


@pytest.mark.parametrize("bits", BITS)
def test_residuals_of_every_width_are_kept(served, bits):
    checkpoint = served(fmt=ResidualFormat(bits=bits, group_size=64))
    found = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize()
    assert found.any()
    assert torch.equal(found, residual_of_format(checkpoint, ATTENTION))


def residual_of_format(checkpoint: ServedCheckpoint, module: str, alpha: float = 1.0) -> Tensor:
    """The stored residual by its definition: codes, or codes + 1/2, times the group's scale."""
    from srd_modifier.residual import decode

    fmt = checkpoint.sidecar.entries[module].format
    return alpha * decode(checkpoint.sidecar.encoded(module), fmt, in_features=COLUMNS[module], key=module)


@pytest.mark.parametrize(
    ("stored", "kernel"), [(128, 128), (128, 32), (64, 32), (WHOLE_ROW, 128), (WHOLE_ROW, 32), (256, 64), (96, 32)]
)
def test_residuals_are_kept_in_smaller_groups(served, stored, kernel):
    checkpoint = served(fmt=ResidualFormat(group_size=stored))
    found = checkpoint.residual_as_int8(ATTENTION, kernel, torch.bfloat16, CPU)
    assert found.scale.shape[1] == COLUMNS[ATTENTION] // kernel
    assert torch.equal(found.dequantize(), residual_of_format(checkpoint, ATTENTION))


@pytest.mark.parametrize("bits", [8, 3])
def test_residuals_with_a_shorter_last_group_are_kept(served, bits):
    checkpoint = served(fmt=ResidualFormat(bits=bits, group_size=128))
    found = checkpoint.residual_as_int8(DOWN, 64, torch.bfloat16, CPU)
    assert torch.equal(found.dequantize(), residual_of_format(checkpoint, DOWN))


@pytest.mark.parametrize("bits", [8, 2])
def test_sparse_residuals_are_kept(served, bits):
    checkpoint = served(fmt=ResidualFormat(bits=bits, density=0.1))
    found = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU)
    assert (found.codes != 0).float().mean() < 0.11
    assert torch.equal(found.dequantize(), residual_of_format(checkpoint, ATTENTION))


@pytest.mark.parametrize(("stored", "kernel"), [(16, 32), (64, 128)])
def test_residuals_in_groups_that_are_too_small_lose_half_a_step(served, stored, kernel):
    checkpoint = served(fmt=ResidualFormat(group_size=stored))
    exact = residual_of_format(checkpoint, ATTENTION)
    error = checkpoint.residual_as_int8(ATTENTION, kernel, torch.bfloat16, CPU).dequantize() - exact
    step = exact.view(len(exact), -1, kernel).abs().amax(-1).repeat_interleave(kernel, 1) / 127
    assert error.abs().amax() > 0
    assert (error.abs() <= 0.51 * step).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_dithered_residuals_lose_half_a_step(served, bits):
    """Their entries are on no grid."""
    checkpoint = served(fmt=ResidualFormat(bits=bits, rounding="dithered"))
    exact = residual_of_format(checkpoint, ATTENTION)
    error = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize() - exact
    step = exact.view(len(exact), -1, 64).abs().amax(-1).repeat_interleave(64, 1) / 127
    assert (error.abs() <= 0.51 * step).all()


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_alpha_scales_the_residual(served, alpha):
    checkpoint = served(alpha, fmt=ResidualFormat(bits=8))
    exact = residual_of_format(checkpoint, ATTENTION, alpha)
    found = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize()
    # 0.5 of a scale is a bfloat16, 0.3 of it is rounded by at most 1 in 512
    assert (found - exact).abs().amax() <= (0 if alpha == 0.5 else exact.abs().amax() / 500)


def test_scales_of_float32_cost_only_their_rounding(served):
    checkpoint = served(fmt=ResidualFormat(bits=8, scale_dtype="float32"))
    exact = residual_of_format(checkpoint, ATTENTION)
    error = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize() - exact
    assert error.square().mean().sqrt() < 0.003 * exact.square().mean().sqrt()


def test_the_factor_of_float16_keeps_small_residuals(served):
    """Without it their scales are among the numbers of float16 that have few digits."""
    checkpoint = served(alpha=0.05)
    exact = residual_of_format(checkpoint, ATTENTION, 0.05)

    def loss(factor: float) -> float:
        found = checkpoint.residual_as_int8(ATTENTION, 64, torch.float16, CPU, factor=factor).dequantize() / factor
        return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert loss(8) < 0.5 * loss(1)


@pytest.mark.parametrize("case", ["alpha 0", "no residual"])
def test_modules_without_a_correction_get_zeros(served, case):
    checkpoint = (
        served(layer_alphas={ATTENTION: 0}) if case == "alpha 0" else served(corrected=lambda name: name != ATTENTION)
    )
    found = checkpoint.residual_as_int8(ATTENTION, 64, torch.bfloat16, CPU)
    assert not found.codes.any()
    assert not found.dequantize().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 64},
        {"schemes": {r".*self_attn\.": Scheme(128)}},
        {"group_size": -1},
        {"symmetric": False},
        {"negative": True},
    ],
    ids=str,
)
def test_w4_without_a_correction_is_kept(served, options, dtype):
    checkpoint = served(alpha=0, **options)
    found = checkpoint.as_int8(ATTENTION, 64, dtype, CPU)
    assert torch.equal(found.dequantize(), checkpoint.sidecar.base.dequantize(ATTENTION, scale_dtype=dtype))


def test_w4_without_a_correction_is_rounded_where_its_groups_are_too_small(served):
    checkpoint = served(alpha=0, group_size=32)
    exact = checkpoint.sidecar.base.dequantize(ATTENTION)
    error = checkpoint.as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize() - exact
    assert 0 < error.square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"negative": True}, {"group_size": -1}], ids=str)
def test_the_merged_weight_in_int8_loses_a_sixteenth_of_the_correction(served, options):
    """W4 has 16 steps where int8 has 254: what is left of the residual is about 16 in 254."""
    checkpoint = served(**options)
    exact = checkpoint.merged(ATTENTION, torch.float32, CPU)
    found = checkpoint.as_int8(ATTENTION, 64, torch.bfloat16, CPU).dequantize()
    lost = (found - exact).square().mean().sqrt() / residual(checkpoint, ATTENTION).square().mean().sqrt()
    assert 0.03 < lost < 0.07


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fmt": ResidualFormat(group_size=128)}, 128),
        ({"fmt": ResidualFormat(group_size=WHOLE_ROW)}, 704),
        ({"corrected": lambda name: name != DOWN, "group_size": 64}, 64),
        ({"corrected": lambda name: name != DOWN, "group_size": -1}, 704),
    ],
    ids=["residual", "residual by row", "W4", "W4 by row"],
)
def test_group_size_of_a_module(served, options, expected):
    assert served(**options).group_size(DOWN) == expected


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("fused", "dense"),
    [({}, ["q_proj"]), (FUSED, ["q_proj", "k_proj", "v_proj"])],
    ids=["alone", "in a fused layer"],
)
def test_bytes_when_merged(served, fused, dense):
    checkpoint = served(corrected=lambda name: name == ATTENTION)
    base = checkpoint.sidecar.base
    as_w4 = sum(base.tensor(name).nbytes for name in base)
    rows = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    entries = sum(rows[name] * 256 for name in dense)
    packed = entries // 2 + entries // 64 * 2 + len(dense) * 16  # codes, scales, shapes
    assert checkpoint.merged_bytes(fused) == as_w4 + 2 * entries - packed
