"""What `balance` trades: W4 alone against W4 with a residual, over the whole range of the knob.

    python -m benchmarks.balance [options of benchmarks.quality]

The base is SRDModifier's own with feedback; residuals of 2 and 4 bits with feedback in groups of 64 stand on it.
"""

from benchmarks.quality import Setting, evaluate, make, parse
from benchmarks.scratch import scratch

_BALANCES = (0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0)


def main() -> None:
    options = parse(__doc__.partition("\n")[0])
    print(f"{'balance':>8} {'W4 alone':>10} {'+ D2':>10} {'+ D4':>10}   mean KL divergence")
    with scratch() as folder:
        setting = Setting.of(options, folder)
        for balance in _BALANCES:
            klds = []
            for bits in (2, 4):
                modifier = {
                    **setting.scheme,
                    "base_rounding": "feedback",
                    "balance": balance,
                    "rounding": "feedback",
                    "residual_bits": bits,
                }
                directory = make(setting, f"{balance} {bits}", {"SRDModifier": modifier})
                if bits == 2:
                    klds.append(evaluate(setting, directory, alpha=0.0))
                klds.append(evaluate(setting, directory))
            print(f"{balance:8.2f} " + " ".join(f"{kld:10.2e}" for kld in klds), flush=True)


if __name__ == "__main__":
    main()
