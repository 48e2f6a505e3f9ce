import json
import math
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd_modifier.errors import ConfigError
from srd_modifier.qat import QATSchedule
from srd_modifier.qat.schedule import NAMES, SHAPES

PUBLISHED = ((0.0, 16.0), (0.1, 16.0), (0.9, 4.0))


@st.composite
def schedules(draw, shapes=SHAPES):
    """Schedules whose progress has up to four decimals and whose widths have two."""
    starts = sorted(draw(st.sets(st.integers(1, 10_000), max_size=5)) | {0})
    size = len(starts)
    widths = sorted(draw(st.lists(st.integers(200, 3200), min_size=size, max_size=size)), reverse=True)
    milestones = tuple((start / 10_000, width / 100) for start, width in zip(starts, widths, strict=True))
    return QATSchedule(milestones, draw(st.sampled_from(shapes)))


def exact_linear(schedule, progress):
    """The reference: the straight line through the milestones' decimal numbers, in fractions."""
    points = [(Fraction(str(start)), Fraction(str(width))) for start, width in schedule.milestones]
    if progress >= points[-1][0]:
        return points[-1][1]
    for (left, high), (right, low) in pairwise(points):
        if left <= progress <= right:
            return (high * (right - progress) + low * (progress - left)) / (right - left)
    raise AssertionError(progress)


def test_the_published_schedule():
    schedule = QATSchedule.linear()
    assert schedule.milestones == PUBLISHED
    assert [schedule.width_at(progress) for progress in (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1)] == [
        *(16, 16, 16, 13, 10, 7, 4, 4, 4)
    ]


@pytest.mark.parametrize(
    ("shape", "widths"),
    [("linear", [16, 13, 10, 7, 4]), ("step", [16, 16, 16, 16, 4])],
)
def test_between_milestones(shape, widths):
    schedule = QATSchedule(((0, 16), (1, 4)), shape)
    assert [schedule.width(step, 5) for step in range(5)] == widths


def test_a_cosine_falls_slowly_at_its_ends():
    schedule = QATSchedule.cosine()
    assert [schedule.width_at(progress) for progress in (0.1, 0.5, 0.9)] == [16, 10, 4]
    assert schedule.width_at(0.3) == pytest.approx(10 + 6 * math.cos(math.pi / 4), abs=1e-14)
    assert schedule.width_at(0.7) == pytest.approx(10 - 6 * math.cos(math.pi / 4), abs=1e-14)


@pytest.mark.parametrize(
    ("schedule", "milestones"),
    [
        (QATSchedule.steps(), ((0, 16), (0.1, 8), (0.5, 4))),
        (QATSchedule.steps((16, 4)), ((0, 16), (0.1, 4))),
        (QATSchedule.steps((16, 8, 6, 4), warmup=0.2, stabilization=0.2), ((0, 16), (0.2, 8), (0.4, 6), (0.6, 4))),
        (QATSchedule.steps((4,), warmup=0), ((0, 4),)),
        (QATSchedule.constant(), ((0, 4),)),
        (QATSchedule.linear(warmup=0, stabilization=0), ((0, 16), (1, 4))),
        (QATSchedule.linear(bits=3, warmup=0.3, stabilization=0.6, start=8), ((0, 8), (0.3, 8), (0.4, 3))),
        (QATSchedule.linear(start=32), PUBLISHED),
    ],
)
def test_constructors(schedule, milestones):
    assert schedule.milestones == milestones


def test_a_wider_milestone_is_full_precision_and_the_fall_begins_at_16():
    assert QATSchedule(((0, 32), (0.5, 16), (1, 4))) == QATSchedule(((0, 16), (0.5, 16), (1, 4)))
    assert QATSchedule(((0, 32), (1, 4))).width_at(0.5) == 10


@given(schedules(), st.integers(1, 400))
def test_it_never_rises_and_keeps_within_its_first_and_last_width(schedule, steps):
    widths = [schedule.width(step, steps) for step in range(steps)]
    assert widths == sorted(widths, reverse=True)
    assert schedule.milestones[-1][1] <= widths[-1] <= widths[0] <= schedule.milestones[0][1]


@given(schedules())
def test_it_is_exact_at_milestones_and_stays_after_the_last(schedule):
    for progress, width in schedule.milestones:
        assert schedule.width_at(progress) == width
        # four decimals are whole steps here
        assert schedule.width(round(progress * 10_000), 10_001) == width
    assert schedule.width_at(1) == schedule.milestones[-1][1]


@given(schedules(("linear",)), st.integers(2, 5000), st.data())
def test_a_linear_schedule_is_the_line_in_exact_fractions(schedule, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    assert schedule.width(step, steps) == float(exact_linear(schedule, Fraction(step, steps - 1)))


@given(schedules(("step",)), st.floats(0, 1))
def test_a_schedule_in_steps_has_no_width_but_its_milestones(schedule, progress):
    reached = [width for start, width in schedule.milestones if start <= progress]
    assert schedule.width_at(progress) == reached[-1]


@given(schedules(), st.integers(2, 400))
def test_the_first_step_is_at_0_and_the_last_at_1(schedule, steps):
    assert schedule.width(0, steps) == schedule.width_at(0)
    assert schedule.width(steps - 1, steps) == schedule.width_at(1)


@given(schedules())
def test_the_only_step_of_a_run_is_its_last(schedule):
    assert schedule.width(0, 1) == schedule.width_at(1)


@given(schedules())
def test_text_and_json_bring_it_back(schedule):
    assert QATSchedule.parse(str(schedule)) == schedule
    assert QATSchedule.from_dict(json.loads(json.dumps(schedule.as_dict()))) == schedule


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("linear", QATSchedule.linear()),
        (" cosine ", QATSchedule.cosine()),
        ("step", QATSchedule.steps()),
        ("constant", QATSchedule.constant()),
        ("0:16,0.1:8,0.5:4", QATSchedule(((0, 16), (0.1, 8), (0.5, 4)))),
        ("step=0:32, 0.1:8, 0.5:4", QATSchedule.steps()),
        ("cosine=0:16,1:4", QATSchedule(((0, 16), (1, 4)), "cosine")),
        ("linear=0:4", QATSchedule.constant()),
    ],
)
def test_what_the_command_line_takes(text, schedule):
    assert QATSchedule.parse(text) == schedule


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 4.5, 8, 16])
def test_every_name_ends_at_the_width_that_is_asked_for(name, bits):
    schedule = QATSchedule.parse(name, bits=bits)
    schedule.check_ends_at(bits)
    assert schedule.width_at(0) == (bits if name == "constant" else 16)


def test_step_has_the_widths_above_the_last():
    assert str(QATSchedule.parse("step", bits=3)) == "step=0:16,0.1:8,0.5:3"
    assert str(QATSchedule.parse("step", bits=8)) == "step=0:16,0.1:8"


NO_WIDTH = "has a width that is not a number of 2 or more"
NO_PAIR = "of the schedule is not a progress and a width"
NOTHING_LEFT = "leave nothing of the training for the fall of the width"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QATSchedule(()), "a schedule needs at least one milestone, such as 0:4"),
        (
            lambda: QATSchedule(((0.1, 16), (0.9, 4))),
            "a schedule starts at progress 0, but its first milestone is 0.1:16",
        ),
        (
            lambda: QATSchedule(((0, 16), (0.5, 8), (0.5, 4))),
            "the milestone 0.5:4 of the schedule comes after 0.5:8, but not at a later progress",
        ),
        (
            lambda: QATSchedule(((0, 16), (0.5, 8), (0.4, 4))),
            "the milestone 0.4:4 of the schedule comes after 0.5:8, but not at a later progress",
        ),
        (
            lambda: QATSchedule(((0, 16), (1.5, 4))),
            "the milestone 1.5:4 of the schedule is at a progress that is not from 0 to 1",
        ),
        (
            lambda: QATSchedule(((-0.5, 16), (1, 4))),
            "the milestone -0.5:16 of the schedule is at a progress that is not from 0 to 1",
        ),
        (
            lambda: QATSchedule(((math.nan, 16),)),
            "the milestone nan:16 of the schedule is at a progress that is not from 0 to 1",
        ),
        (
            lambda: QATSchedule(((0, 4), (0.5, 8))),
            "the width of a schedule never rises, but its milestone 0.5:8 comes after 0:4",
        ),
        (
            lambda: QATSchedule(((0, 16), (0.5, 32))),
            "the width of a schedule never rises, but its milestone 0.5:32 comes after 0:16",
        ),
        (lambda: QATSchedule(((0, 16), (1, 1.5))), f"the milestone 1:1.5 of the schedule {NO_WIDTH}"),
        (lambda: QATSchedule(((0, math.inf), (1, 4))), f"the milestone 0:inf of the schedule {NO_WIDTH}"),
        (lambda: QATSchedule(((0, 16), (1, math.nan))), f"the milestone 1:nan of the schedule {NO_WIDTH}"),
        (lambda: QATSchedule(((0, "16"),)), f"the milestone (0, '16') {NO_PAIR}"),
        (lambda: QATSchedule(((0, True),)), f"the milestone (0, True) {NO_PAIR}"),
        (lambda: QATSchedule(((0, 16, 4),)), f"the milestone (0, 16, 4) {NO_PAIR}"),
        (lambda: QATSchedule((16, 4)), f"the milestone 16 {NO_PAIR}"),
        (lambda: QATSchedule("0:"), f"the milestone '0' {NO_PAIR}"),
        (lambda: QATSchedule(4), "a schedule is a list of milestones, not 4"),
        (lambda: QATSchedule(((0, 4),), "sine"), "the shape of a schedule is one of linear, cosine, step, not 'sine'"),
        (lambda: QATSchedule.linear(warmup=-0.1), "the warm-up of a schedule is a share of the training from 0 to 1"),
        (lambda: QATSchedule.cosine(stabilization=1.5), "the stabilization of a schedule is a share of the training"),
        (lambda: QATSchedule.linear(warmup=math.nan), "from 0 to 1, not nan"),
        (
            lambda: QATSchedule.linear(warmup=0.5, stabilization=0.5),
            f"a warm-up of 0.5 and a stabilization of 0.5 {NOTHING_LEFT}",
        ),
        (lambda: QATSchedule.cosine(warmup=0.7, stabilization=0.6), NOTHING_LEFT),
        (lambda: QATSchedule.steps(warmup=0.7, stabilization=0.3), NOTHING_LEFT),
        (lambda: QATSchedule.steps(warmup=0), "needs a warm-up above 0, which is the time of its first width"),
        (lambda: QATSchedule.steps(()), "a schedule needs at least one milestone"),
        (lambda: QATSchedule.steps((4, 8)), "its milestone 0.1:8 comes after 0:4"),
        (lambda: QATSchedule.linear(bits=1), f"the milestone 0.9:1 of the schedule {NO_WIDTH}"),
        (lambda: QATSchedule.linear(bits=4, start=3), "its milestone 0.9:4 comes after 0.1:3"),
        (lambda: QATSchedule.constant(bits=0), f"the milestone 0:0 of the schedule {NO_WIDTH}"),
        (lambda: QATSchedule.from_dict({"milestones": [[0, 4]]}), "has milestones and shape, but this one has milest"),
        (lambda: QATSchedule.from_dict({}), "has milestones and shape, but this one has nothing"),
        (
            lambda: QATSchedule.from_dict({"milestones": [[0, 4]], "shape": "linear", "bits": 4}),
            "but this one has bits, milestones, shape",
        ),
        (lambda: QATSchedule.from_dict({"milestones": None, "shape": "linear"}), "a list of milestones, not None"),
    ],
)
def test_a_bad_schedule_is_refused_by_name(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmoid", "there is no schedule 'sigmoid': give linear, cosine, step, constant, or milestones such as 0:16"),
        ("", "there is no schedule ''"),
        ("4", "there is no schedule '4'"),
        ("0:16,half:4", "the milestone 'half:4' of the schedule is not PROGRESS:BITS, as in 0.9:4"),
        ("0:16,0.9", "the milestone '0.9' of the schedule is not PROGRESS:BITS"),
        ("0:16,0.9:4:2", "the milestone '0.9:4:2' of the schedule is not PROGRESS:BITS"),
        ("0:16,,0.9:4", "the milestone '' of the schedule is not PROGRESS:BITS"),
        ("sine=0:16,0.9:4", "the shape of a schedule is one of linear, cosine, step, not 'sine'"),
        ("=0:16", "the shape of a schedule is one of linear, cosine, step, not ''"),
        ("cosine=", "the milestone '' of the schedule is not PROGRESS:BITS"),
        ("0.1:16,0.9:4", "a schedule starts at progress 0, but its first milestone is 0.1:16"),
        ("0:16,0.9:nan", "the milestone 0.9:nan of the schedule has a width"),
    ],
)
def test_a_bad_text_is_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        QATSchedule.parse(text)
    assert message in str(caught.value)


def test_a_schedule_that_ends_at_another_width_than_the_export_is_refused():
    schedule = QATSchedule.parse("0:16,0.9:5")
    schedule.check_ends_at(5)
    with pytest.raises(ConfigError, match=r"the schedule 0:16,0\.9:5 ends at 5 bits, but w4a16 has 4: give it a last"):
        schedule.check_ends_at(4, "w4a16")
    QATSchedule.constant(16).check_ends_at(32)


@pytest.mark.parametrize(("step", "steps"), [(-1, 4), (4, 4), (0, 0)])
def test_a_step_that_the_training_does_not_have(step, steps):
    with pytest.raises(ValueError, match=f"a training of {steps} steps has no step {step}"):
        QATSchedule.linear().width(step, steps)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_a_progress_outside_of_the_training(progress):
    with pytest.raises(ValueError, match="progress is from 0 to 1, not"):
        QATSchedule.linear().width_at(progress)


def test_it_needs_no_torch():
    code = "import sys; from srd_modifier.qat import QATSchedule; QATSchedule.linear(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_package_has_no_other_names():
    import srd_modifier.qat

    assert dir(srd_modifier.qat) == ["QATSchedule", "ScheduledQATCallback"]
    with pytest.raises(AttributeError, match=r"module 'srd_modifier\.qat' has no attribute 'Schedule'"):
        srd_modifier.qat.Schedule  # noqa: B018 - looking it up is the test
