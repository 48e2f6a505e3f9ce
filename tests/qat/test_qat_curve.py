import math
import warnings

import pytest

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.evaluation.plots import style
from srd_modifier.qat import QATSchedule
from srd_modifier.qat.curve import _figure, draw_curve


def trained(steps=100, *, every=5, schedule=None, loss=lambda step: 3 - step / 200, bits=True):
    """What a Trainer logs: the loss now and then, an evaluation at the middle and the end, and a summary."""
    schedule = schedule or QATSchedule.linear()
    history = []
    for step in range(every, steps + 1, every):
        width = {"bits": schedule.width(step - 1, steps)} if bits else {}
        history.append({"step": step, "epoch": step / steps, "loss": loss(step), "learning_rate": 1e-5, **width})
        if step in (steps // 2, steps):
            history.append({"step": step, "epoch": step / steps, "eval_loss": loss(step) + 0.1, **width})
    history.append({"step": steps, "epoch": 1.0, "train_loss": 2.7, "train_runtime": 3.0})
    return history


def lines(axes):
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.get_lines()}


def test_losses_above_and_the_width_below():
    history = trained()
    above, below = _figure(history, "tiny").axes
    assert lines(above) == {
        "training loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "evaluation loss": [(50, 2.85), (100, 2.6)],
    }
    (width,) = lines(below).values()
    assert width == [(entry["step"], entry["bits"]) for entry in history if "bits" in entry]
    assert (above.get_title(loc="left") or above.get_title()) == "tiny"
    assert below.get_xlabel() == "optimizer step"
    assert below.get_ylabel() == "width, bits"
    assert above.get_xlim() == below.get_xlim()
    assert above.get_yscale() == "linear"


def test_full_precision_is_marked():
    # 16 bits are logged at steps 5 and 10, fewer from 15 on
    for axes in _figure(trained(), None).axes:
        (ground,) = axes.patches
        assert (ground.get_x(), ground.get_width()) == (0, 10)
    assert not any(axes.patches for axes in _figure(trained(schedule=QATSchedule.constant()), None).axes)


def test_full_precision_has_no_more_height_than_16_bits():
    history = [{"step": 1, "loss": 2.0, "bits": 32.0}, {"step": 2, "loss": 2.0, "bits": 4.0}]
    assert lines(_figure(history, None).axes[1]).popitem()[1] == [(1, 16), (2, 4)]


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        (lambda step: 1 / step, "log"),
        (lambda step: 3 - step / 200, "linear"),
        (lambda step: 0.5 - step / 100, "linear"),  # falls below 0, which has no logarithm
        (lambda step: 3.0, "linear"),
    ],
)
def test_a_loss_over_more_than_a_decade_has_a_logarithmic_scale(loss, scale):
    assert _figure(trained(loss=loss), None).axes[0].get_yscale() == scale


def test_no_width_is_drawn_where_none_was_recorded():
    (axes,) = _figure(trained(bits=False), None).axes
    assert axes.get_xlabel() == "optimizer step"
    assert set(lines(axes)) == {"training loss", "evaluation loss"}


def test_a_history_out_of_order_is_drawn_in_order_of_steps():
    above, _ = _figure(list(reversed(trained())), None).axes
    steps = [step for step, _ in lines(above)["training loss"]]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    "history",
    [
        trained(),
        trained(loss=lambda step: 1 / step),
        trained(loss=lambda step: 3.0 if step < 50 else math.nan),
        trained(loss=lambda step: math.inf if step == 50 else 3.0),
        trained(2000, every=1),
        [{"step": 1, "loss": 2.0, "bits": 4.0}],
    ],
    ids=["linear", "decades", "diverged", "one-infinite", "long", "one-step"],
)
def test_any_training_can_be_drawn(tmp_path, history):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curve(history, tmp_path / "curve.png", title="a model " * 40)
    data = (tmp_path / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20], "big") == 1050


def test_the_picture_says_what_it_shows(tmp_path):
    draw_curve(trained(), tmp_path / "curve.svg", title="tiny-llama")
    picture = (tmp_path / "curve.svg").read_text()
    for text in ("tiny-llama", "training loss", "evaluation loss", "full precision", "4 bits", "optimizer step"):
        assert f"<!-- {text} -->" in picture


def test_the_same_history_gives_the_same_bytes(tmp_path):
    for name in ("one.svg", "two.svg", "one.png", "two.png"):
        draw_curve(trained(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    "history",
    [[], [{"step": 5, "train_loss": 2.0}], [{"step": 5, "eval_loss": 2.0}], [{"step": 5, "loss": math.nan}]],
    ids=["empty", "summary", "evaluation", "diverged"],
)
def test_no_loss_is_a_sentence(tmp_path, history):
    with pytest.raises(SRDError, match=r"curve\.png: cannot be drawn, no finite training loss was logged"):
        draw_curve(history, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("curve.jpg", r"curve\.jpg: cannot be drawn, expected a file name that ends in \.svg or \.png"),
        ("none/curve.png", r"curve\.png: cannot be written, there is no directory"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, name, message):
    with pytest.raises(SRDError, match=message):
        draw_curve(trained(), tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    def require(module, *, extra):
        raise MissingExtraError(f"{module} of {extra}")

    monkeypatch.setattr(style, "require", require)
    with pytest.raises(MissingExtraError, match="matplotlib of plot"):
        draw_curve(trained(), tmp_path / "curve.png")
