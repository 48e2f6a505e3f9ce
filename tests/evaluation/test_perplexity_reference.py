"""Perplexities of text tasks against a loop over plain forward passes that shares no line with the package."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.tasks.base import Outcome, Subject
from srd_modifier.evaluation.tasks.data import joined_rows, wikitext2
from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
from srd_modifier.evaluation.tasks.text import TextTask
from srd_modifier.evaluation.text import Text, read_text
from srd_modifier.evaluation.windows import Convention, window_rule

BOS = 0  # of the example's tokenizer, which puts none before a text
PROSE = "The river runs north through the old town, and turns east below the bridge: 40 feet of timber, says he.\n" * 9
EVAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"

Windows = list[tuple[float, int]]


def sliding(model: nn.Module, ids: list[int], *, ctx: int, stride: int) -> Windows:
    """Sum and number of what each window adds, as in the perplexity guide of Transformers: seen labels are masked."""
    found, seen = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + ctx, len(ids))
        window = torch.tensor(ids[begin:end])
        labels = window.clone()
        labels[: len(window) - (end - seen)] = -100
        found.append(losses(model, window, labels))
        seen = end
        if end == len(ids):
            break
    return found


def second_halves(model: nn.Module, ids: list[int], *, ctx: int, bos: int | None) -> Windows:
    """The same as `llama-perplexity` does it: whole windows, BOS over their first token, their second half scored."""
    found = []
    for begin in range(0, len(ids) - ctx + 1, ctx):
        window = torch.tensor(ids[begin : begin + ctx])
        labels = window.clone()
        labels[: ctx // 2 + 1] = -100
        if bos is not None:
            window[0] = bos
        found.append(losses(model, window, labels))
    return found


def losses(model: nn.Module, window: Tensor, labels: Tensor) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0].double()
    return float(cross_entropy(logits[:-1], labels[1:], reduction="sum")), int((labels[1:] != -100).sum())


def assert_is(outcome: Outcome, expected: Windows) -> None:
    expected = [(loss, count) for loss, count in expected if count]
    total = sum(count for _, count in expected)
    (score,) = outcome.scores
    assert (score.metric, score.count) == ("ppl", total)
    assert score.value == pytest.approx(math.exp(sum(loss for loss, _ in expected) / total), rel=1e-4)
    items = outcome.items["ppl"]
    assert items.weights == tuple(count for _, count in expected)
    assert items.values == pytest.approx([loss / count for loss, count in expected], rel=1e-4)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_model(vocab_size=4096)


@pytest.fixture(params=["none", "bos"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def text_of(count: int, tokenizer: Any) -> str:
    """A text of so many tokens, special ones included."""
    return next(PROSE[:end] for end in range(1, len(PROSE)) if len(tokenizer(PROSE[:end])["input_ids"]) == count)


def run(
    model: nn.Module, tokenizer: Any, content: str, convention: Convention = Convention.SLIDING, **sizes: int
) -> Any:
    loaded = LoadedModel("model", model, Path("model"), tokenizer)
    batch_size = sizes.pop("batch_size", None)
    task = TextTask("text", "text", Text(Path("text.txt"), content, "0" * 64), window_rule(convention, **sizes))
    return task.run(Subject(LocalScorer(loaded), loaded), batch_size=batch_size)


@pytest.mark.parametrize(
    ("count", "ctx", "stride"),
    [(96, 32, 8), (100, 32, 12), (90, 32, 32), (101, 32, 31), (32, 32, 8), (33, 32, 8), (33, 32, 32), (20, 32, 8)],
    ids=[
        "whole windows",
        "a stride that does not divide ctx, and a shorter last window",
        "no overlap",
        "an overlap of one token",
        "exactly ctx",
        "ctx and one",
        "one token is left alone in its window",
        "shorter than ctx",
    ],
)
def test_sliding_windows_are_those_of_the_guide(model, tokenizer, count, ctx, stride):
    content = text_of(count, tokenizer)
    ids = tokenizer(content)["input_ids"]
    expected = sliding(model, ids, ctx=ctx, stride=stride)
    assert_is(run(model, tokenizer, content, ctx=ctx, stride=stride), expected)
    assert_is(run(model, tokenizer, content, ctx=ctx, stride=stride, batch_size=3), expected)


@pytest.mark.parametrize(("count", "ctx"), [(100, 16), (64, 32), (80, 17)], ids=["with a tail", "two windows", "odd"])
def test_separate_windows_are_those_of_llamacpp(model, tokenizer, count, ctx):
    content = text_of(count, tokenizer)
    ids = tokenizer(content)["input_ids"]
    expected = second_halves(model, ids, ctx=ctx, bos=BOS if ids[0] == BOS else None)
    assert_is(run(model, tokenizer, content, Convention.LLAMACPP, ctx=ctx), expected)


def test_bos_is_put_only_where_the_tokenizer_puts_it(model, tokenizers):
    """A vocabulary that names a BOS does not make it one of those that begin with it."""
    content = text_of(64, tokenizers["none"])
    ids = tokenizers["none"](content)["input_ids"]
    without = second_halves(model, ids, ctx=16, bos=None)
    replaced = second_halves(model, ids, ctx=16, bos=BOS)
    assert sum(loss for loss, _ in without) != pytest.approx(sum(loss for loss, _ in replaced), rel=1e-3)
    assert_is(run(model, tokenizers["none"], content, Convention.LLAMACPP, ctx=16), without)


def test_a_text_of_one_token_less_than_two_is_refused(model, tokenizers):
    with pytest.raises(SRDError, match="the text has too few tokens: 1 tokens leave 0 to score with ctx 32"):
        run(model, tokenizers["none"], "t", ctx=32)


# WikiText-2, whose rows in the hub's data set are not the lines of its file

ROWS = ["", " = Robert = \n", "", " Robert is an actor . \n", " He is tall . \n", "", "", " = = Early = = \n", ""]
RAW = "".join(row or " \n" for row in ROWS)


def test_rows_are_joined_by_blank_lines(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(RAW)
    joined = joined_rows(read_text(tmp_path / "wiki.test.raw"))
    assert joined.content == "\n\n".join(ROWS)
    assert joined.path == tmp_path / "wiki.test.raw"


def test_the_hubs_data_set_is_the_same_text_as_the_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *name, split: asked.append((*name, split)) or {"text": ROWS})
    assert wikitext2(None).content == wikitext2(tmp_path).content == RAW
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")] * 2
    (tmp_path / "wiki.test.raw").write_text("another")
    assert wikitext2(tmp_path).content == "another"


def test_without_the_file_and_the_hub_it_says_where_to_put_it(tmp_path, monkeypatch):
    def fail(*name: str, split: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(SRDError, match=r"hub \(ConnectionError\); give --data-dir a directory with wiki\.test\.raw$"):
        find_tasks(["wikitext2"], TaskOptions(data_dir=tmp_path))


@pytest.fixture(scope="module")
def tiny(tokenizers: dict[str, Any]) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    loaded = LoadedModel("tiny-llama", model, TINY_LLAMA, tokenizers["none"])
    return Subject(LocalScorer(loaded), loaded)


def hub_rows(raw: str) -> list[str]:
    """As the hub's own script made them: lines with their ends, and nothing for those of white space alone."""
    return [line if line.strip() else "" for line in raw.splitlines(keepends=True)]


def test_real_wikitext_joined_and_in_sliding_windows(tiny, wikitext):
    rows = hub_rows(wikitext)
    assert len(rows) == 4358  # as the data set's page says
    (task,) = find_tasks(["wikitext2"], TaskOptions(data_dir=EVAL_DATA, max_tokens=300))
    assert (task.rule.ctx, task.rule.stride) == (2048, 512)
    assert task.text.content == "\n\n".join(rows)
    (task,) = find_tasks(["wikitext2"], TaskOptions(data_dir=EVAL_DATA, max_tokens=300, ctx=128, stride=100))
    ids = tiny.loaded.tokenizer("\n\n".join(rows)[:5000])["input_ids"][:300]
    assert_is(task.run(tiny), sliding(tiny.loaded.model, ids, ctx=128, stride=100))


def test_real_wikitext_as_it_is_and_in_llamacpps_windows(tiny, wikitext):
    (task,) = find_tasks(["wikitext2_llamacpp"], TaskOptions(data_dir=EVAL_DATA, max_tokens=300, ctx=128))
    ids = tiny.loaded.tokenizer(wikitext[:5000])["input_ids"][:300]
    assert_is(task.run(tiny), second_halves(tiny.loaded.model, ids, ctx=128, bos=None))
    (task,) = find_tasks(["wikitext2_llamacpp"], TaskOptions(data_dir=EVAL_DATA))
    assert (task.rule.ctx, task.rule.stride) == (512, 512)
