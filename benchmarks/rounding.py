"""Error of the residual by width and rounding.

    python -m benchmarks.rounding

The residual is what round-to-nearest W4 in groups of 64 loses of a Gaussian weight, 1024 x 1024, standard deviation
0.02. Figures are |decoded - residual| / |residual| in the Frobenius norm, and bits per weight of the residual alone.
"""

import torch

from srd_modifier.residual import ResidualFormat, decode, encode
from srd_modifier.residual.format import BITS, ROUNDINGS


def main() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    groups = weight.view(1024, -1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    residual = weight - ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)
    print(f"{'bits':>4} {'group':>6} {'bits/w':>7} " + " ".join(f"{rounding:>11}" for rounding in ROUNDINGS))
    for bits in BITS:
        for group_size in (32, 64, 128, -1):
            errors = []
            for rounding in ROUNDINGS:
                fmt = ResidualFormat(bits=bits, group_size=group_size, rounding=rounding)
                decoded = decode(encode(residual, fmt), fmt, in_features=1024)
                errors.append(float((decoded - residual).norm() / residual.norm()))
            cost = 8 * fmt.bytes(*weight.shape) / weight.numel()
            print(f"{bits:4} {group_size:6} {cost:7.3f} " + " ".join(f"{error:11.4f}" for error in errors))


if __name__ == "__main__":
    main()
