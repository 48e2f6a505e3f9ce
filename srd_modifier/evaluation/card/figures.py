"""What a card says about a comparison: its table, its picture, and how it was measured."""

import re

from srd_modifier.evaluation.card.markdown import block, code
from srd_modifier.evaluation.card.measured import Measured
from srd_modifier.evaluation.results import ModelResult, TaskInfo
from srd_modifier.evaluation.table import escape, footnotes, legend, table_rows, task_sentence

# folders of an absolute path, which say nothing to others; the slashes of an address are none
_FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s'\"/]+/)+")


def figures(measured: Measured, pictures: dict[str, str]) -> str:
    """The table, its notes, and pictures by the path that the card has to them."""
    results = measured.results

    def origin(model: ModelResult) -> str:
        path = measured.own.get(model)
        if path is None:
            return "in the same run"
        name = code(path.name) if path.suffix == ".gguf" else "this checkpoint"
        return name if model.alpha is None else f"{name}, {_dial(model)}"

    images = (f"![{escape(text)}]({path})" for path, text in pictures.items())
    return "\n\n".join(
        part for part in (table_rows(results, origin=origin), footnotes(results), legend(results), *images) if part
    )


def circumstances(measured: Measured) -> str:
    """How the figures came about, so that they can be measured again."""
    results = measured.results
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if value is not None)
    machine = results.machine
    where = [machine["system"], machine["processor"], f"{machine['cores']} cores"]
    if machine.get("memory_bytes"):
        where.append(f"{machine['memory_bytes'] / 1e9:.0f} GB of memory")
    if machine.get("accelerator"):
        where.append(machine["accelerator"])
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    command = " ".join(results.command)
    shortened = _FOLDERS.sub("", command)
    note = "The command" if shortened == command else "The command, without the folders of absolute paths"
    return "\n\n".join(
        [
            f"All rows come from one run of `srd compare` on {results.created[:10]}, on the same texts and questions.",
            "\n".join(f"- {_task(task)}" for task in results.tasks),
            f"{note}:\n\n{block(shortened, 'bash')}",
            "\n".join(
                [
                    *([f"- Settings: {escape(settings)}"] if settings else []),
                    f"- Machine: {escape(', '.join(map(str, where)))}",
                    f"- Versions: {escape(versions)}",
                    *(f"- {line}" for line in _digests(measured)),
                ]
            ),
        ]
    )


def _task(task: TaskInfo) -> str:
    text = f"{task_sentence(task)} Data: {code(_FOLDERS.sub('', task.source))}"
    return f"{text}, SHA-256 {code(task.sha256)}." if task.sha256 is not None else f"{text}."


def _digests(measured: Measured) -> list[str]:
    """What the rows were measured on, for readers who want to know whether they have the same files."""
    found = {path: model.digest for model, path in measured.own.items() if model.digest is not None}
    return [
        f"SHA-256 of {code(path.name)}: {code(digest)}"
        if path.suffix == ".gguf"
        else f"SHA-256 over weights, residual, configuration and tokenizer of this checkpoint: {code(digest)}"
        for path, digest in found.items()
    ]


def _dial(model: ModelResult) -> str:
    text = f"alpha {model.alpha:g}"
    return text if model.chunks is None else f"{text}, only {' and '.join(model.chunks)}"
