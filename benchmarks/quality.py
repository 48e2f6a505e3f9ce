"""Quality against bytes: llama.cpp's K-quants, GPTQ, round-to-nearest, and residuals in every form, all in one run.

    python -m benchmarks.quality [--model DIR] [--calibration FILE|self] [--text FILE] [--max-tokens N]
                                 [--group-size N] [--ctx N] [--plot FILE] [--json FILE]

By default tiny-llama, calibrated on ../shared/data/calib/wiki.txt and scored on ../shared/data/eval/wiki.test.raw where
these are at hand, else calibrated on text that the model writes itself and scored on the demo's text. 64 calibration
samples of 512 tokens for every method, windows of 512 tokens without overlap, float32 against the bf16 original.
K-quants are ggml's own, with an importance vector from the same calibration. Bits per weight are those of the decoder's
Linear weights: codes, scales, masks; bytes on disk are whole files.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.models import REPOSITORY, TINY_LLAMA
from benchmarks.scratch import scratch
from srd_modifier.checkpoint.config import IMPORTANCE
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.report import Report
from srd_modifier.gguf import ggml
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.quantizing import SELF, quantize
from srd_modifier.selection.depth import layer_of

_DATA = REPOSITORY.parent / "shared" / "data"
_BUDGETS = (4.6, 4.8, 5.0, 5.5, 6.0, 6.5625, 7.5, 8.5)


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    family: str
    name: str
    bytes_on_disk: int
    bits_per_weight: float
    ppl: float
    kld: float
    kld_stderr: float
    top1: float
    predicted: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Setting:
    """What everything is measured with."""

    model: str
    calibration: str
    text: Path
    max_tokens: int | None
    group_size: int
    ctx: int
    budgets: tuple[float, ...]
    folder: Path

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path) -> "Setting":
        """What the command line says."""
        return cls(
            options.model,
            options.calibration,
            options.text,
            options.max_tokens,
            options.group_size,
            options.ctx,
            tuple(options.budgets),
            folder,
        )

    @property
    def scheme(self) -> dict[str, Any]:
        """W4A16 in groups, as recipes have it."""
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group_size}
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def main() -> None:
    options = parse(__doc__.partition("\n")[0])
    print(f"{options.model}, calibrated on {options.calibration}, {options.max_tokens} tokens of {options.text}")
    with scratch() as folder:
        points = measure(Setting.of(options, folder))
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=2), encoding="utf-8")
    if options.plot:
        plot(points, options.plot)
    print_targets(points)


def parse(description: str) -> argparse.Namespace:
    """The command line; also quietens the libraries."""
    from srd_modifier.cli._quiet import quiet_libraries

    calibration, text = _DATA / "calib" / "wiki.txt", _DATA / "eval" / "wiki.test.raw"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--calibration", default=str(calibration) if calibration.exists() else SELF)
    parser.add_argument(
        "--text", type=Path, default=text if text.exists() else REPOSITORY / "examples" / "text" / "demo.txt"
    )
    parser.add_argument("--max-tokens", type=int, default=20_480)
    parser.add_argument("--group-size", type=int, default=64, help="Of W4.")
    parser.add_argument("--budgets", type=float, nargs="+", default=_BUDGETS, help="Bits per weight, rising.")
    parser.add_argument("--ctx", type=int, default=512, help="Tokens of a window, and of a calibration sample.")
    parser.add_argument("--plot", type=Path, default=None, help="Draw quality against bytes (svg or png).")
    parser.add_argument("--json", type=Path, default=None, help="Write every point.")
    quiet_libraries(bars=False)
    return parser.parse_args()


def measure(setting: Setting) -> list[Point]:
    """Every point, printed as it comes."""
    print(f"{'':44} {'bytes':>11} {'bits/w':>7} {'ppl':>8} {'KLD mean':>18} {'predicted':>16} {'top-1':>8}")
    points: list[Point] = []

    def add(family: str, name: str, directory: Path | str, budget: float | None = None, **dial: Any) -> None:
        points.append(score(setting, family, name, directory, budget, **dial))

    add("original", "bf16", setting.model)
    bases = {
        "RTN": {"SRDModifier": setting.scheme},
        "GPTQ": {"SRDModifier": {}, "GPTQModifier": setting.scheme},
    }
    for name, modifiers in bases.items():
        directory = make(setting, name, modifiers)
        add("fixed", f"{name} W4", directory, alpha=0.0)
        add("nearest", f"{name} W4 + D8 nearest, 40-77 %", directory, chunks=["reasoning"])
        add("nearest", f"{name} W4 + D8 nearest", directory)
    stored = load_file(setting.folder / "RTN" / IMPORTANCE)
    importance = {name.removesuffix(".importance"): values for name, values in stored.items()}
    for name, type_of in k_quants(setting.model).items():
        add("K-quant", name, write_k_quant(setting, name, type_of, importance))

    for balance in (0.6, 1.0):
        base = {**setting.scheme, "base_rounding": "feedback", "balance": balance}
        for bits in (4, 2):
            name = f"feedback W4 (balance {balance}) + D{bits}"
            modifier = {**base, "residual_bits": bits, "rounding": "feedback", "sensitivity": "gradient"}
            directory = make(setting, name, {"SRDModifier": modifier})
            if bits == 4:
                add("own W4", f"feedback W4 (balance {balance})", directory, alpha=0.0)
                add("depth", f"{name} feedback, 40-77 %", directory, chunks=["reasoning"])
            add("full", f"{name} feedback", directory)
        if balance == 0.6:
            for bits in (4, 2):
                name = f"feedback W4 (balance {balance}) + D{bits} nearest"
                add("nearest", name, make(setting, name, {"SRDModifier": {**base, "residual_bits": bits}}))
        for budget in setting.budgets if balance == 0.6 else setting.budgets[-3:]:
            name = f"budget {budget:g} bpw (balance {balance})"
            directory = make(setting, name, {"SRDModifier": {**base, "correct": {"budget": f"{budget}bpw"}}})
            add(f"budget {balance}", name, directory, budget)
    return points


def make(setting: Setting, name: str, modifiers: dict[str, Any]) -> Path:
    """Quantize with these modifiers."""
    output, recipe = setting.folder / name, setting.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False), "utf-8")
    quantize(
        setting.model,
        recipe,
        output,
        dataset=setting.calibration,
        num_samples=64,
        max_seq_length=setting.ctx,
    )
    return output


def score(setting: Setting, family: str, name: str, directory: Path | str, budget: float | None, **dial: Any) -> Point:
    """Score a model directory, print the row."""
    report = _report(setting, directory, **dial)
    divergence, size = report.divergence, report.size
    assert divergence is not None
    bits = _K_BITS.get(name, size.bits_per_weight)
    point = Point(
        family,
        name,
        round(size.bytes_on_disk - size.quantized_weights * (size.bits_per_weight - bits) / 8),
        bits,
        report.perplexity.ppl,
        divergence.kld_mean,
        divergence.kld_stderr,
        divergence.top1_agreement,
        report.predicted_kld,
        budget,
    )
    predicted = "" if not point.predicted else f"{point.predicted:9.2e} {point.predicted / point.kld:5.2f}x"
    print(
        f"{name:44} {point.bytes_on_disk:11,} {point.bits_per_weight:7.3f} {point.ppl:8.3f} "
        f"{point.kld:9.2e} ± {point.kld_stderr:.0e} {predicted:>16} {point.top1:8.3%}",
        flush=True,
    )
    return point


def evaluate(setting: Setting, directory: Path, **dial: Any) -> float:
    """Mean KL divergence of a model directory."""
    divergence = _report(setting, directory, **dial).divergence
    assert divergence is not None
    return divergence.kld_mean


def _report(setting: Setting, directory: Path | str, **dial: Any) -> Report:
    return evaluate_text(
        str(directory),
        setting.text,
        reference=setting.model,
        ctx=setting.ctx,
        stride=setting.ctx,
        max_tokens=setting.max_tokens,
        **dial,
    )


# llama.cpp's own, for rows that blocks of 256 do not divide
_FALLBACK = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q5_K: GGMLType.Q5_1, GGMLType.Q6_K: GGMLType.Q8_0}

# ggml's types are measured by the values they store, in a dense file; their own bits count
_K_BITS: dict[str, float] = {}


def k_quants(model: str) -> dict[str, Callable[[str], GGMLType]]:
    """llama.cpp's types for the decoder's Linear weights; Q4_K_M is its mixture for dense models."""
    layers = json.loads((Path(model) / "config.json").read_text("utf-8"))["num_hidden_layers"]

    def mixture(name: str) -> GGMLType:
        layer = layer_of(name)
        assert layer is not None
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return GGMLType.Q6_K if more and name.endswith(("v_proj", "down_proj")) else GGMLType.Q4_K

    return {
        "ggml Q4_K_M": mixture,
        "ggml Q5_K": lambda name: GGMLType.Q5_K,
        "ggml Q6_K": lambda name: GGMLType.Q6_K,
        "ggml Q8_0": lambda name: GGMLType.Q8_0,
    }


def write_k_quant(
    setting: Setting, name: str, type_of: Callable[[str], GGMLType], importance: dict[str, torch.Tensor]
) -> Path:
    """A dense float32 model with the values that ggml's types store."""
    target = setting.folder / name
    shutil.copytree(setting.model, target, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    tensors, bits, weights = {}, 0.0, 0
    for key, tensor in load_tensors(Path(setting.model).glob("*.safetensors")).items():
        module = key.removesuffix(".weight")
        if module in importance:
            tensor = tensor.float()
            ggml_type = type_of(module)
            if tensor.shape[1] % ggml_type.block_weights:
                ggml_type = _FALLBACK[ggml_type]
            data = ggml.quantize(tensor, ggml_type, importance[module].clamp_min(1e-12))
            tensor = ggml.dequantize(data, ggml_type).reshape(tensor.shape)
            bits += ggml.bits_per_weight(ggml_type) * tensor.numel()
            weights += tensor.numel()
        tensors[key] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), "utf-8")
    _K_BITS[name] = bits / weights
    return target


def load_tensors(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return {key: tensor for path in sorted(paths) for key, tensor in load_file(path).items()}


def print_targets(points: list[Point]) -> None:
    """The ratios that this project promises, from this run's figures."""
    kld = {point.name: point.kld for point in points}
    rows = [
        ("own W4 (0.6) / GPTQ", "feedback W4 (balance 0.6)", "GPTQ W4", 0.95, 0.8),
        ("D4 (balance 1) / Q8_0", "feedback W4 (balance 1.0) + D4 feedback", "ggml Q8_0", 0.6, 0.6),
        ("D2 (balance 1) / Q6_K", "feedback W4 (balance 1.0) + D2 feedback", "ggml Q6_K", 1.8, 1.0),
        ("D4 (balance 0.6) / Q8_0", "feedback W4 (balance 0.6) + D4 feedback", "ggml Q8_0", 2.3, 1.0),
        ("D2 (balance 0.6) / Q6_K", "feedback W4 (balance 0.6) + D2 feedback", "ggml Q6_K", 2.8, 1.0),
        ("4.8 bpw / Q4_K_M", "budget 4.8 bpw (balance 0.6)", "ggml Q4_K_M", 0.6, 0.5),
        ("5.5 bpw / Q5_K", "budget 5.5 bpw (balance 0.6)", "ggml Q5_K", 0.8, 0.6),
        ("6.5625 bpw / Q6_K", "budget 6.5625 bpw (balance 0.6)", "ggml Q6_K", 1.0, 0.8),
        ("8.5 bpw (balance 1) / Q8_0", "budget 8.5 bpw (balance 1.0)", "ggml Q8_0", 0.5, 0.3),
    ]
    print(f"\n{'KLD ratio':32} {'measured':>9} {'at most':>8} {'aim':>6}")
    for label, ours, peer, most, aim in rows:
        if ours in kld and peer in kld:
            ratio = kld[ours] / kld[peer]
            print(f"{label:32} {ratio:8.3f}x {most:7.2f}x {aim:5.2f}x  {'met' if ratio <= most else 'MISSED'}")
    budgets = [point for point in points if point.budget is not None and point.predicted is not None]
    if budgets:
        off = max(abs((point.predicted or 0) / point.kld - 1) for point in budgets)
        spent = [point.bits_per_weight / (point.budget or 1) for point in budgets]
        print(f"predicted divergence off by at most {off:.1%} (25 % promised)")
        print(f"budget spent: {min(spent):.4%} to {max(spent):.4%} (99.5 % to 100 % promised)")
        for family in sorted({point.family for point in budgets}):
            curve = [point.kld for point in sorted(budgets, key=lambda p: p.bits_per_weight) if point.family == family]
            falling = all(a > b for a, b in pairwise(curve))
            print(f"{family}: more bytes {'always' if falling else 'do NOT always'} diverge less")


def plot(points: list[Point], path: Path) -> None:
    """Divergence against bits per weight."""
    import matplotlib
    from matplotlib.figure import Figure

    # text as text, and the same bytes for the same figures
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "srd-modifier"})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "K-quant": ("llama.cpp K-quants with importance", "o", "tab:gray"),
        "fixed": ("W4 alone: RTN, GPTQ", "s", "tab:brown"),
        "own W4": ("W4 alone: base_rounding feedback", "s", "tab:blue"),
        "nearest": ("residual rounded to nearest", "x", "tab:red"),
        "depth": ("residual at 40-77 % of the depth", "v", "tab:orange"),
        "full": ("residual everywhere, with feedback", "^", "tab:green"),
        "budget 0.6": ("residual by budget", ".", "tab:blue"),
        "budget 1.0": ("residual by budget, balance 1", ".", "tab:cyan"),
    }
    for family, (label, marker, colour) in styles.items():
        members = sorted((p for p in points if p.family == family), key=lambda p: p.bits_per_weight)
        if members:
            line = "-" if family.startswith("budget") or family == "K-quant" else ""
            x, y = [p.bits_per_weight for p in members], [p.kld for p in members]
            axes.plot(x, y, marker=marker, linestyle=line, color=colour, label=label)
    axes.set(yscale="log", xlabel="bits per weight, scales and masks counted", ylabel="mean KL divergence from bf16")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
