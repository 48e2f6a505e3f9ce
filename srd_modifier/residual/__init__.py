"""The residual mathematics: what W4 lost, as small integers and group scales, and back.

Pure functions on tensors. Nothing here reads a file, knows a module, or imports the rest of the package.

    format      ResidualFormat: width, group size, rounding, density, scale dtype, and the bytes they cost
    codec       encode() and decode(), one the inverse of the other up to the rounding step
    levels      what a code stands for: whole numbers at 8 bits, half-integers below
    packing     integers of 1 to 6 bits to bytes and back
    rounding    nearest, stochastic and subtractive dither, with reproducible noise
    hessian     Hessian: what a layer's inputs say about the cost of an error, and the factor that spreads it
    feedback    levels by error feedback and descent, group scales by least squares, under a Hessian
    calibrated  encode_calibrated() and quantize_base(): residuals and W4 codes chosen by the layer's output

>>> import torch
>>> from srd_modifier.residual import ResidualFormat, decode, encode
>>> residual = torch.randn(4, 128) * 1e-3
>>> fmt = ResidualFormat(bits=8, group_size=64)
>>> encoded = encode(residual, fmt)
>>> (decode(encoded, fmt, in_features=128) - residual).abs().max().item() < 2e-5
True
"""

from srd_modifier.residual.calibrated import QuantizedBase, encode_calibrated, quantize_base
from srd_modifier.residual.codec import EncodedResidual, add_decoded_, concatenate_rows, decode, encode, from_levels
from srd_modifier.residual.format import WHOLE_ROW, ResidualFormat
from srd_modifier.residual.hessian import Hessian
from srd_modifier.residual.levels import level_range, nearest_levels

__all__ = [
    "WHOLE_ROW",
    "EncodedResidual",
    "Hessian",
    "QuantizedBase",
    "ResidualFormat",
    "add_decoded_",
    "concatenate_rows",
    "decode",
    "encode",
    "encode_calibrated",
    "from_levels",
    "level_range",
    "nearest_levels",
    "quantize_base",
]
