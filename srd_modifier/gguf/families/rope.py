"""Rotary position embeddings: how config.json describes them, and how llama.cpp is told.

`rope_parameters` names a type. llama.cpp computes `linear` and `yarn` from a few numbers; where a type only divides
each frequency by a factor of its own (`llama3`), the factors are a tensor of the file.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srd_modifier.errors import SRDError

FACTORS = "rope_freqs.weight"


def check_rope(parameters: Any, supported: tuple[str, ...], architecture: str, where: str) -> None:
    """Raise SRDError unless llama.cpp computes these positions; `supported` are types that it does."""
    kind = parameters.get("rope_type") if isinstance(parameters, Mapping) else None
    if kind is None:
        raise SRDError(f"{where}: rope_parameters is not complete, it has no rope_type for every kind of attention")
    if kind not in supported:
        raise SRDError(
            f"{where}: rope type {kind!r} is not one that llama.cpp computes for {architecture}; "
            f"it computes {', '.join(supported)}"
        )
    if kind != "proportional" and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise SRDError(
            f"{where}: partial_rotary_factor is {parameters['partial_rotary_factor']}, and llama.cpp rotates whole "
            f"heads for {architecture}"
        )
    if kind == "yarn" and not parameters.get("truncate", True):
        raise SRDError(f"{where}: yarn with truncate: false is not computed by llama.cpp")
    needed = {field: parameters.get(field) for field in ("rope_theta", *_NEEDED.get(kind, ()))}
    given = {field: parameters[field] for field in _OPTIONAL.get(kind, ()) if parameters.get(field) is not None}
    for field, value in (needed | given).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SRDError(f"{where}: rope type {kind!r} needs a positive number as {field}, found {value!r}")


_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "proportional": ("factor", "partial_rotary_factor"),
}


def add_rope(writer: Any, parameters: Mapping[str, Any]) -> None:
    """Add the base of the frequencies, and the scaling where it is one that llama.cpp computes from numbers."""
    import gguf

    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    kind = parameters["rope_type"]
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(float(parameters.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(parameters.get("beta_slow") or 1))
    writer.add_rope_scaling_attn_factors(_yarn_share(parameters))


def _yarn_share(parameters: Mapping[str, Any]) -> float:
    """What llama.cpp multiplies its own attention factor with, `0.1 ln(factor) + 1`, to get the model's."""
    own = _magnitude(parameters["factor"])
    wanted = parameters.get("attention_factor")
    scale, over_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if wanted is None and scale and over_all:
        wanted = _magnitude(parameters["factor"], scale) / _magnitude(parameters["factor"], over_all)
    return 1.0 if wanted is None else wanted / own


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3_factors(parameters: Mapping[str, Any], head: int) -> Tensor:
    """What the frequencies of Llama 3 are divided by, float32 `[head / 2]`.

    Long waves are stretched by the whole factor, short ones stay, and in between the frequency is interpolated.
    """
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    waves = 2 * math.pi * float(parameters["rope_theta"]) ** exponents
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = ((parameters["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / parameters["factor"] + share)).float()
