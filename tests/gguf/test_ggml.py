import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.gguf import ggml
from srd_modifier.gguf.ggml import GGMLType

TYPES = list(GGMLType)
K_QUANTS = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]
WEIGHTED = [*K_QUANTS, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1]
UNWEIGHTED = [type_ for type_ in TYPES if type_ not in WEIGHTED]

# for a normal distribution: root mean square error, largest error in any entry
ERRORS = {
    GGMLType.F32: (0.0, 0.0),
    GGMLType.F16: (3e-4, 2e-3),
    GGMLType.BF16: (2e-3, 1e-2),
    GGMLType.Q8_0: (6e-3, 2e-2),
    GGMLType.Q6_K: (0.019, 0.1),
    GGMLType.Q5_K: (0.038, 0.2),
    GGMLType.Q5_1: (0.040, 0.15),
    GGMLType.Q5_0: (0.045, 0.3),
    GGMLType.Q4_K: (0.075, 0.4),
    GGMLType.Q4_1: (0.082, 0.3),
    GGMLType.Q4_0: (0.090, 0.6),
}


def normal(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def some_importance(columns: int = 512) -> Tensor:
    return normal(1, columns, seed=1)[0].square() + 0.01


def in_one_call(
    weight: Tensor, ggml_type: GGMLType, importance: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> NDArray[np.uint8]:
    with monkeypatch.context() as patch:
        patch.setattr(ggml, "_BLOCK_WEIGHTS", weight.numel())
        return ggml.quantize(weight, ggml_type, importance)


@pytest.fixture
def not_loaded() -> Iterator[None]:
    """As before the first use, and again afterwards."""
    ggml._library.cache_clear()
    yield
    ggml._library.cache_clear()


# types


@pytest.mark.parametrize(
    ("ggml_type", "number", "bits"),
    [
        (GGMLType.F32, 0, 32),
        (GGMLType.F16, 1, 16),
        (GGMLType.BF16, 30, 16),
        (GGMLType.Q4_0, 2, 4.5),
        (GGMLType.Q4_1, 3, 5),
        (GGMLType.Q5_0, 6, 5.5),
        (GGMLType.Q5_1, 7, 6),
        (GGMLType.Q8_0, 8, 8.5),
        (GGMLType.Q4_K, 12, 4.5),
        (GGMLType.Q5_K, 13, 5.5),
        (GGMLType.Q6_K, 14, 6.5625),
    ],
)
def test_numbers_and_sizes_of_the_gguf_specification(ggml_type: GGMLType, number: int, bits: float) -> None:
    assert ggml_type.number == number
    assert ggml.bits_per_weight(ggml_type) == bits
    assert ggml_type.row_bytes(1024) == 1024 * bits / 8


def test_a_row_of_partial_blocks_has_no_size() -> None:
    with pytest.raises(ValueError, match="rows of 576 weights cannot be Q4_K, whose blocks are of 256"):
        GGMLType.Q4_K.row_bytes(576)


# round trips


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_round_trip(ggml_type: GGMLType, weighted: bool) -> None:
    weight = normal()
    importance = some_importance() if weighted else None
    data = ggml.quantize(weight, ggml_type, importance)
    assert data.dtype == np.uint8
    assert data.shape == (24, ggml_type.row_bytes(512))
    assert data.flags.c_contiguous
    assert ggml.validate(data, ggml_type)
    error = ggml.dequantize(data, ggml_type) - weight
    assert error.dtype == torch.float32
    root_mean_square, largest = ERRORS[ggml_type]
    if weighted:
        assert (error.square() @ some_importance()).mean() <= root_mean_square**2 * some_importance().sum()
    else:
        assert error.square().mean().sqrt() <= root_mean_square
        assert error.abs().max() <= largest


@pytest.mark.parametrize(
    ("ggml_type", "dtype"),
    [(GGMLType.F32, torch.float32), (GGMLType.F16, torch.float16), (GGMLType.BF16, torch.bfloat16)],
)
def test_floats_are_rounded_as_torch_rounds_them(ggml_type: GGMLType, dtype: torch.dtype) -> None:
    weight = normal() * torch.logspace(-8, 4, 512)
    assert torch.equal(ggml.dequantize(ggml.quantize(weight, ggml_type), ggml_type), weight.to(dtype).float())


@pytest.mark.parametrize("ggml_type", [type_ for type_ in TYPES if type_ not in K_QUANTS])
def test_the_bytes_are_those_of_gguf_where_it_can_quantize(ggml_type: GGMLType) -> None:
    import gguf

    weight = normal()
    expected = gguf.quants.quantize(weight.numpy(), ggml_type.in_gguf()).view(np.uint8)
    np.testing.assert_array_equal(ggml.quantize(weight, ggml_type), expected)


def test_a_q4_k_block_written_by_hand() -> None:
    # d 1, dmin 1; sub-block j has scale 63 - 7j and min 9j; codes 0 to 15 twice: weights that the type holds exactly
    scales, mins = 63 - 7 * torch.arange(8), 9 * torch.arange(8)
    codes = torch.arange(32) % 16
    weight = (scales[:, None] * codes - mins[:, None]).reshape(1, 256).float()
    data = ggml.quantize(weight, GGMLType.Q4_K)
    low, high, minimum, top = scales[:4], scales[4:], mins[:4], mins[4:]
    packed = [low | (high >> 4) << 6, minimum | (top >> 4) << 6, high & 15 | (top & 15) << 4]
    assert data[0, :4].tolist() == [0x00, 0x3C, 0x00, 0x3C]
    assert data[0, 4:16].tolist() == torch.cat(packed).tolist()
    assert data[0, 16:].tolist() == (codes * 17).repeat(4).tolist()
    assert torch.equal(ggml.dequantize(data, GGMLType.Q4_K), weight)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_zeros_stay_zeros(ggml_type: GGMLType) -> None:
    weight = torch.zeros(2, 256)
    assert torch.equal(ggml.dequantize(ggml.quantize(weight, ggml_type), ggml_type), weight)


def test_an_inverse_does_not_share_memory_with_its_data() -> None:
    data = ggml.quantize(normal(), GGMLType.F32)
    data.flags.writeable = False
    weight = ggml.dequantize(data, GGMLType.F32)
    weight += 1
    assert torch.equal(ggml.dequantize(data, GGMLType.F32), normal())


def test_bfloat16_strides_and_gradients_are_read() -> None:
    wide = normal(32, 1024).to(torch.bfloat16)
    expected = ggml.quantize(wide[:, ::2].float().contiguous(), GGMLType.Q4_K)
    given = wide[:, ::2].requires_grad_()
    np.testing.assert_array_equal(ggml.quantize(given, GGMLType.Q4_K), expected)


def test_a_strided_view_of_the_data_is_read() -> None:
    data = ggml.quantize(normal(), GGMLType.Q8_0)
    assert ggml.validate(data[::2], GGMLType.Q8_0)
    expected = ggml.dequantize(data, GGMLType.Q8_0)[::2]
    assert torch.equal(ggml.dequantize(data[::2], GGMLType.Q8_0), expected)


# importance


@pytest.mark.parametrize("ggml_type", WEIGHTED)
def test_importance_lowers_the_weighted_error(ggml_type: GGMLType) -> None:
    weight, importance = normal(), some_importance().square()
    plain, weighted = ggml.quantize(weight, ggml_type), ggml.quantize(weight, ggml_type, importance)
    assert (plain != weighted).any()

    def cost(data: NDArray[np.uint8]) -> float:
        return float(((ggml.dequantize(data, ggml_type) - weight).square() @ importance).sum())

    assert cost(weighted) < cost(plain)


@pytest.mark.parametrize("ggml_type", UNWEIGHTED)
def test_importance_is_not_used_by_the_finer_types(ggml_type: GGMLType) -> None:
    plain, weighted = ggml.quantize(normal(), ggml_type), ggml.quantize(normal(), ggml_type, some_importance())
    np.testing.assert_array_equal(plain, weighted)


@pytest.mark.parametrize("ggml_type", WEIGHTED)
def test_only_the_ratios_of_importance_count(ggml_type: GGMLType) -> None:
    # powers of two, so that nothing is rounded; the range is the one that the docstring promises
    expected = ggml.quantize(normal(), ggml_type, some_importance())
    for factor in (2.0**-25, 2.0**25):
        scaled = ggml.quantize(normal(), ggml_type, some_importance() * factor)
        np.testing.assert_array_equal(scaled, expected)


# threads


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_blocks_of_rows_give_the_bytes_of_one_call(
    ggml_type: GGMLType, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = normal(23), some_importance() if weighted else None
    expected = in_one_call(weight, ggml_type, importance, monkeypatch)
    monkeypatch.setattr(ggml, "_BLOCK_WEIGHTS", 3 * 512)
    for threads in (1, 4):
        np.testing.assert_array_equal(ggml.quantize(weight, ggml_type, importance, threads=threads), expected)


def test_a_row_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = in_one_call(normal(), GGMLType.Q6_K, None, monkeypatch)
    monkeypatch.setattr(ggml, "_BLOCK_WEIGHTS", 100)
    np.testing.assert_array_equal(ggml.quantize(normal(), GGMLType.Q6_K, threads=3), expected)


@pytest.mark.parametrize(("rows", "threads", "elsewhere"), [(2, 4, False), (24, 1, False), (24, 4, True)])
def test_threads_start_only_where_they_help(
    rows: int, threads: int, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, own, others = set(), threading.current_thread(), threading.Event()
    quantize_rows = ggml._quantize_rows

    def note(*arguments: object) -> None:
        seen.add(threading.current_thread())
        if threading.current_thread() is not own:
            others.set()
        elif elsewhere:
            assert others.wait(timeout=60), "no other thread takes a part"
        quantize_rows(*arguments)

    ggml._library()  # its own check quantizes too
    monkeypatch.setattr(ggml, "_quantize_rows", note)
    monkeypatch.setattr(ggml, "_BLOCK_WEIGHTS", 2 * 512)
    ggml.quantize(normal(rows), GGMLType.Q8_0, threads=threads)
    assert (seen != {own}) == elsewhere
    assert len(seen) <= threads


def test_threads_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was forked has none of them."""
    busy, go_on = ThreadPoolExecutor(1), threading.Event()
    busy.submit(go_on.wait)
    monkeypatch.setattr(ggml, "_pool", lambda: busy)
    monkeypatch.setattr(ggml, "_BLOCK_WEIGHTS", 512)
    try:
        found = ggml.quantize(normal(), GGMLType.Q8_0, threads=4)
    finally:
        go_on.set()
        busy.shutdown()
    np.testing.assert_array_equal(found, ggml.quantize(normal(), GGMLType.Q8_0, threads=1))


def test_what_fails_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_BLOCK_WEIGHTS", 512)
    weight = normal()
    weight[17, 3] = torch.nan
    with pytest.raises(ValueError, match="the weight has entries that are not finite in float32"):
        ggml.quantize(weight, GGMLType.Q4_K, threads=4)


# bad input


@pytest.mark.parametrize("weight", [torch.zeros(256), torch.zeros(1, 1, 256), torch.zeros(0, 256), torch.zeros(4, 0)])
def test_a_weight_that_is_not_a_matrix(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a floating point matrix, got torch.float32 of shape \("):
        ggml.quantize(weight, GGMLType.Q8_0)


def test_a_weight_of_integers() -> None:
    with pytest.raises(ValueError, match=r"expected a floating point matrix, got torch.int8 of shape \(1, 32\)"):
        ggml.quantize(torch.zeros(1, 32, dtype=torch.int8), GGMLType.Q8_0)


def test_rows_that_are_not_whole_blocks() -> None:
    with pytest.raises(ValueError, match="rows of 48 weights cannot be Q8_0, whose blocks are of 32"):
        ggml.quantize(torch.zeros(2, 48), GGMLType.Q8_0)


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_weight_that_is_not_finite(ggml_type: GGMLType, entry: float) -> None:
    weight = normal()
    weight[23, 511] = entry
    with pytest.raises(ValueError, match="the weight has entries that are not finite in float32"):
        ggml.quantize(weight, ggml_type)


def test_a_weight_that_overflows_float32() -> None:
    with pytest.raises(ValueError, match="the weight has entries that are not finite in float32"):
        ggml.quantize(torch.full((1, 32), 1e300, dtype=torch.float64), GGMLType.Q8_0)


@pytest.mark.parametrize("entry", [1e5, -1e30])
@pytest.mark.parametrize("ggml_type", [type_ for type_ in TYPES if type_ not in (GGMLType.F32, GGMLType.BF16)])
def test_a_weight_beyond_fp16(ggml_type: GGMLType, entry: float) -> None:
    weight = normal()
    weight[0, 0] = entry
    with pytest.raises(ValueError, match=rf"an entry of magnitude 1e\+\d\d, too large for {ggml_type.value}"):
        ggml.quantize(weight, ggml_type)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_the_largest_fp16_is_within_every_type(ggml_type: GGMLType) -> None:
    weight = normal()
    weight[0, 0], weight[1, 300] = 65504, -65504
    restored = ggml.dequantize(ggml.quantize(weight, ggml_type), ggml_type)
    assert restored[0, 0] == pytest.approx(65504, rel=0.01)
    assert restored[1, 300] == pytest.approx(-65504, rel=0.01)


def test_scales_that_overflow_are_not_written() -> None:
    # bfloat16 keeps float32's range but not its last step
    weight = torch.full((1, 32), torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="gives BF16 scales that are not finite"):
        ggml.quantize(weight, GGMLType.BF16)


@pytest.mark.parametrize("shape", [(511,), (1, 512), ()])
def test_an_importance_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a floating point importance \[512\], got torch.float32 of shape"):
        ggml.quantize(normal(), GGMLType.Q4_K, torch.ones(shape))


def test_an_importance_of_integers() -> None:
    with pytest.raises(ValueError, match=r"expected a floating point importance \[512\], got torch.int64"):
        ggml.quantize(normal(), GGMLType.Q4_K, torch.ones(512, dtype=torch.int64))


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -1.0, 0.0])
def test_an_importance_that_is_not_positive_and_finite(entry: float) -> None:
    importance = some_importance()
    importance[7] = entry
    with pytest.raises(ValueError, match="the importance has entries that are not positive and finite in float32"):
        ggml.quantize(normal(), GGMLType.Q4_K, importance)


def test_an_importance_that_overflows() -> None:
    with pytest.raises(ValueError, match="the weight, with this importance, gives Q4_K scales that are not finite"):
        ggml.quantize(normal(), GGMLType.Q4_K, torch.full((512,), 1e36))


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threads is 0, expected at least 1"):
        ggml.quantize(normal(), GGMLType.Q4_K, threads=0)


@pytest.mark.parametrize("read", [ggml.validate, ggml.dequantize])
def test_data_that_is_not_a_matrix_of_bytes(read: object) -> None:
    for data in (np.zeros(144, np.uint8), np.zeros((1, 144), np.int8), np.zeros((0, 144), np.uint8)):
        with pytest.raises(ValueError, match=r"expected a matrix of uint8, got u?int8 of shape \("):
            read(data, GGMLType.Q4_K)


@pytest.mark.parametrize("read", [ggml.validate, ggml.dequantize])
def test_data_of_partial_blocks(read: object) -> None:
    # three rows of 48 bytes would be one block of 144
    with pytest.raises(ValueError, match="rows of 48 bytes cannot be Q4_K, whose blocks are of 144"):
        read(np.zeros((3, 48), np.uint8), GGMLType.Q4_K)


@pytest.mark.parametrize("scale", [0x7E00, 0x7C00], ids=["nan", "infinity"])
@pytest.mark.parametrize(
    ("ggml_type", "offset"),
    [
        (GGMLType.F16, 0),
        (GGMLType.Q4_0, 0),
        (GGMLType.Q4_1, 2),
        (GGMLType.Q5_0, 0),
        (GGMLType.Q5_1, 2),
        (GGMLType.Q8_0, 0),
        (GGMLType.Q4_K, 0),
        (GGMLType.Q4_K, 2),
        (GGMLType.Q5_K, 2),
        (GGMLType.Q6_K, 208),
    ],
)
def test_a_scale_that_is_not_finite_is_not_valid(ggml_type: GGMLType, offset: int, scale: int) -> None:
    data = ggml.quantize(normal(), ggml_type)
    start = ggml_type.block_bytes + offset
    data[5, start : start + 2] = scale & 255, scale >> 8
    assert not ggml.validate(data, ggml_type)


# the library


@pytest.mark.parametrize("missing", ["gguf", "xllamacpp"])
@pytest.mark.usefixtures("not_loaded")
def test_a_missing_library_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"{missing} is not installed; it comes with: pip install 'srd-modifier\[gguf\]'"
    with pytest.raises(MissingExtraError, match=message):
        ggml.quantize(normal(), GGMLType.Q4_K)


@pytest.mark.usefixtures("not_loaded")
def test_reading_back_needs_no_xllamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ggml.quantize(normal(), GGMLType.Q8_0)
    ggml._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert ggml.dequantize(data, GGMLType.Q8_0).shape == (24, 512)


@pytest.mark.parametrize("which", ggml._KNOWN_DIGESTS, ids=str)
@pytest.mark.usefixtures("not_loaded")
def test_other_bytes_than_the_tested_version_writes(
    which: tuple[GGMLType, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ggml._KNOWN_DIGESTS, which, "0" * 64)
    message = (
        rf"the ggml in xllamacpp \S+ lays out or rounds {which[0].value} blocks differently from the tested version, "
        rf"{ggml.TESTED_XLLAMACPP}; pip install 'xllamacpp=={ggml.TESTED_XLLAMACPP}' helps"
    )
    for _ in range(2):  # an error is not taken for a library the second time
        with pytest.raises(SRDError, match=message):
            ggml.quantize(normal(), GGMLType.F32)


@pytest.mark.usefixtures("not_loaded")
def test_other_sizes_than_gguf_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    monkeypatch.setitem(gguf.GGML_QUANT_SIZES, GGMLType.Q5_K.in_gguf(), (256, 175))
    with pytest.raises(SRDError, match="lays out or rounds Q5_K blocks differently"):
        ggml.quantize(normal(), GGMLType.Q8_0)


def test_the_known_row_is_away_from_rounding_limits() -> None:
    weight, importance = ggml._known_row()
    generator = torch.Generator().manual_seed(0)
    for ggml_type, weighted in ggml._KNOWN_DIGESTS:
        given = importance if weighted else None
        expected = ggml.quantize(weight, ggml_type, given)
        for _ in range(50):
            moved = weight * (1 + 1e-6 * (2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1))
            np.testing.assert_array_equal(ggml.quantize(moved, ggml_type, given), expected)


@pytest.mark.usefixtures("not_loaded")
def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "xllamacpp.abi3.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(ggml, "_library_path", lambda: path)
    with pytest.raises(SRDError, match=r"xllamacpp\.abi3\.so is not a library that exports ggml's quantizer"):
        ggml.quantize(normal(), GGMLType.Q4_K)


@pytest.mark.usefixtures("not_loaded")
def test_a_library_without_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    import _ctypes

    monkeypatch.setattr(ggml, "_library_path", lambda: Path(_ctypes.__file__))
    with pytest.raises(SRDError, match=r"is not a library that exports ggml's quantizer \(.*ggml_row_size"):
        ggml.quantize(normal(), GGMLType.Q4_K)


@pytest.mark.usefixtures("not_loaded")
def test_a_package_without_an_extension_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SRDError, match=r"xllamacpp has no extension module in .*xllamacpp; pip install"):
        ggml.quantize(normal(), GGMLType.Q4_K)


def test_importing_loads_neither_library() -> None:
    code = "import sys, srd_modifier.gguf.ggml; print(sorted({'gguf', 'xllamacpp'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_quantizing_does_not_start_llama_cpp() -> None:
    code = (
        "import sys, torch; from srd_modifier.gguf import ggml; ggml.quantize(torch.ones(1, 32), ggml.GGMLType.Q8_0);"
        "print('xllamacpp' in sys.modules); import xllamacpp; print(xllamacpp.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "xllamacpp"]
