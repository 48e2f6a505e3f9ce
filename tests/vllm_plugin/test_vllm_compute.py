"""How layers are computed: what `compute` chooses, which of vLLM's kernels int8 gets, and single layers against torch.

Without a GPU the platform is a stand-in and the kernels plain torch. The last tests need a GPU and run vLLM's own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_models import make_llama, save_model
from rtn import write_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms import PlatformEnum
from vllm.platforms.interface import DeviceCapability

from srd_modifier.checkpoint.config import read_json
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.residual import ResidualFormat
from srd_modifier.vllm import config as plugin
from srd_modifier.vllm.checkpoint import ServedCheckpoint
from srd_modifier.vllm.config import CorrectedConfig
from srd_modifier.vllm.int8 import pack_int8
from srd_modifier.vllm.layers import (
    RESIDUAL,
    Int8LinearMethod,
    MergedLinearMethod,
    SplitLinearMethod,
    int8_scheme,
    scale_factor,
)

LAYER = "model.layers.0"
QKV, DOWN = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.down_proj"
PARTS = {QKV: [f"{LAYER}.self_attn.{part}_proj" for part in "qkv"], DOWN: [DOWN]}
ROWS, COLUMNS = {QKV: [256, 128, 128], DOWN: [256]}, {QKV: 256, DOWN: 704}  # 704 is 11 times 64
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
KERNELS = "vllm.model_executor.kernels.linear"
GIGABYTES = 2**30

Configure = Callable[..., CorrectedConfig]


class Cuda:
    """A platform that is a GPU, as far as the choice of kernels asks."""

    _enum = PlatformEnum.CUDA
    device_name = "stand-in"

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 80 * GIGABYTES) -> None:
        self._capability, self._memory = DeviceCapability(*capability), memory

    def get_device_capability(self) -> DeviceCapability:
        return self._capability

    def is_device_capability(self, capability: int) -> bool:
        return self._capability.to_int() == capability

    def has_device_capability(self, capability: int) -> bool:
        return self._capability.to_int() >= capability

    def get_device_total_memory(self) -> int:
        return self._memory

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def is_cpu(self) -> bool:
        return False

    is_rocm = is_xpu = is_device_capability_family = lambda self, *_: False


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": COLUMNS[QKV], "intermediate_size": COLUMNS[DOWN]}
    return save_model(make_llama(**sizes), tmp_path_factory.mktemp("compute") / "model")


@pytest.fixture
def configure(one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """The quantization config of a checkpoint of one layer, as vLLM sets it up."""

    def make(
        compute: str = "auto",
        *,
        alpha: float = 1,
        layer_alphas: dict[str, float] | None = None,
        platform: Any = None,
        ranks: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> CorrectedConfig:
        engine = SimpleNamespace(
            model_config=SimpleNamespace(dtype=dtype),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1),
            cache_config=SimpleNamespace(gpu_memory_utilization=0.9),
        )
        monkeypatch.setattr(plugin, "get_current_vllm_config", lambda: engine)
        if platform is not None:
            monkeypatch.setattr(plugin, "current_platform", platform)
        directory = write_checkpoint(one_layer, tmp_path / "checkpoint", **options)
        config = CorrectedConfig.from_config(read_json(directory / "config.json")["quantization_config"])
        config.packed_modules_mapping = PACKED_MODULES
        given = {"alpha": alpha, "layer_alphas": layer_alphas or {}, "compute": compute}
        config.checkpoint = ServedCheckpoint.open(directory, given)
        return config

    return make


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Be a rank of tensor parallelism; at first the only one."""

    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: ranks)

    become(0, 1)
    return become


def method_of(config: CorrectedConfig, prefix: str) -> Any:
    return config.get_quant_method(bare_layer(), prefix)


def bare_layer() -> Any:
    layer = object.__new__(LinearBase)
    nn.Module.__init__(layer)
    return layer


# What is chosen


def test_without_a_gpu_auto_merges(configure):
    config = configure()
    assert config.compute == "merge"
    assert isinstance(method_of(config, QKV), MergedLinearMethod)


@pytest.mark.parametrize(("share", "expected"), [(0.51, "int8"), (0.49, "merge")])
def test_auto_merges_while_half_of_the_memory_stays_free(configure, monkeypatch, share, expected):
    config = configure()
    memory = int(config.checkpoint.merged_bytes(PACKED_MODULES) / share / 0.9)
    monkeypatch.setattr(plugin, "current_platform", Cuda(memory=memory))
    assert config.compute == expected


def test_ranks_share_the_weights(configure, monkeypatch):
    config = configure(ranks=2)
    memory = int(1.01 * config.checkpoint.merged_bytes(PACKED_MODULES) / 0.9)
    monkeypatch.setattr(plugin, "current_platform", Cuda(memory=memory))
    assert config.compute == "merge"


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_int8_kernels_need_a_gpu(configure, compute):
    with pytest.raises(ConfigError, match=rf"^srd_config.compute '{compute}' needs a CUDA device, this is .*'merge'$"):
        method_of(configure(compute), QKV)


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_int8_kernels_have_no_float32(configure, compute):
    config = configure(compute, platform=Cuda(), dtype=torch.float32)
    with pytest.raises(ConfigError, match=rf"'{compute}' needs bfloat16 or float16, not torch.float32; use 'merge'$"):
        method_of(config, QKV)


@pytest.mark.parametrize(
    ("compute", "expected"), [("merge", MergedLinearMethod), ("int8", Int8LinearMethod), ("split", SplitLinearMethod)]
)
def test_what_the_user_wants_is_done(configure, compute, expected):
    method = method_of(configure(compute, platform=Cuda()), QKV)
    assert type(method) is expected
    assert method.parts == tuple(PARTS[QKV])


@pytest.mark.parametrize("compute", ["auto", "int8", "split"])
def test_layers_without_a_correction_stay_w4(configure, compute):
    config = configure(compute, platform=Cuda(memory=2**20), layer_alphas={"re:.*mlp.*": 0})
    assert type(method_of(config, DOWN)).__name__ == "CompressedTensorsLinearMethod"
    assert type(method_of(config, QKV)).__name__ != "CompressedTensorsLinearMethod"


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_layers_that_are_not_wholly_quantized_are_merged(configure, compute):
    config = configure(compute, platform=Cuda(), quantized=r"(q|v|down)_proj$", ignore=("lm_head", "re:.*k_proj$"))
    assert type(method_of(config, QKV)) is MergedLinearMethod


@pytest.mark.parametrize("compute", ["int8", "split"])
@pytest.mark.parametrize(
    ("prefix", "ranks", "stored", "expected"),
    [(QKV, 1, 128, 128), (QKV, 1, 32, 32), (DOWN, 1, 128, 64), (DOWN, 2, 64, 32)],
)
def test_groups_are_those_of_the_residual_where_they_fit(configure, compute, prefix, ranks, stored, expected):
    config = configure(compute, platform=Cuda(), ranks=ranks, fmt=ResidualFormat(group_size=stored))
    assert method_of(config, prefix).group_size == expected


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_groups_that_fit_nowhere_are_refused(configure, compute):
    config = configure(compute, platform=Cuda(), ranks=4)
    message = rf"^{DOWN}: groups of 32, 64 or 128 do not divide its 704 columns among 4 ranks, .* use 'merge'$"
    with pytest.raises(ConfigError, match=message):
        method_of(config, DOWN)


def test_what_auto_finds_no_groups_for_is_merged(configure):
    config = configure(platform=Cuda(memory=2**20), ranks=4)
    assert config.compute == "int8"
    assert type(method_of(config, DOWN)) is MergedLinearMethod
    assert type(method_of(config, QKV)) is Int8LinearMethod


# Which kernel vLLM chooses


@pytest.mark.parametrize(
    ("capability", "group_size", "rows", "kernel"),
    [
        ((9, 0), 128, 256, "MacheteLinearKernel"),
        ((9, 0), 64, 256, "MacheteLinearKernel"),
        ((9, 0), 32, 256, "MarlinLinearKernel"),
        ((9, 0), 64, 192, "MarlinLinearKernel"),  # Machete wants multiples of 128
        ((8, 0), 128, 256, "MarlinLinearKernel"),
        ((8, 0), 64, 256, "MarlinLinearKernel"),
        ((8, 0), 32, 256, "MarlinLinearKernel"),
        ((7, 5), 64, 256, "MarlinLinearKernel"),
        ((10, 0), 64, 256, "MarlinLinearKernel"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_of_int8(monkeypatch, rank, capability, group_size, rows, kernel, dtype):
    for module in (
        KERNELS,
        *(f"{KERNELS}.mixed_precision.{name}" for name in ("cutlass", "machete", "marlin", "exllama", "humming")),
        "vllm.model_executor.layers.quantization.utils.marlin_utils",
    ):
        monkeypatch.setattr(f"{module}.current_platform", Cuda(capability))
    scheme = int8_scheme(group_size, "layer")
    scheme.create_weights(
        nn.Module(),
        output_size=rows,
        input_size=512,
        output_partition_sizes=[rows],
        input_size_per_partition=256,  # of two ranks
        params_dtype=dtype,
        weight_loader=lambda *_: None,
    )
    assert type(scheme.kernel).__name__ == kernel


# Single layers


class TorchKernel(MPLinearKernel):
    """Symmetric groups of 4 or 8 bits in plain torch. Like Marlin it permutes the bias of its layer in place."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        kind = self.config.weight_type
        codes = unpack_quantized_values_into_int32(layer.weight_packed.data, kind, packed_dim=1) - kind.bias
        scale = layer.weight_scale.data.float().repeat_interleave(self.config.group_size, 1)
        del layer.weight_packed, layer.weight_scale
        layer.weight = nn.Parameter(codes * scale, requires_grad=False)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.flip(0)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x.float(), layer.weight, None if bias is None else bias.float().flip(0)).to(x.dtype)


@pytest.fixture
def torch_kernel(monkeypatch: pytest.MonkeyPatch, rank: Any) -> None:
    scheme = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"
    monkeypatch.setattr(f"{scheme}.choose_mp_linear_kernel", lambda config: TorchKernel)


def stream(config: CorrectedConfig, method: Any, module: str, device: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a part of a layer is given, by their names in the layer."""
    checkpoint, dtype = config.checkpoint, plugin.get_current_vllm_config().model_config.dtype
    if isinstance(method, Int8LinearMethod):
        prefix, weight = "", checkpoint.as_int8(module, method.group_size, dtype, torch.device(device))
    else:
        prefix, factor = f"{RESIDUAL}.", scale_factor(dtype)
        weight = checkpoint.residual_as_int8(module, method.group_size, dtype, torch.device(device), factor=factor)
        for suffix in ("weight_packed", "weight_scale"):
            yield suffix, checkpoint.sidecar.base.tensor(f"{module}.{suffix}")
    yield f"{prefix}weight_packed", pack_int8(weight.codes)
    yield f"{prefix}weight_scale", weight.scale


def create(
    config: CorrectedConfig, prefix: str, *, ranks: int = 1, bias: Tensor | None = None, device: str = "cpu"
) -> Any:
    """A layer of vLLM as it is before loading."""
    layer, across = bare_layer(), prefix == DOWN
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone(), requires_grad=False))
    layer.quant_method = config.get_quant_method(layer, prefix)
    with torch.device(device):
        layer.quant_method.create_weights(
            layer=layer,
            input_size_per_partition=COLUMNS[prefix] // (ranks if across else 1),
            output_partition_sizes=[rows // (1 if across else ranks) for rows in ROWS[prefix]],
            input_size=COLUMNS[prefix],
            output_size=sum(ROWS[prefix]),
            params_dtype=plugin.get_current_vllm_config().model_config.dtype,
            weight_loader=lambda *_: None,
        )
    return layer


def load(config: CorrectedConfig, layer: Any, prefix: str, *, leave_out: str = "", device: str = "cpu") -> None:
    """Load a layer through the parameters' own loaders, which know fusing and slicing."""
    start = 0
    for module, rows in zip(PARTS[prefix], layer.output_partition_sizes, strict=True):
        for name, tensor in stream(config, layer.quant_method, module, device):
            parameter = layer.get_parameter(name)
            if f"{module}.{name}" == leave_out:
                continue
            if prefix == DOWN:
                parameter.load_row_parallel_weight(tensor)
            else:
                parameter.load_merged_column_weight(tensor, shard_offset=start, shard_size=rows)
        start += rows


def process(layer: Any) -> None:
    """What vLLM does after loading: every module that has a method, by itself."""
    for module in layer.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def exact(config: CorrectedConfig, prefix: str) -> Tensor:
    """The weight of a layer, of all its parts."""
    cpu = torch.device("cpu")
    return torch.cat([config.checkpoint.merged(module, torch.float32, cpu) for module in PARTS[prefix]])


def inputs(prefix: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(5, COLUMNS[prefix], generator=torch.Generator().manual_seed(0)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


# of the output: the rounding of the dtype once or twice, and for int8 1/127 of the largest weight
BOUNDS = {("int8", torch.bfloat16): 0.008, ("int8", torch.float16): 0.007}
BOUNDS |= {("split", torch.bfloat16): 0.004, ("split", torch.float16): 5e-4}
W4_ERROR = 0.05  # an eighth of the weights, about: what a layer is off by without its correction


@pytest.mark.parametrize(("compute", "dtype"), BOUNDS, ids=str)
@pytest.mark.parametrize("prefix", [QKV, DOWN])
def test_layers_are_torchs(configure, torch_kernel, compute, dtype, prefix):
    config = configure(compute, platform=Cuda(), dtype=dtype)
    layer = create(config, prefix)
    load(config, layer, prefix)
    process(layer)
    x = inputs(prefix, dtype)
    expected = linear(x.float(), exact(config, prefix))
    assert relative_error(layer.quant_method.apply(layer, x), expected) < BOUNDS[compute, dtype]
    base = torch.cat([config.checkpoint.sidecar.base.dequantize(module) for module in PARTS[prefix]])
    assert relative_error(linear(x.float(), base), expected) > W4_ERROR


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_parts_without_a_correction_are_w4(configure, torch_kernel, compute):
    """Of a fused layer of which another part has one; and their rows are exact."""
    config = configure(compute, platform=Cuda(), dtype=torch.float16, corrected=lambda name: name.endswith("k_proj"))
    layer = create(config, QKV)
    load(config, layer, QKV)
    process(layer)
    x = inputs(QKV, torch.float16)
    found, expected = layer.quant_method.apply(layer, x), linear(x.float(), exact(config, QKV))
    assert relative_error(found[:, :256], expected[:, :256]) < 5e-4
    assert relative_error(found[:, 256:384], expected[:, 256:384]) < BOUNDS[compute, torch.float16]


@pytest.mark.parametrize("compute", ["int8", "split"])
@pytest.mark.parametrize("prefix", [QKV, DOWN])
def test_ranks_have_their_slices(configure, torch_kernel, rank, compute, prefix):
    dtype = torch.float16
    config = configure(compute, platform=Cuda(), ranks=2, dtype=dtype, group_size=32)
    x, outputs = inputs(prefix, dtype), []
    for number in (0, 1):
        rank(number, 2)
        layer = create(config, prefix, ranks=2)
        load(config, layer, prefix)
        process(layer)
        outputs.append(layer.quant_method.apply(layer, x.chunk(2, 1)[number] if prefix == DOWN else x))
    if prefix == DOWN:
        found = outputs[0] + outputs[1]
    else:  # the parts of each rank are together
        parts = [output.split([rows // 2 for rows in ROWS[QKV]], 1) for output in outputs]
        found = torch.cat([torch.cat(part, 1) for part in zip(*parts, strict=True)], 1)
    assert relative_error(found, linear(x.float(), exact(config, prefix))) < BOUNDS[compute, dtype] + 1e-3


@pytest.mark.parametrize("compute", ["int8", "split"])
def test_the_bias_is_permuted_and_added_once(configure, torch_kernel, compute):
    config = configure(compute, platform=Cuda(), dtype=torch.float16)
    bias = torch.arange(512).half() / 512
    layer = create(config, QKV, bias=bias)
    load(config, layer, QKV)
    process(layer)
    assert torch.equal(layer.bias, bias.flip(0))
    x = inputs(QKV, torch.float16)
    expected = linear(x.float(), exact(config, QKV), bias.float())
    assert relative_error(layer.quant_method.apply(layer, x, layer.bias), expected) < BOUNDS[compute, torch.float16]


@pytest.mark.parametrize("compute", ["int8", "split"])
@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_what_has_not_arrived_is_named(configure, torch_kernel, compute, part):
    config = configure(compute, platform=Cuda())
    layer = create(config, QKV)
    module = f"{LAYER}.self_attn.{part}"
    left_out = f"{module}.{RESIDUAL}.weight_scale" if compute == "split" else f"{module}.weight_scale"
    load(config, layer, QKV, leave_out=left_out)
    with pytest.raises(CheckpointError, match=rf"^{module}: its residual is promised"):
        process(layer)


def test_the_factor_of_split_is_a_power_of_two_and_only_float16s():
    """Of float16 because of its small numbers; a power of two changes no digit."""
    assert scale_factor(torch.bfloat16) == 1
    factor = scale_factor(torch.float16)
    assert factor > 1
    assert torch.tensor(factor).frexp().mantissa == 0.5


def test_the_factor_of_split_does_not_overflow_sooner_than_the_layer(configure):
    checkpoint = configure().checkpoint
    for module in checkpoint.quantized:
        whole = checkpoint.merged(module, torch.float32, torch.device("cpu"))
        residual = whole - checkpoint.sidecar.base.dequantize(module)
        assert scale_factor(torch.float16) * residual.norm() < whole.norm()


# On a GPU, with vLLM's kernels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("compute", "dtype"), BOUNDS, ids=str)
@pytest.mark.parametrize("stored", [32, 64, 128])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_kernels_are_torchs(configure, rank, compute, dtype, stored, with_bias, tokens):
    from vllm.config import VllmConfig, set_current_vllm_config

    config = configure(compute, dtype=dtype, group_size=32, fmt=ResidualFormat(group_size=stored))
    bias = torch.randn(512, dtype=dtype, device="cuda") if with_bias else None
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        layer = create(config, QKV, bias=bias, device="cuda")
        load(config, layer, QKV, device="cuda")
        process(layer)
        x = inputs(QKV, dtype).repeat(60, 1)[:tokens]
        found = layer.quant_method.apply(layer, x.cuda(), layer.bias)
    expected = linear(x.float(), exact(config, QKV), None if bias is None else bias.float().cpu())
    assert relative_error(found, expected) < BOUNDS[compute, dtype] + 4 * torch.finfo(dtype).eps / 2
