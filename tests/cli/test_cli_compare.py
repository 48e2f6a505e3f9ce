"""`srd compare`: what reaches the library, what is written, and what is shown on the way."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import accuracy, kld, make_model, make_results, ppl
from random_models import make_llama, save_model
from rtn import write_checkpoint

from srd_modifier.cli._progress import progress_bars
from srd_modifier.evaluation.comparison import run as run_module
from srd_modifier.evaluation.comparison.candidate import Candidate
from srd_modifier.evaluation.comparison.run import Setting, default_cache
from srd_modifier.evaluation.results import read_results
from srd_modifier.evaluation.tasks.text import TextTask
from srd_modifier.evaluation.windows import Convention

RESULTS = make_results(make_model("srd", 8_000_000, ppl(10.5, 95.2, 94.0, 96.1), kld(0.002), accuracy(0.7)))
PROSE = "The river runs north through the old town, and turns east below the bridge: 40 feet of timber, says he.\n" * 6


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the library would have been asked."""
    calls: list[dict[str, Any]] = []

    def compare(reference: Any, candidates: Any, tasks: Any, output: Any, **options: Any) -> Any:
        calls.append({"models": [reference, *candidates], "tasks": tasks, "output": output, **options})
        options["say"]("this is said")
        return RESULTS

    monkeypatch.setattr(run_module, "compare", compare)
    return calls


def test_defaults_are_left_to_the_library(srd, calls, prose, tmp_path):
    output = tmp_path / "a" / "b"
    done = srd("compare", "original", "out/srd", "--text", prose, "--output", output, "--no-plots")
    assert done.status == 0
    (call,) = calls
    assert call["models"] == [Candidate("original", "original"), Candidate("out/srd", "srd")]
    assert call["output"] == output
    assert call["setting"] == Setting(cache=default_cache(), cache_limit=8_000_000_000)
    assert call["settings"] == {"max_tokens": None, "limit": None}
    (task,) = call["tasks"]
    assert (task.name, task.text.content, task.rule.ctx, task.rule.stride) == ("text", PROSE, 2048, 512)


def test_every_option_arrives(srd, calls, prose, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = A = \n")
    options = "--ctx 64 --stride 64 --convention llamacpp --max-tokens 1000 --limit 7 --num-fewshot 3 --batch-size 2"
    options += " --dtype bfloat16 --device auto --depth-tokens 64 --no-plots"
    done = srd(
        *("compare", "a=original", "half=out/srd@alpha=0.5@chunks=early", "http://localhost:1"),
        *("--tasks", " wikitext2, wikitext2_llamacpp,", "--text", prose, "--data-dir", tmp_path),
        *("--cache-dir", tmp_path / "cache", "--output", tmp_path / "out", *options.split()),
    )
    assert done.status == 0
    (call,) = calls
    assert [(model.model, model.label, model.alpha, model.chunks) for model in call["models"]] == [
        ("original", "a", None, None),
        ("out/srd", "half", 0.5, ("early",)),
        ("http://localhost:1", "http://localhost:1", None, None),
    ]
    # a cache that was asked for may be as large as the disk allows
    assert call["setting"] == Setting(torch.bfloat16, "auto", 2, tmp_path / "cache", None, 64)
    assert call["settings"] == {"max_tokens": 1000, "limit": 7}
    assert [task.name for task in call["tasks"]] == ["wikitext2", "wikitext2_llamacpp", "text"]
    assert all(isinstance(task, TextTask) and task.max_tokens == 1000 and task.rule.ctx == 64 for task in call["tasks"])
    assert call["tasks"][2].rule.convention is Convention.LLAMACPP
    assert call["command"][:4] == ["srd", "compare", "a=original", "half=out/srd@alpha=0.5@chunks=early"]
    assert "' wikitext2, wikitext2_llamacpp,'" in call["command"]


def test_questions_have_their_options(srd, calls, tmp_path, monkeypatch):
    from srd_modifier.evaluation.tasks import find

    asked = []
    monkeypatch.setattr(find, "find_tasks", lambda names, options: asked.append((names, options)) or [])
    options = ["--data-dir", tmp_path, "--limit", 7, "--num-fewshot", 3]
    assert srd("compare", "a", "b", "--tasks", "piqa,gsm8k", "--output", tmp_path / "out", "--no-plots", *options)
    ((names, found),) = asked
    assert names == ["piqa", "gsm8k"]
    assert (found.data_dir, found.limit, found.num_fewshot, found.text) == (tmp_path, 7, 3, None)


def test_without_a_cache_nothing_is_kept(srd, calls, prose, tmp_path):
    assert srd("compare", "a", "b", "--text", prose, "--output", tmp_path, "--no-cache", "--no-plots").status == 0
    assert calls[0]["setting"].cache is None


def test_the_results_are_written_and_shown(srd, calls, prose, tmp_path):
    output = tmp_path / "[out]"
    done = srd("compare", "a", "b", "--text", prose, "--output", output, "--no-plots")
    assert read_results(output / "results.json") == RESULTS
    assert "95.2" in (output / "table.md").read_text()
    assert {path.name for path in output.iterdir()} == {"results.json", "table.md"}
    assert done.stdout.splitlines()[-1] == f"wrote results.json, table.md to {output}"
    assert "95.2" in done.stdout
    assert done.stderr == "this is said\n"


@pytest.mark.parametrize("plots", [True, False])
def test_pictures_are_drawn_unless_they_are_not_wanted(srd, calls, prose, tmp_path, monkeypatch, plots):
    from srd_modifier.evaluation.comparison import report

    drawn: list[bool] = []
    monkeypatch.setattr(report, "write_report", lambda results, output, *, plots: drawn.append(plots) or [])
    arguments = ["compare", "a", "b", "--text", prose, "--output", tmp_path, *([] if plots else ["--no-plots"])]
    assert srd(*arguments).status == 0
    assert drawn == [plots]


# the whole way


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its W4A16 with a residual."""
    folder = tmp_path_factory.mktemp("models")
    original = save_model(make_llama(initializer_range=0.2), folder / "original")
    return original, write_checkpoint(original, folder / "srd", group_size=32)


def test_the_whole_way(srd, models, prose, tmp_path):
    original, checkpoint = models
    arguments = ["compare", original, f"off={checkpoint}@alpha=0", checkpoint, "--text", prose, "--ctx", 64]
    arguments += ["--stride", 64, "--output", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--no-plots"]
    done = srd(*arguments)
    assert (done.status, done.stderr) == (0, "")
    found = read_results(tmp_path / "out" / "results.json")
    assert [model.label for model in found.models] == ["original", "off", "srd"]
    off, full = (model.score("text", "kld_mean").value for model in found.candidates)
    assert full < off / 10
    assert found.command[:2] == ("srd", "compare")
    assert found.models[1].depth is not None
    assert all(label in done.stdout for label in ("original (reference)", "off", "srd"))
    again = srd(*arguments)
    assert read_results(tmp_path / "out" / "results.json").models == found.models
    assert again.stdout == done.stdout


def test_pictures_are_drawn_of_what_was_measured(srd, models, prose, tmp_path, monkeypatch):
    """With the cache where caches lie, since none is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original, checkpoint = models
    sizes = ["--ctx", 64, "--stride", 64, "--max-tokens", 100, "--depth-tokens", 64]
    done = srd("compare", original, checkpoint, "--text", prose, "--output", tmp_path / "out", *sizes)
    assert (done.status, done.stderr) == (0, "")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "table.md", "depth.png", "scores"} < names
    assert any(name.startswith("quality") for name in names)
    assert len(list((tmp_path / "cache" / "srd-modifier" / "reference").glob("*/00000.safetensors"))) == 1


# errors


Arguments = list[object]
FAULTS: dict[str, tuple[Arguments, str]] = {
    "alpha out of range": (["{original}", "{srd}@alpha=2"], r"srd@alpha=2: alpha is 2, expected a number from 0 to 1"),
    "unknown chunk": (["{original}", "{srd}@chunks=middle"], "chunk 'middle' is unknown"),
    "two of one name": (
        ["{original}", "x={srd}", "x={original}"],
        "two models are called 'x'; name one with LABEL=MOD",
    ),
    "no such model": (["{original}", "no/such/model"], "no/such/model: there is no such directory"),
    "no residual": (["{original}", "y={original}@alpha=0.5"], "has no residual, leave @alpha and @chunks out"),
    "a server as the reference": (["http://127.0.0.1:1", "{srd}"], "the reference must be a model on this machine"),
    "no such server": (["{original}", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
    "no such text": (["{original}", "{srd}", "--text", "no.txt"], "no.txt: the text cannot be read: No such file"),
    "no such data": (["{original}", "{srd}", "--data-dir", "nowhere"], "nowhere: --data-dir must be a directory"),
    "a stride over ctx": (["{original}", "{srd}", "--stride", "65"], "stride must not exceed ctx 64"),
    "a task twice": (["{original}", "{srd}", "--tasks", "wikitext2,wikitext2"], "task wikitext2 is named twice"),
    "a long window": (["{original}", "{srd}", "--ctx", "512"], "ctx 512 exceeds the 256 positions"),
}


@pytest.mark.parametrize(("arguments", "message"), FAULTS.values(), ids=list(FAULTS))
def test_what_is_wrong_is_one_sentence(srd, models, prose, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.test.raw").write_text(PROSE)
    names = {"original": models[0], "srd": models[1]}
    given = [str(argument).format(**names) for argument in arguments]
    defaults = {"--text": prose, "--ctx": 64, "--output": tmp_path / "out", "--data-dir": tmp_path}
    more = [each for option, value in defaults.items() if option not in given for each in (option, value)]
    assert message in srd("compare", *given, *more, "--no-plots", "--no-cache").sentence


def test_a_place_that_cannot_be_written_is_a_sentence(srd, calls, prose):
    assert "Not a directory" in srd("compare", "a", "b", "--text", prose, "--output", prose / "out").sentence
    assert calls == []


@pytest.mark.parametrize(("module", "extra"), [("jsonschema", "eval"), ("matplotlib", "plot")])
def test_what_the_report_needs_is_missed_before_anything_is_scored(
    srd, calls, prose, tmp_path, monkeypatch, module, extra
):
    from srd_modifier import _extras

    found = _extras.find_spec
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == module else found(name))
    sentence = srd("compare", "a", "b", "--text", prose, "--output", tmp_path).sentence
    assert sentence == f"{module} is not installed; it comes with: pip install 'srd-modifier[{extra}]'"
    assert calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--tasks", "piqa", "--output", "o"],
        ["a", "b", "--tasks", "piqa"],
        ["a", "b", "--output", "o"],
        ["a", "b", "--output", "o", "--tasks", " ,"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--limit", "0"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--max-tokens", "0"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--num-fewshot", "-1"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--batch-size", "0"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--depth-tokens", "-1"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--dtype", "int8"],
        ["a", "b", "--output", "o", "--tasks", "piqa", "--device", "tpu"],
        ["a", "b", "--output", "o", "--text", "t", "--convention", "other"],
    ],
)
def test_misuse_exits_with_status_two(srd, calls, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert srd("compare", *arguments).status == 2
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from srd_modifier.cli import _app;"
        "result = CliRunner().invoke(_app(), ['compare', '--help']); assert '--tasks' in result.output, result.output;"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# bars


class Terminal(io.StringIO):
    """What stderr is where somebody looks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Puts one in the place of stderr, when it is called: pytest has its own there until the test begins."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def put() -> Terminal:
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return put


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for the bars."""
    now = [100.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_bars_say_what_is_done_and_how_long_it_will_take(terminal, wait):
    screen = terminal()
    with progress_bars() as bars:
        show = bars("srd: WikiText-2")
        show(0, 10)
        for done in (2, 4, 6):
            wait(3)
            show(done, 10)
    last = screen.getvalue().split("srd: WikiText-2")[-1].split()
    assert last[1:5] == ["6/10", "0:00:09", "left", "0:00:06"]


def test_a_bar_that_is_done_makes_room_for_the_next(terminal):
    screen = terminal()
    with progress_bars() as bars:
        first, second = bars("first"), bars("second")
        first(0, 2)
        assert "first" in screen.getvalue()
        first(2, 2)
        second(0, 3)
        second(1, 3)
    last = screen.getvalue().split("second")[-2:]
    assert len(last) == 2
    assert "first" not in "".join(last)


def test_nothing_is_shown_before_there_is_something_to_show(terminal):
    screen = terminal()
    with progress_bars() as bars:
        bars("never asked for")
    assert "never" not in screen.getvalue()


def test_without_a_terminal_there_are_no_bars(capsys):
    with progress_bars() as bars:
        show = bars("quiet")
        show(0, 2)
        show(2, 2)
    assert capsys.readouterr() == ("", "")


def test_bars_end_when_something_fails(terminal):
    """The cursor is shown again."""
    screen = terminal()

    def work() -> None:
        with progress_bars() as bars:
            bars("work")(0, 2)
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        work()
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")
