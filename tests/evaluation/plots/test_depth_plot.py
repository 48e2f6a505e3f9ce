import warnings

import pytest
from comparisons import kld, make_model, make_results

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.depth import chunk_borders, draw_depth


def curves(*depths, **fields):
    return make_results(
        *(make_model(f"model {number}", 1, kld(1e-3), depth=depth, **fields) for number, depth in enumerate(depths))
    )


def test_the_picture_says_what_it_shows(tmp_path, words):
    draw_depth(curves((1e-4, 1e-3, 2e-3, 1e-2), (2e-4, 2e-3, 3e-3, 2e-2)), tmp_path / "depth.svg")
    found = words(tmp_path / "depth.svg")
    for text in ("model 0", "model 1", "decoder layer", "mean KL divergence, nats per token"):
        assert text in found
    assert [text for text in found if text in ("early", "factual", "reasoning", "governance")] == [
        "early",
        "factual",
        "reasoning",
    ], "four layers have none beyond 77 %"


def test_models_of_different_depth_share_an_axis_in_percent(tmp_path, words):
    draw_depth(curves((1e-4, 1e-3), (1e-4, 1e-3, 1e-2)), tmp_path / "depth.svg")
    found = words(tmp_path / "depth.svg")
    assert "depth, percent" in found
    assert "governance" in found


def test_models_without_a_depth_are_left_out(tmp_path, words):
    draw_depth(curves(None, (1e-4, 1e-3)), tmp_path / "depth.svg")
    found = words(tmp_path / "depth.svg")
    assert "model 0" not in found
    assert "model 1" in found


@pytest.mark.parametrize("layers", [1, 2, 5, 8, 28, 48, 126])
def test_chunks_meet_and_cover_all_layers(layers):
    borders = [border for chunk in chunk_borders(layers).values() for border in chunk]
    assert (borders[0], borders[-1]) == (-0.5, layers - 0.5)
    assert borders[1:-1:2] == borders[2:-1:2]


def test_chunks_begin_where_the_modifier_says_they_do():
    assert chunk_borders(48) == {
        "early": (-0.5, 9.5),
        "factual": (9.5, 19.5),
        "reasoning": (19.5, 36.5),
        "governance": (36.5, 47.5),
    }
    assert chunk_borders(None)["governance"] == (77, 100)


@pytest.mark.parametrize(
    "results",
    [
        curves((1e-3,)),
        curves((0.0, 0.0, 0.0)),
        curves((0.0, 1e-3, 0.0), (1e-300, 1e-3, 1e3)),
        curves(*([10.0 ** -(layer % 7) for layer in range(126)] for _ in range(24)), family="one"),
    ],
    ids=["one-layer", "nothing-lost", "some-zero", "many"],
)
def test_any_depth_can_be_drawn(tmp_path, size_of, results):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_depth(results, tmp_path / "depth.png")
    assert size_of(tmp_path / "depth.png")[0] == 1050


def test_no_depth_is_a_sentence(tmp_path):
    with pytest.raises(SRDError, match=r"depth\.svg: cannot be drawn, no model was measured layer by layer"):
        draw_depth(curves(None, ()), tmp_path / "depth.svg")
