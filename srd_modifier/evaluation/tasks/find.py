"""From the names of the command line to tasks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.errors import ConfigError
from srd_modifier.evaluation.tasks.base import Task
from srd_modifier.evaluation.tasks.data import joined_rows, wikitext2
from srd_modifier.evaluation.tasks.harness import HarnessTask
from srd_modifier.evaluation.tasks.text import TextTask
from srd_modifier.evaluation.text import read_text
from srd_modifier.evaluation.windows import Convention, window_rule


@dataclass(frozen=True)
class TaskOptions:
    """What changes tasks, for all of them.

    Attributes:
        data_dir: local data, looked for before the hub is asked.
        text: a UTF-8 file to score as well, as the task `text`.
        ctx: tokens of a window, `None` for each convention's own.
        stride: tokens a window advances, `None` for each convention's own; without overlap it is always ctx.
        convention: how `text` is cut.
        max_tokens: only so many tokens of a text, `None` for all.
        limit: only so many questions of a task, `None` for all.
        num_fewshot: examples shown before a question, `None` for each task's own.
    """

    data_dir: Path | None = None
    text: Path | None = None
    ctx: int | None = None
    stride: int | None = None
    convention: Convention = Convention.SLIDING
    max_tokens: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None


def find_tasks(names: Iterable[str], options: TaskOptions) -> list[Task]:
    """The tasks of these names, in their order, the text of the options last.

    `wikitext2` is WikiText-2 as the published tables have it: rows joined by blank lines, sliding windows of 2048 that
    advance by 512. `wikitext2_llamacpp` is the raw file in llama.cpp's windows of 512. Any other name is a task of
    the lm-evaluation-harness.

    Raises:
        SRDError: There is no such task, its data cannot be read, a size is out of range, or nothing was named.
    """
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise ConfigError(f"{options.data_dir}: --data-dir must be a directory, there is none")
    for option in ("max_tokens", "limit"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, got {value}")
    found: list[Task] = [_TEXTS[name](options) if name in _TEXTS else _harness_task(name, options) for name in names]
    if options.text is not None:
        rule = window_rule(options.convention, ctx=options.ctx, stride=options.stride)
        found.append(TextTask("text", options.text.stem, read_text(options.text), rule, options.max_tokens))
    if not found:
        raise ConfigError("there is nothing to score: name a task, or give --text a file")
    repeated = sorted(
        {task.info.name for task in found if [each.info.name for each in found].count(task.info.name) > 1}
    )
    if repeated:
        raise ConfigError(f"task {repeated[0]} is named twice")
    return found


def _harness_task(name: str, options: TaskOptions) -> HarnessTask:
    return HarnessTask(name, options.data_dir, options.num_fewshot, options.limit)


def _wikitext2(options: TaskOptions) -> TextTask:
    rule = window_rule(Convention.SLIDING, ctx=options.ctx, stride=options.stride)
    text = joined_rows(wikitext2(options.data_dir))
    title = f"WikiText-2 {rule.ctx}/{rule.stride}"
    return TextTask("wikitext2", title, text, rule, options.max_tokens, "its rows joined by blank lines")


def _wikitext2_llamacpp(options: TaskOptions) -> TextTask:
    rule = window_rule(Convention.LLAMACPP, ctx=options.ctx)
    text = wikitext2(options.data_dir)
    return TextTask("wikitext2_llamacpp", f"WikiText-2 llama.cpp {rule.ctx}", text, rule, options.max_tokens)


_TEXTS: dict[str, Callable[[TaskOptions], TextTask]] = {
    "wikitext2": _wikitext2,
    "wikitext2_llamacpp": _wikitext2_llamacpp,
}
