import sys

import pytest

from srd_modifier.errors import MissingExtraError
from srd_modifier.evaluation.plots import style
from srd_modifier.evaluation.plots.style import family_styles, settings, shorten


def contrast(colour: str) -> float:
    """Against white, as the accessibility guidelines of the web define it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_families_differ_in_more_than_their_colour():
    styles = family_styles(f"family {number}" for number in range(66))
    assert len(set(styles.values())) == 66
    neighbours = list(styles.values())[:11]
    assert len({found.marker for found in neighbours}) == 11


def test_a_family_has_the_style_of_its_first_place():
    assert list(family_styles(["b", "a", "b"])) == ["b", "a"]


def test_texts_are_dark_enough_to_read():
    assert contrast(style.INK) > 7
    assert contrast(style.QUIET) > 4.5


def test_no_text_is_smaller_than_nine_points():
    with settings():
        import matplotlib

        sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
        assert min(matplotlib.rcParams[name] for name in (*sizes, "legend.fontsize")) >= 9


def test_the_settings_end_with_the_block_and_do_not_depend_on_those_before():
    import matplotlib

    with matplotlib.rc_context({"axes.grid": True, "lines.linewidth": 9.0}):
        with settings():
            assert (matplotlib.rcParams["axes.grid"], matplotlib.rcParams["lines.linewidth"]) == (False, 1.6)
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_no_backend_is_chosen():
    before = "matplotlib.pyplot" in sys.modules
    with settings():
        style.new_figure(1.0)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_extra_is_named_where_matplotlib_is_missing(monkeypatch):
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'srd-modifier\[plot\]'"):
        settings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("", ""),
        ("two lines of this", "two lines\nof this"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "RedHatAI/…ruct-\nquantized.w4a16"),
        ("costs $5", r"costs \$5"),
    ],
)
def test_long_names_are_cut_in_the_middle(text, expected):
    found = shorten(text, width=15, lines=2)
    assert found == expected
    assert all(len(line) <= 15 for line in found.replace("\\", "").splitlines())
