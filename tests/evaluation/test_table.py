import dataclasses

import pytest
from comparisons import ARC, REFERENCE, WIKITEXT, accuracy, kld, make_model, make_results, ppl
from markdown_it import MarkdownIt

from srd_modifier.evaluation.results import Interval
from srd_modifier.evaluation.table import (
    escape,
    format_recovery,
    main_metric,
    markdown_table,
    shown_metrics,
    table_rows,
)


def cells(markdown):
    """The rows of the first table, as a reader of CommonMark with tables finds them."""
    rows, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        inside = {"th_open": True, "td_open": True, "th_close": False, "td_close": False}.get(token.type, inside)
        if inside and token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children))
    return rows


W4 = make_model(
    "w4",
    5_370_744,
    ppl(10.5, 95.2381, 94.81, 95.63),
    kld(3.32e-3, stderr=8.1e-5),
    accuracy(0.78, 97.5, 95.2, 99.9),
    bits_per_weight=4.1264,
)


def test_a_row_has_size_value_error_divergence_and_recovery():
    assert cells(markdown_table(make_results(W4))) == [
        [
            "model",
            "bytes on disk",
            "bits/weight",
            "WikiText-2 perplexity ↓",
            "WikiText-2 KLD ↓",
            "ARC easy acc ↑",
        ],
        ["bf16 (reference)", "20,000,000", "16.00", "10.000 ± 0.500", "", "0.8000 ± 0.0100"],
        [
            "w4",
            "5,370,744",
            "4.13",
            "10.500 ± 0.500, 95.24 % [94.81, 95.63]",
            "3.32e-3 ± 8.1e-5",
            "0.7800 ± 0.0100, 97.5 % [95.2, 99.9]",
        ],
    ]


def test_what_was_not_measured_is_empty_or_has_no_column():
    results = make_results(make_model("server", None, ppl(10.1, stderr=None)), tasks=[WIKITEXT])
    rows = cells(markdown_table(results))
    assert rows[0] == ["model", "bytes on disk", "bits/weight", "WikiText-2 perplexity ↓"]
    assert rows[2] == ["server", "", "", "10.100"]
    bare = dataclasses.replace(REFERENCE, bytes_on_disk=None, bits_per_weight=None)
    assert cells(markdown_table(make_results(reference=bare, tasks=[WIKITEXT])))[0] == [
        "model",
        "WikiText-2 perplexity ↓",
    ]


def test_notes_are_numbered_once_and_stand_below():
    models = [
        dataclasses.replace(W4, label=label, notes=notes)
        for label, notes in (("a", ("slow",)), ("b", ("no BOS", "slow")), ("c", ()))
    ]
    text = markdown_table(make_results(*models))
    assert [row[0] for row in cells(text)[2:]] == ["a ¹", "b ¹ ²", "c"]
    assert "\n\n¹ slow\n\n² no BOS\n\n" in text


def test_it_says_how_it_was_measured():
    text = markdown_table(make_results(W4))
    last = text.splitlines()[-1]
    assert last.startswith(
        "Measured in one run on 2026-11-25 with srd-modifier 0.3.0 (dtype float32, device cpu). WikiText-2: windows of"
    )
    assert last.endswith("ARC easy: multiple choice, no examples shown, the most likely answer counts.")


def test_only_what_the_table_has_is_explained():
    text = markdown_table(make_results(make_model("w4", 5, ppl(10.5, stderr=None)), tasks=[WIKITEXT]))
    assert "standard error" in text, "the reference has one"
    assert "KLD" not in text
    assert "recovered" not in text


def test_a_column_says_where_models_come_from():
    rows = cells(table_rows(make_results(W4), origin=lambda model: "" if model.reference else "here"))
    assert [row[:2] for row in rows] == [["model", ""], ["bf16 (reference)", ""], ["w4", "here"]]


@pytest.mark.parametrize(
    "label", ["a | b", "*a*", "a `b", "<b>a", "[a](b)", "_a_ b", r"a \| b", "a\nb", "R&amp;D", "$a$ ~b~"]
)
def test_any_name_is_shown_as_it_is(label):
    rows = cells(markdown_table(make_results(dataclasses.replace(W4, label=label))))
    assert [len(row) for row in rows] == [6, 6, 6]
    assert rows[2][0] == " ".join(label.split())


def test_names_with_underscores_stay_readable_in_the_source():
    assert escape("Q4_K_M, acc_norm") == "Q4_K_M, acc_norm"


def test_accuracy_normalized_by_length_stands_for_a_task():
    results = make_results(make_model("w4", 5, accuracy(0.7), accuracy(0.6, metric="acc_norm"), kld(1e-3)))
    assert main_metric(results, "arc_easy") == "acc_norm"
    assert shown_metrics(results) == [("wikitext2", "ppl"), ("wikitext2", "kld_mean"), ("arc_easy", "acc_norm")]


def test_another_metric_of_the_harness_stands_for_its_task():
    results = make_results(make_model("w4", 5, accuracy(0.3, metric="bleu")), tasks=[ARC])
    bare = dataclasses.replace(results, models=(dataclasses.replace(REFERENCE, scores=()), *results.candidates))
    assert main_metric(bare, "arc_easy") == "bleu"


def test_a_task_with_divergences_alone_is_shown_by_them():
    bare = dataclasses.replace(REFERENCE, scores=())
    results = make_results(make_model("w4", 5, kld(0.0)), reference=bare, tasks=[WIKITEXT])
    assert main_metric(results, "wikitext2") is None
    assert shown_metrics(results) == [("wikitext2", "kld_mean")]
    assert cells(markdown_table(results))[2][-1] == "0"


@pytest.mark.parametrize(
    ("recovery", "text"),
    [
        ((100.0, 100.0, 100.0), "100.0 % [100.0, 100.0]"),
        ((99.98, 99.97, 99.99), "99.980 % [99.970, 99.990]"),
        ((104.0, 80.0, 128.0), "104.0 % [80.0, 128.0]"),
        ((99.9999991, 99.9999985, 100.0), "100.0000 % [100.0000, 100.0000]"),
    ],
)
def test_recovery_has_the_digits_that_its_interval_supports(recovery, text):
    assert format_recovery(Interval(*recovery)) == text
