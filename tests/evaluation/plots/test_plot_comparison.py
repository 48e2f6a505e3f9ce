import dataclasses

import pytest
from comparisons import ARC, WIKITEXT, accuracy, kld, make_model, make_results, ppl

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.evaluation.plots.comparison import draw_all, quality_pictures, slug

SENSITIVITY = Sensitivity(
    method="gradient", tokens=8, modules={"model.layers.0.mlp.up_proj": ModuleSensitivity(w4=1.0)}
)


def names(paths):
    return [path.name for path in paths]


def test_everything_that_was_measured_is_drawn(tmp_path):
    model = make_model("w4", 5_000_000, ppl(10.5), kld(1e-3), accuracy(0.7), depth=(1e-4, 1e-3))
    written = draw_all(make_results(model), tmp_path, sensitivities={"W4 + D8": SENSITIVITY})
    assert names(written) == [
        "quality-wikitext2-kld_mean.png",
        "quality-arc_easy-acc.png",
        "depth.png",
        "sensitivity-w4-d8.png",
    ]
    assert sorted(names(tmp_path.iterdir())) == sorted(names(written))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_what_was_not_measured_is_not_drawn(tmp_path):
    model = make_model("w4", 5_000_000, accuracy(0.7))
    assert names(draw_all(make_results(model), tmp_path, sensitivities={})) == ["quality-arc_easy-acc.png"]


def test_without_a_divergence_perplexity_is_drawn():
    model = make_model("w4", 5_000_000, ppl(10.5))
    assert quality_pictures(make_results(model)) == {("wikitext2", "ppl"): "quality-wikitext2-ppl.png"}


def test_accuracy_normalized_by_length_is_preferred():
    model = make_model("w4", 5_000_000, accuracy(0.7), accuracy(0.6, metric="acc_norm"))
    assert list(quality_pictures(make_results(model, tasks=[ARC]))) == [("arc_easy", "acc_norm")]


def test_only_the_first_text_is_drawn():
    second = dataclasses.replace(WIKITEXT, name="demo")
    model = make_model("w4", 5_000_000, ppl(10.5), dataclasses.replace(ppl(8.0), task="demo"))
    assert list(quality_pictures(make_results(model, tasks=[second, WIKITEXT]))) == [("demo", "ppl")]


def test_servers_alone_give_no_picture(tmp_path):
    results = make_results(make_model("server", None, ppl(10.5), accuracy(0.7)))
    assert draw_all(results, tmp_path, sensitivities={}) == []


def test_two_labels_never_share_a_file(tmp_path):
    written = draw_all(
        make_results(make_model("w4", None)),
        tmp_path,
        sensitivities={"a b": SENSITIVITY, "a-b": SENSITIVITY, "A/B": SENSITIVITY},
    )
    assert names(written) == ["sensitivity-a-b.png", "sensitivity-a-b-2.png", "sensitivity-a-b-3.png"]


def test_a_sensitivity_of_nothing_is_passed_over(tmp_path):
    empty = dataclasses.replace(SENSITIVITY, modules={})
    assert draw_all(make_results(make_model("w4", None)), tmp_path, sensitivities={"w4": empty}) == []


@pytest.mark.parametrize(
    ("text", "expected"), [("../etc/passwd", "etc-passwd"), ("Öl", "l"), ("...", "model"), ("a_b.C", "a_b.c")]
)
def test_file_names_are_plain(text, expected):
    assert slug(text) == expected
