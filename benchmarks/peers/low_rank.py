"""Low rank: round-to-nearest W4 with a correction `B A` of what it lost, as QERA chooses it (arXiv:2410.06040).

With S a root of the inputs' second moment, `B A` is the best approximation of `(W - W4) S` of its rank, times the
inverse of S: of all matrices of that rank it leaves the least error at the layer's output. QERA-approx takes the inputs
as uncorrelated, so that S is diagonal; QERA-exact takes them as they are. A and B are bfloat16, in an adapter as PEFT
reads them. Ranks are equal everywhere, but for the rest of the bytes, which raises those of the first modules by one.
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Family, Made, Setting, Unavailable, require, versions
from benchmarks.peers.moments import second_moments
from benchmarks.peers.oneshot import run_oneshot, w4a16

BITS = (4.8, 5.5, 6.5625, 8.5)
"""Bits per weight of base and correction together, as our checkpoints by budget have them; the last as W4 + D4 has."""

METHODS: tuple[Family, ...] = ("QERA-approx", "QERA-exact")

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAST_SHARE = 1e-6  # of the mean square; up to 0.1 the divergence of tiny-llama does not change by 0.1 %


def make(setting: Setting, *, bits: Sequence[float] = BITS) -> Iterator[Made]:
    """One base, and two adapters, one by each method, for each of the sizes: bits per weight of the whole."""
    require("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from srd_modifier.checkpoint.base import BaseCheckpoint

    path = setting.folder / "low-rank"
    shared = run_oneshot(setting, [QuantizationModifier(**w4a16(setting))], path)
    started = time.perf_counter()
    base = BaseCheckpoint(path)
    weights, base_bytes = base.quantized_size()
    shapes = {module: base.weight_shape(module) for module in base.quantized_modules}
    factors = _factors(setting, base)
    shared += time.perf_counter() - started
    for target, method in product(bits, METHODS):
        started = time.perf_counter()
        chosen = ranks(shapes, round(target * weights / 8) - base_bytes)
        adapter = path / f"{method}-{target:g}"
        _write_adapter(adapter, factors[method], chosen, base_model=str(path))
        files = [*base.files, adapter / _WEIGHTS]
        yield Made(
            f"RTN W4 g{setting.group_size} + {method} rank {_range(chosen)}, {target:g} bpw",
            method,
            adapter,
            versions("llmcompressor", "torch"),
            shared + time.perf_counter() - started,
            load=partial(_load, path, adapter),
            bytes_on_disk=sum(file.stat().st_size for file in files),
            note="The correction is computed here after the paper (arXiv:2410.06040), not by its authors' code.",
        )


def ranks(shapes: Mapping[str, tuple[int, int]], size: int) -> dict[str, int]:
    """The rank of every module's correction, for so many bytes of A and B in all.

    Args:
        shapes: `(out, in)` of every module.
        size: bytes that may be spent.

    Returns:
        Ranks by module, without those for which the bytes do not last.

    Raises:
        Unavailable: they do not last for one.
    """
    one = {module: 2 * sum(shape) for module, shape in shapes.items()}
    common, rest = divmod(size, sum(one.values()))
    chosen = {}
    for module, cost in one.items():
        raised = cost <= rest
        rest -= cost if raised else 0
        chosen[module] = min(common + raised, *shapes[module])
    chosen = {module: rank for module, rank in chosen.items() if rank > 0}
    if not chosen:
        raise Unavailable(f"A correction of the smallest rank does not fit into {size:,} bytes.")
    return chosen


def correction(lost: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """`A` `[rank, in]` and `B` `[out, rank]` of the full rank: their first rows and columns are those of any other.

    Args:
        lost: what quantizing took from the weight, float64 `[out, in]`.
        moment: of the inputs, float64 `[in, in]`.
    """
    # inputs that are always zero would leave S without an inverse
    ridge = _LEAST_SHARE * moment.diagonal().mean()
    squares, axes = torch.linalg.eigh(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    roots = squares.clamp_min(ridge).sqrt()
    left, values, right = torch.linalg.svd(lost @ (axes * roots), full_matrices=False)
    # both halves get the root of the singular values, so that neither loses more to bfloat16
    return values.sqrt().unsqueeze(1) * (right / roots) @ axes.T, left * values.sqrt()


def _factors(setting: Setting, base: Any) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """A and B of the full rank, by method and module."""
    from srd_modifier.gguf.weights import ModelWeights

    original = ModelWeights.open(setting.model)
    moments = second_moments(setting)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {method: {} for method in METHODS}
    for module in base.quantized_modules:
        moment = moments[module]
        lost = original.tensor(f"{module}.weight").double() - base.dequantize(module).double()
        factors["QERA-approx"][module] = correction(lost, moment.diagonal().diag())
        factors["QERA-exact"][module] = correction(lost, moment)
    return factors


def _write_adapter(
    path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], chosen: Mapping[str, int], *, base_model: str
) -> None:
    """The two files that PEFT reads."""
    from safetensors.torch import save_file

    tensors = {}
    for module, rank in chosen.items():
        a, b = factors[module]
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a[:rank].bfloat16().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b[:, :rank].bfloat16().contiguous()
    common = min(chosen.values())
    # PEFT scales by alpha / rank, and by names as regular expressions
    others = {module: rank for module, rank in chosen.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "target_modules": sorted({module.rpartition(".")[2] for module in chosen}),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    path.mkdir(parents=True)
    save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@torch.no_grad()
def _load(base: Path, adapter: Path) -> Any:
    """The base with the correction added to its weights, all from disk."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with warnings.catch_warnings():
        # that the checkpoint has a configuration too; of ours only how to load is taken, as it should be
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    tensors = load_file(adapter / _WEIGHTS)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        weight = model.get_parameter(f"{module.removeprefix(_PREFIX)}.weight")
        weight += tensors[f"{module}.lora_B.weight"].float() @ tensors[name].float()
    return model.eval()


def _range(chosen: Mapping[str, int]) -> str:
    low, high = min(chosen.values()), max(chosen.values())
    return str(low) if low == high else f"{low}-{high}"
