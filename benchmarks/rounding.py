"""Error of the residual by width and rounding.

    python -m benchmarks.rounding

The weight is Gaussian, 1024 x 1024, standard deviation 0.02.

First table: the residual is what round-to-nearest W4 in groups of 64 loses. Figures are |decoded - residual| /
|residual| in the Frobenius norm, and bits per weight of the residual alone.

Second table: the error at the layer's output, tr(E H E^T), as a share of what W4 alone leaves of it. The inputs are
synthetic and correlated: their covariance has eigenvalues falling as 1/k in random directions, and columns of unequal
size. Feedback sees 4096 of them; the figures are for 4096 others.
"""

import torch
from torch import Tensor

from srd_modifier.residual import Hessian, ResidualFormat, decode, encode, encode_calibrated, quantize_base
from srd_modifier.residual.format import BITS

SIZE = 1024
ROUNDINGS = ("nearest", "stochastic", "dithered")  # those that do not look at the layer's inputs


def round_to_nearest(weight: Tensor) -> Tensor:
    groups = weight.view(SIZE, -1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def weight_errors(weight: Tensor) -> None:
    residual = weight - round_to_nearest(weight)
    print(f"{'bits':>4} {'group':>6} {'bits/w':>7} " + " ".join(f"{rounding:>11}" for rounding in ROUNDINGS))
    for bits in BITS:
        for group_size in (32, 64, 128, -1):
            errors = []
            for rounding in ROUNDINGS:
                fmt = ResidualFormat(bits=bits, group_size=group_size, rounding=rounding)
                decoded = decode(encode(residual, fmt), fmt, in_features=SIZE)
                errors.append(float((decoded - residual).norm() / residual.norm()))
            cost = 8 * fmt.bytes(*weight.shape) / weight.numel()
            print(f"{bits:4} {group_size:6} {cost:7.3f} " + " ".join(f"{error:11.4f}" for error in errors))


def output_errors(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    directions *= torch.arange(1, SIZE + 1).rsqrt().unsqueeze(1)
    sizes = (0.5 * torch.randn(SIZE, generator=generator)).exp()
    seen, unseen = (torch.randn(4096, SIZE, generator=generator) @ directions * sizes for _ in range(2))
    moment, other = seen.T @ seen / len(seen), unseen.T @ unseen / len(unseen)
    hessian = Hessian.prepare(moment)
    importance = moment.diagonal()

    def lost(error: Tensor) -> float:
        return float(((error @ other) * error).sum())

    settings = [(bits, 1.0) for bits in (4, 3, 2, 1)] + [(4, 0.25), (4, 0.125)]
    formats = [
        ResidualFormat(bits=bits, group_size=64, density=density, rounding="feedback") for bits, density in settings
    ]
    print(f"\n{'W4':>16} {'bits':>4} {'density':>7} {'bits/w':>7} {'nearest':>9} {'feedback':>9}")
    bases = {
        "nearest": round_to_nearest(weight),
        "feedback": quantize_base(weight, hessian, group_size=64).dequantize(64),
        "feedback, alone": quantize_base(weight, hessian, group_size=64, balance=0).dequantize(64),
    }
    for name, base in bases.items():
        residual = weight - base
        alone = lost(residual)
        for fmt, encoded in zip(formats, encode_calibrated(residual, formats, hessian), strict=True):
            plain = ResidualFormat(bits=fmt.bits, group_size=64, density=fmt.density)
            by_nearest = decode(encode(residual, plain, importance=importance), plain, in_features=SIZE)
            by_feedback = decode(encoded, fmt, in_features=SIZE)
            shares = [lost(residual - decoded) / alone for decoded in (by_nearest, by_feedback)]
            cost = 8 * fmt.bytes(*weight.shape) / weight.numel()
            print(
                f"{name:>16} {fmt.bits:4} {fmt.density:7g} {cost:7.3f} " + " ".join(f"{share:9.4f}" for share in shares)
            )
        print(f"{name:>16} alone, over that of round-to-nearest: {alone / lost(weight - bases['nearest']):.3f}")


def main() -> None:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.02
    weight_errors(weight)
    output_errors(weight)


if __name__ == "__main__":
    main()
