import pytest

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.files import check_plot_path, save_figure
from srd_modifier.evaluation.plots.style import new_figure, settings


def draw(path):
    with settings():
        figure = new_figure(2.0)
        figure.add_subplot().plot([1, 2], [3, 4], label="a line")
        save_figure(figure, path)


@pytest.mark.parametrize(("name", "kind"), [("map.svg", "svg"), ("map.PNG", "png")])
def test_the_name_says_the_format(tmp_path, name, kind):
    assert check_plot_path(tmp_path / name) == kind


@pytest.mark.parametrize("name", ["map.pdf", "map", ".svg"])
def test_another_format_is_refused(tmp_path, name):
    with pytest.raises(SRDError, match=rf"{name}: cannot be drawn, expected a file name that ends in \.svg or \.png"):
        check_plot_path(tmp_path / name)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(SRDError, match=r"map\.svg: cannot be written, there is no directory .*nowhere"):
        check_plot_path(tmp_path / "nowhere" / "map.svg")


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_picture_has_the_same_bytes(tmp_path, name):
    draw(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    draw(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert b"<dc:date>" not in first


def test_a_picture_is_1050_pixels_wide(tmp_path, size_of):
    draw(tmp_path / "a.png")
    assert size_of(tmp_path / "a.png") == (1050, 300)


def test_a_write_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, path, **_):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(SRDError, match=r"a\.png: cannot be written: No space left on device"):
        draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
