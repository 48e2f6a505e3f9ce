"""The table in the layout of the published model cards: only what was measured, sizes in bytes."""

import json
from pathlib import Path
from typing import Any

from pipeline import OWN_PERPLEXITY, PERPLEXITY, QUESTIONS, Table

from srd_modifier.checkpoint.atomic import write_text
from srd_modifier.evaluation.results import ModelResult, Results, Score
from srd_modifier.evaluation.table import escape, format_value, how_measured

_NONE = "-"  # what the row does not have, such as a GGUF file


def write(results: Results, table: Table, original: Path, path: Path) -> Path:
    """Write the table, what it was made with and how it was measured, and give the path."""
    parts = [
        f"# {escape(table.title)}",
        f"By its config.json the model is {_architecture(original)}.",
        _rows(results),
        _legend(results),
        how_measured(results),
        f"The recipe of the checkpoint{_scales(table)}:",
        f"```yaml\n{table.recipe.rstrip()}\n```",
    ]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _rows(results: Results) -> str:
    perplexity, own = results.task(PERPLEXITY).title, results.task(OWN_PERPLEXITY).title
    heads = [
        "",
        f"{perplexity} perplexity ↓",
        "KLD ↓",
        f"{results.task(QUESTIONS).title} ↑",
        "D8 bytes",
        "bits/weight",
        "GGUF bytes",
        f"{own} ↓",
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(_cells(model) for model in results.models)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(model: ModelResult) -> list[str]:
    is_gguf = Path(model.model).suffix == ".gguf"
    return [
        escape(model.label),
        _with_error(model.score(PERPLEXITY, "ppl")),
        _value(model.score(PERPLEXITY, "kld_mean")),
        _with_error(model.score(QUESTIONS, "acc")),
        _NONE if model.residual_bytes is None else f"{model.residual_bytes:,d}",
        _NONE if model.bits_per_weight is None else f"{model.bits_per_weight:.2f}",
        f"{model.bytes_on_disk:,d}" if is_gguf else _NONE,
        _with_error(model.score(OWN_PERPLEXITY, "ppl")),
    ]


def _value(score: Score | None) -> str:
    return _NONE if score is None else format_value(score.metric, score.value)


def _with_error(score: Score | None) -> str:
    if score is None or score.stderr is None:
        return _value(score)
    return f"{_value(score)} ± {format_value(score.metric, score.stderr)}"


def _legend(results: Results) -> str:
    return (
        "Values are given ± their standard error. KLD is the mean Kullback-Leibler divergence from the "
        f"{escape(results.reference.label)}, in nats per token. D8 bytes are the codes and scales of the residual that "
        "the row applies. Bits per weight are those of the decoder layers' matrices, scales counted. The last column "
        "is llama.cpp's own computation from the GGUF file, over the windows that its head names; it is not to be "
        f"compared with the first. {_NONE} is what a row does not have."
    )


def _scales(table: Table) -> str:
    return ", with the model read as float32, so that W4's scales are float32 too" if table.float32_scales else ""


def _architecture(original: Path) -> str:
    config: dict[str, Any] = json.loads((original / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    if not text.get("enable_moe_block"):
        return "dense"
    return f"a mixture of {text.get('num_experts')} experts, {text.get('top_k_experts')} for each token"
