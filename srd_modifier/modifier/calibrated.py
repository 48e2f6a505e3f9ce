"""One module's base, residual and damage under the second moment of its inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor, nn

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.residual import EncodedResidual, ResidualFormat, decode, encode
from srd_modifier.residual.calibrated import encode_calibrated, quantize_base
from srd_modifier.residual.format import WHOLE_ROW
from srd_modifier.residual.hessian import Hessian


def quantize_module(module: nn.Linear, hessian: Hessian, balance: float) -> Tensor:
    """Quantize a module's weight with error feedback and replace the scales that an observer set for it.

    Returns:
        The quantized weight, dequantized: float32 `[out, in]`.

    Raises:
        ValueError: the weight is not finite.
    """
    arguments: Any = getattr(module.quantization_scheme, "weights")  # noqa: B009 - nn.Module types it as a Tensor
    scale: Any = module.weight_scale
    group_size = arguments.group_size if arguments.strategy == QuantizationStrategy.GROUP else WHOLE_ROW
    base = quantize_base(
        module.weight.detach(),
        hessian,
        group_size=group_size,
        balance=balance,
        symmetric=arguments.symmetric,
        scale_dtype=scale.dtype,
    )
    update_offload_parameter(module, "weight_scale", base.scale)
    if base.zero_point is not None:
        zero_point: Any = module.weight_zero_point
        update_offload_parameter(module, "weight_zero_point", base.zero_point.to(zero_point.dtype))
    return base.dequantize(group_size)


def encode_all(
    residual: Tensor, formats: Sequence[ResidualFormat], hessian: Hessian, key: str, importance: Tensor | None
) -> list[EncodedResidual]:
    """A residual float32 `[out, in]` in each format, those with feedback together.

    Raises:
        ValueError: the residual is not finite.
    """
    calibrated = iter(encode_calibrated(residual, [fmt for fmt in formats if fmt.rounding == "feedback"], hessian))
    return [
        next(calibrated) if fmt.rounding == "feedback" else encode(residual, fmt, key=key, importance=importance)
        for fmt in formats
    ]


def predict(
    key: str,
    residual: Tensor,
    formats: Sequence[ResidualFormat],
    encoded: Sequence[EncodedResidual],
    hessian: Hessian,
    output: Tensor,
) -> list[ModuleSensitivity]:
    """The damage of a module without a residual, then with each of the encoded ones.

    Args:
        key: the module's name.
        residual: float32 `[out, in]`, what W4 lost.
        formats: of the encoded residuals.
        encoded: of the residual.
        hessian: of the module's inputs.
        output: float32 `[out]`, what a squared error in an output costs (`selection.sensitivity`).
    """

    def damage(first: Tensor, second: Tensor) -> float:
        return float(hessian.quadratic(first, second).double() @ output.double()) / 2

    # the quadratic form has no negative values, but its rounding can
    w4, mean = max(0.0, damage(residual, residual)), float(output.mean())
    found = [ModuleSensitivity(w4=w4, output=mean)]
    for fmt, one in zip(formats, encoded, strict=True):
        # W4 is off by minus the residual, the corrected weight by what decoding does not give back of it
        error = torch.sub(decode(one, fmt, in_features=residual.shape[1], key=key), residual)
        corrected, mixed = max(0.0, damage(error, error)), -damage(error, residual)
        found.append(ModuleSensitivity(w4=w4, corrected=corrected, mixed=mixed, output=mean))
    return found
