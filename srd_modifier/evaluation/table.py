"""A comparison as a Markdown table, and which of the measured metrics it shows.

There is no HTML in it, so that a terminal shows it as well as a web page does.
"""

import math
import re
from collections.abc import Callable, Sequence

from srd_modifier.evaluation.results import DIVERGENCE_METRICS, Interval, ModelResult, Results, Score, TaskInfo

METRIC_NAMES = {"ppl": "perplexity", "kld_mean": "KLD", "top1_agreement": "equal top-1"}
"""What readers see; metrics of the harness keep its names, such as acc_norm."""

# the metric that stands for a task is the first of these that was measured
_MAIN = ("ppl", "acc_norm", "acc", "exact_match")

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

# what Markdown would read as its own; an underscore inside of a word it leaves alone
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def main_metric(results: Results, task: str) -> str | None:
    """The metric that stands for a task: perplexity, or an accuracy, normalized by length where there is one.

    `None` where nothing but divergences was measured.
    """
    measured = _metrics(results, task)
    others = (metric for metric in measured if metric not in DIVERGENCE_METRICS)
    return next((metric for metric in _MAIN if metric in measured), next(others, None))


def shown_metrics(results: Results) -> list[tuple[str, str]]:
    """Task and metric of each column: of every task its main metric, and the mean divergence where it was measured."""
    return [
        (task.name, metric)
        for task in results.tasks
        for metric in (main_metric(results, task.name), "kld_mean")
        if metric is not None and metric in _metrics(results, task.name)
    ]


def markdown_table(results: Results) -> str:
    """The comparison as Markdown: one row for each model, then the notes, how to read it and how it was measured."""
    parts = [table_rows(results), footnotes(results), legend(results), how_measured(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_rows(
    results: Results,
    *,
    origin: Callable[[ModelResult], str] | None = None,
    shown: Sequence[tuple[str, str]] | None = None,
    marks: bool = True,
) -> str:
    """The table alone, without a line end.

    Args:
        results: the comparison.
        origin: Markdown for one more column that says where a model comes from.
        shown: task and metric of each column; `None` is `shown_metrics`.
        marks: point to the footnotes.
    """
    shown = shown_metrics(results) if shown is None else shown
    columns = [
        ["model", *(_label(results, model, marks=marks) for model in results.models)],
        *([] if origin is None else [["", *(origin(model) for model in results.models)]]),
        ["bytes on disk", *(_number(model.bytes_on_disk, ",d") for model in results.models)],
        ["bits/weight", *(_number(model.bits_per_weight, ".2f") for model in results.models)],
        *(
            [_head(results, task, metric), *(score_cell(model.score(task, metric)) for model in results.models)]
            for task, metric in shown
        ),
    ]
    # a column without a figure says nothing
    columns = [column for column in columns if any(column[1:])]
    names = 1 if origin is None else 2
    rules = "|".join("---" if number < names else "---:" for number in range(len(columns)))
    head, *rows = (f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
    return "\n".join([head, f"|{rules}|", *rows])


def footnotes(results: Results) -> str:
    """The models' notes, each a paragraph, under the numbers that the rows carry; empty where there are none."""
    return "\n\n".join(f"{mark} {escape(note)}" for note, mark in _marked_notes(results).items())


def legend(results: Results) -> str:
    """How to read the cells that the table has."""
    shown = {metric for _, metric in shown_metrics(results)}
    scores = [model.score(task, metric) for model in results.models for task, metric in shown_metrics(results)]
    sentences = []
    if any(score is not None and score.stderr is not None for score in scores):
        sentences.append("Values are given ± their standard error.")
    if any(score is not None and score.recovery is not None for score in scores):
        sentences.append(
            "Percentages say how much of the reference's score is recovered, with the 95 % confidence interval of the "
            "comparison on the same items in brackets."
        )
    if "kld_mean" in shown:
        sentences.append("KLD is the mean Kullback-Leibler divergence from the reference, in nats per token.")
    if any(model.bits_per_weight is not None for model in results.models):
        sentences.append("Bits per weight are those of the decoder layers' matrices, scales and masks counted.")
    return " ".join(sentences)


def how_measured(results: Results) -> str:
    """One line: when, with what settings, and what each task was."""
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if value is not None)
    run = f"srd-modifier {results.versions['srd-modifier']}" + (f" ({settings})" if settings else "")
    sentences = [f"Measured in one run on {results.created[:10]} with {run}.", *map(task_sentence, results.tasks)]
    return " ".join([escape(sentences[0]), *sentences[1:]])


def task_sentence(task: TaskInfo) -> str:
    """What was asked of every model, as Markdown."""
    return f"{escape(task.title)}: {escape(task.description.rstrip('. '))}."


def score_cell(score: Score | None) -> str:
    """A score with its standard error and what it recovers; empty where it was not measured."""
    if score is None:
        return ""
    value = format_value(score.metric, score.value)
    if score.stderr is not None:
        value += f" ± {_format_error(score.metric, score.stderr)}"
    return value if score.recovery is None else f"{value}, {format_recovery(score.recovery)}"


def format_value(metric: str, value: float) -> str:
    """A value with the digits that its metric deserves: shares with four, divergences in powers of ten.

    >>> format_value("ppl", 57.0931), format_value("acc", 0.6521739), format_value("kld_mean", 0.00332)
    ('57.093', '0.6522', '3.32e-3')
    """
    if metric.startswith("kld"):
        return "0" if value == 0 else _powers_of_ten(f"{value:.2e}")
    return f"{value:.3f}" if metric == "ppl" else f"{value:.4f}"


def format_recovery(recovery: Interval) -> str:
    """Percent and their confidence interval, with as many digits as the interval gives a meaning to.

    >>> format_recovery(Interval(99.523, 99.311, 99.742)), format_recovery(Interval(98.2, 94.31, 102.22))
    ('99.52 % [99.31, 99.74]', '98.2 % [94.3, 102.2]')
    """
    width = recovery.high - recovery.low
    digits = min(max(1 - math.floor(math.log10(width)), 1), 4) if width > 0 else 1
    return f"{recovery.value:.{digits}f} % [{recovery.low:.{digits}f}, {recovery.high:.{digits}f}]"


def escape(text: str) -> str:
    r"""Text that Markdown shows as it is, also in a cell of a table.

    >>> escape("Q4_K_M | *best*")
    'Q4_K_M \\| \\*best\\*'
    """
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def _metrics(results: Results, task: str) -> list[str]:
    """What was measured of a task, by any model."""
    return [*dict.fromkeys(score.metric for model in results.models for score in model.scores if score.task == task)]


def _head(results: Results, task: str, metric: str) -> str:
    scores = (model.score(task, metric) for model in results.models)
    arrow = next("↑" if score.higher_is_better else "↓" for score in scores if score is not None)
    return f"{escape(results.task(task).title)} {escape(METRIC_NAMES.get(metric, metric))} {arrow}"


def _label(results: Results, model: ModelResult, *, marks: bool) -> str:
    name = escape(model.label) + (" (reference)" if model.reference else "")
    notes = [mark for note, mark in _marked_notes(results).items() if marks and note in model.notes]
    return " ".join([name, *notes])


def _marked_notes(results: Results) -> dict[str, str]:
    """The mark of every note, raised numbers in the order of the rows."""
    notes = dict.fromkeys(note for model in results.models for note in model.notes)
    return {note: str(number).translate(_RAISED) for number, note in enumerate(notes, 1)}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _format_error(metric: str, error: float) -> str:
    return _powers_of_ten(f"{error:.1e}") if metric.startswith("kld") and error else format_value(metric, error)


def _powers_of_ten(text: str) -> str:
    """`3.32e-03` as `3.32e-3`."""
    return re.sub(r"e([+-])0", r"e\1", text)
