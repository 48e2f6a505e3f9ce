"""Base and residual applied to a model's own weights, in place and with nothing saved.

This is the published pipeline's simulation (`quantize_hf_model_inplace`): round-to-nearest 4-bit base with
scale `absmax / 7`, codes in [-8, 7], then the residual with scale `absmax / 127`, both float32. Useful to try a
setting in a second; a checkpoint comes from the `SRDModifier`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.config import check_alphas
from srd_modifier.errors import ConfigError
from srd_modifier.residual.codec import add_decoded_, encode
from srd_modifier.residual.format import ResidualFormat
from srd_modifier.selection.patterns import matches_any, pattern_value


@torch.no_grad()
def fake_quantize_(
    model: nn.Module,
    alpha: float = 1.0,
    group_size: int = 64,
    *,
    bits: int = 8,
    rounding: str = "nearest",
    density: float = 1.0,
    scale_dtype: str = "float32",
    seed: int = 0,
    layer_alphas: Mapping[str, float] | None = None,
    ignore: Iterable[str] = ("lm_head",),
) -> list[str]:
    """Replace every Linear weight by `W4 + alpha * D8 * S8`, in place and in the weight's own dtype.

    Args:
        model: any module; its `nn.Linear` weights `[out, in]` are changed, embeddings are not.
        alpha: 0 gives the plain W4 weights, 1 the full correction.
        group_size: columns per scale, of base and residual alike; -1 is one scale per row.
        bits: width of the residual, 8, 6, 5, 4, 3, 2 or 1.
        rounding: `nearest`, `stochastic` or `dithered`.
        density: share of the residual's entries that is kept.
        scale_dtype: of the residual's scales; float32 as published.
        seed: of the noise of the two random roundings.
        layer_alphas: alpha by module name or `re:` pattern; the first match counts.
        ignore: names or `re:` patterns of modules to leave alone.

    Returns:
        The names of the changed modules, in the model's order.

    Raises:
        ConfigError: a setting is out of range, or nothing was matched.
        ValueError: a weight has NaN or infinite entries; the message names its module.
    """
    fmt = ResidualFormat(
        bits=bits, group_size=group_size, rounding=rounding, density=density, scale_dtype=scale_dtype, seed=seed
    )
    if rounding == "feedback":
        raise ConfigError("rounding is 'feedback', which needs calibration data; quantize with a recipe instead")
    check_alphas(alpha, layer_alphas)
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not matches_any(name, ignored)
    }
    if not linears:
        raise ConfigError(f"no Linear module of {type(model).__name__} is left to quantize after ignore={ignored}")
    for name, module in linears.items():
        if not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{name}.weight has NaN or infinite entries")
    for name, module in linears.items():
        weight = module.weight.float()
        own_alpha = pattern_value(name, layer_alphas or {}, alpha)
        base = _round_to_nearest_w4(weight, fmt)
        encoded = encode(weight - base, fmt, key=name)
        module.weight.copy_(add_decoded_(base, encoded, fmt, key=name, alpha=own_alpha))
    return list(linears)


def _round_to_nearest_w4(weight: Tensor, fmt: ResidualFormat) -> Tensor:
    """`[out, in]` float32 on the 4-bit grid: scale `absmax / 7` per group, codes in [-8, 7]."""
    out_features, in_features = weight.shape
    columns = fmt.columns_per_group(in_features)
    grouped = nn.functional.pad(weight, (0, -in_features % columns)).reshape(out_features, -1, columns)
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    codes = (grouped / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
    return codes.mul_(scale).reshape(out_features, -1)[:, :in_features].contiguous()
