import sys
import warnings

import numpy as np
import pytest

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.evaluation.plots.heatmap import damage_grid, draw_heatmap


def sensitivity(**damages):
    modules = {
        name.replace("__", "."): ModuleSensitivity(w4=w4, corrected=corrected, mixed=None if corrected is None else 0.0)
        for name, (w4, corrected) in damages.items()
    }
    return Sensitivity(method="gradient", tokens=8, modules=modules)


SMALL = sensitivity(
    lm_head=(0.5, None),
    model__layers__0__self_attn__q_proj=(1e-3, 1e-5),
    model__layers__0__mlp__experts__0__up_proj=(1e-4, 1e-6),
    model__layers__0__mlp__experts__1__up_proj=(2e-4, 0.0),
    model__layers__2__self_attn__q_proj=(3e-3, None),
)


def test_cells_are_layers_and_kinds_with_experts_summed():
    rows, columns, w4 = damage_grid(SMALL, alpha=0.0)
    assert rows == ["self_attn.q_proj", "mlp.experts.up_proj", "lm_head"]
    assert columns == ["0", "2", "outside"]
    nan = np.nan
    np.testing.assert_allclose(w4, [[1e-3, 3e-3, nan], [3e-4, nan, nan], [nan, nan, 0.5]])
    _, _, corrected = damage_grid(SMALL, alpha=1.0)
    np.testing.assert_allclose(corrected, [[1e-5, 3e-3, nan], [1e-6, nan, nan], [nan, nan, 0.5]])


def test_other_towers_are_outside_with_their_layers_summed():
    rows, columns, grid = damage_grid(
        sensitivity(visual__blocks__0__attn__qkv=(0.25, None), visual__blocks__1__attn__qkv=(0.5, None)), alpha=0.0
    )
    assert (rows, columns, grid.tolist()) == (["visual.blocks.attn.qkv"], ["outside"], [[0.75]])


def test_layers_are_in_the_order_of_their_numbers():
    modules = {f"model.layers.{layer}.mlp.up_proj": ModuleSensitivity(w4=layer) for layer in (10, 9, 1)}
    _, columns, grid = damage_grid(Sensitivity(method="forward", tokens=1, modules=modules), alpha=0.0)
    assert (columns, grid.tolist()) == (["1", "9", "10"], [[1, 9, 10]])


def test_the_picture_says_what_it_shows(tmp_path):
    draw_heatmap(SMALL, tmp_path / "map.svg")
    picture = (tmp_path / "map.svg").read_text()
    for text in ("self_attn.q_proj", "mlp.experts.up_proj", "lm_head", "outside", "plain W4: 0.504 nats per token"):
        assert f"<!-- {text} -->" in picture
    assert "<!-- corrected, alpha 1: 0.503 nats per token -->" in picture


def test_a_picture_can_be_drawn_as_png(tmp_path):
    draw_heatmap(SMALL, tmp_path / "map.PNG")
    assert (tmp_path / "map.PNG").read_bytes().startswith(b"\x89PNG")


MANY = {
    f"model.layers.{layer}.{kind}": (10.0 ** -(layer % 12), 1e-30)
    for layer in range(126)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
}


@pytest.mark.parametrize(
    "damages",
    [{"lm_head": (0.0, 0.0)}, {"lm_head": (1e-3, None)}, MANY],
    ids=["no-damage", "one-value", "many-layers"],
)
def test_any_sensitivity_can_be_drawn(tmp_path, damages):
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        draw_heatmap(sensitivity(**damages), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_many_layers_are_no_wider_than_few(tmp_path, size_of):
    draw_heatmap(SMALL, tmp_path / "few.png")
    draw_heatmap(sensitivity(**MANY), tmp_path / "many.png")
    assert size_of(tmp_path / "few.png")[0] == size_of(tmp_path / "many.png")[0] == 1050


def test_nothing_is_left_behind_in_the_process(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    draw_heatmap(SMALL, tmp_path / "map.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_no_modules_give_no_picture(tmp_path):
    with pytest.raises(SRDError, match=r"map\.svg: cannot be drawn, the sensitivity has no modules"):
        draw_heatmap(sensitivity(), tmp_path / "map.svg")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(SRDError, match=r"map\.svg: cannot be written, there is no directory .*nowhere"):
        draw_heatmap(SMALL, tmp_path / "nowhere" / "map.svg")


def test_the_extra_is_named_where_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'srd-modifier\[plot\]'"):
        draw_heatmap(SMALL, tmp_path / "map.svg")
