import dataclasses
import warnings

import pytest
from comparisons import accuracy, kld, make_model, make_results, ppl

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.quality import draw_quality, format_bytes, quality_points

THREE = make_results(
    make_model("w4", 5_000_000, ppl(10.5, 95.2, 94.8, 95.6), kld(5e-3, stderr=1e-4), accuracy(0.78), family="srd"),
    make_model("w4 + d2", 6_000_000, ppl(10.2, 98.0, 97.8, 98.2), kld(1e-3, stderr=2e-5), accuracy(0.79), family="srd"),
    make_model("q4", 5_500_000, ppl(10.6, 94.3, 94.0, 94.6), kld(7e-3, stderr=1e-4), accuracy(0.77)),
)


def with_scores(*scores):
    return make_results(make_model("w4", 5_000_000, *scores))


def test_the_picture_says_what_it_shows(tmp_path, words):
    draw_quality(THREE, tmp_path / "kld.svg", task="wikitext2", metric="kld_mean")
    found = words(tmp_path / "kld.svg")
    for text in ("WikiText-2: mean KL divergence, nats per token", "MB on disk", "lower is better", "Pareto front"):
        assert text in found
    assert "bars: 95 % confidence interval of each score" in found
    assert {"srd", "q4", "w4", "w4 + d2"} <= set(found)


def test_the_reference_is_a_line_with_its_size(tmp_path, words):
    draw_quality(THREE, tmp_path / "ppl.svg", task="wikitext2", metric="ppl")
    assert "bf16 (reference, 20 MB)" in words(tmp_path / "ppl.svg")


def test_of_divergences_the_reference_is_no_line(tmp_path, words):
    draw_quality(THREE, tmp_path / "kld.svg", task="wikitext2", metric="kld_mean")
    assert not any("bf16" in text for text in words(tmp_path / "kld.svg"))


def test_the_reference_is_no_point():
    assert [point.label for point in quality_points(THREE, task="wikitext2", metric="ppl")] == ["w4", "w4 + d2", "q4"]


def test_bars_of_a_score_alone_are_its_standard_errors():
    (point,) = quality_points(with_scores(kld(1e-3, stderr=1e-4)), task="wikitext2", metric="kld_mean")
    assert point.interval == pytest.approx((0.804e-3, 1.196e-3))


def test_bars_are_of_the_difference_where_that_was_measured():
    """On the same items a difference is known far better than the two scores; perplexities are the other way round."""
    (point,) = quality_points(with_scores(ppl(10.5, 95.2, 95.0, 95.5)), task="wikitext2", metric="ppl")
    assert point.interval == pytest.approx((10 / 0.955, 10 / 0.95))
    (point,) = quality_points(with_scores(accuracy(0.78, 97.5, 96.0, 99.0)), task="arc_easy", metric="acc")
    assert point.interval == pytest.approx((0.8 * 0.96, 0.8 * 0.99))


def test_bars_of_two_kinds_are_not_mixed():
    mixed = make_results(
        make_model("w4", 5_000_000, ppl(10.5, 95.2, 95.0, 95.5)), make_model("q4", 5_500_000, ppl(10.6, stderr=0.1))
    )
    intervals = [point.interval for point in quality_points(mixed, task="wikitext2", metric="ppl")]
    assert intervals == [pytest.approx((9.52, 11.48)), pytest.approx((10.404, 10.796))]


def test_the_picture_says_which_bars_they_are(tmp_path, words):
    draw_quality(THREE, tmp_path / "ppl.svg", task="wikitext2", metric="ppl")
    assert "bars: 95 % confidence interval of the difference from the reference" in words(tmp_path / "ppl.svg")


def test_without_errors_nothing_is_said_about_bars(tmp_path, words):
    draw_quality(with_scores(kld(1e-3)), tmp_path / "kld.svg", task="wikitext2", metric="kld_mean")
    assert not any("bars" in text for text in words(tmp_path / "kld.svg"))


def test_of_many_models_only_the_front_has_names(tmp_path, words):
    models = [
        make_model(f"model {number}", 5_000_000 + number, kld(1e-3 * number), family="srd") for number in range(1, 12)
    ]
    draw_quality(make_results(*models), tmp_path / "kld.svg", task="wikitext2", metric="kld_mean")
    assert [text for text in words(tmp_path / "kld.svg") if text.startswith("model")] == ["model 1"]


def test_a_divergence_of_nothing_is_drawn_and_said(tmp_path, words):
    results = make_results(make_model("w4", 5_000_000, kld(1e-3)), make_model("full", 9_000_000, kld(0.0)))
    draw_quality(results, tmp_path / "kld.svg", task="wikitext2", metric="kld_mean")
    assert "full (0)" in words(tmp_path / "kld.svg")


def test_a_server_without_a_size_is_left_out():
    results = make_results(make_model("server", None, ppl(10.1)), make_model("w4", 5_000_000, ppl(10.5)))
    assert [point.label for point in quality_points(results, task="wikitext2", metric="ppl")] == ["w4"]


@pytest.mark.parametrize(
    "results",
    [
        with_scores(kld(1e-3)),
        with_scores(kld(0.0)),
        with_scores(kld(1e-3, stderr=1e-2)),
        make_results(*(make_model(f"m{n}", 7, kld(1e-3)) for n in range(3))),
        make_results(*(make_model(f"m{n}", 10**12, kld(10.0**-n), family="$x^ _") for n in range(40))),
        make_results(*(make_model("a name " * 30 + str(n), 10**9 + n, kld(1e-3)) for n in range(20))),
    ],
    ids=["one", "zero", "wide-bars", "all-equal", "many", "long-names"],
)
def test_any_comparison_can_be_drawn(tmp_path, size_of, results):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_quality(results, tmp_path / "kld.png", task="wikitext2", metric="kld_mean")
    assert size_of(tmp_path / "kld.png")[0] == 1050


def test_the_same_comparison_gives_the_same_picture(tmp_path):
    for name in ("one.svg", "two.svg"):
        draw_quality(THREE, tmp_path / name, task="wikitext2", metric="ppl")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(("task", "metric"), [("wikitext2", "acc"), ("nowhere", "ppl")])
def test_a_score_that_nobody_has_is_a_sentence(tmp_path, task, metric):
    with pytest.raises(SRDError, match=rf"no model has both bytes on disk and a score of {task} {metric}"):
        draw_quality(THREE, tmp_path / "a.svg", task=task, metric=metric)
    assert not (tmp_path / "a.svg").exists()


def test_the_reference_alone_is_no_picture(tmp_path):
    with pytest.raises(SRDError, match="cannot be drawn"):
        draw_quality(dataclasses.replace(THREE, models=THREE.models[:1]), tmp_path / "a.svg", task="x", metric="ppl")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (14_696_792, "14.7 MB"), (1_000_000, "1 MB"), (16e9, "16 GB")]
)
def test_sizes_have_decimal_units(size, text):
    assert format_bytes(int(size)) == text
