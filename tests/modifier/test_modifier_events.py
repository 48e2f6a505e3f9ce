from typing import Any

import pytest
import torch
from llmcompressor.core import Event, State
from llmcompressor.core.events import EventType
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import nn

from srd_modifier.modifier.events import observe

CALLS: list[str] = []


class Quantizer(Modifier):
    """Writes down its events, and what its hook sees."""

    _module: nn.Module = PrivateAttr(default_factory=lambda: nn.Linear(1, 1))

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> str:
        CALLS.append("start")
        self.register_hook(self._module, lambda *_: CALLS.append("hook"), "forward")
        return "started"

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> str:
        CALLS.append(f"quantize {len(modules)}")
        return "quantized"

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> str:
        CALLS.append("end")
        return "ended"


class Observer:
    """Writes down what it is told, under its name."""

    def __init__(self, name: str, *finished: nn.Module) -> None:
        self.name = name
        self.finished = finished

    def calibration_starts(self, quantizer: Modifier) -> None:
        CALLS.append(f"{self.name}: calibration starts")

    def is_finished(self, module: nn.Module) -> bool:
        return module in self.finished

    def restore(self, quantizer: Modifier, modules: list[nn.Module]) -> list[nn.Module]:
        return [module for module in modules if module not in self.finished]

    def before_quantizing(self, quantizer: Modifier, modules: list[nn.Module]) -> None:
        CALLS.append(f"{self.name}: before {len(modules)}")

    def after_quantizing(self, quantizer: Modifier, modules: list[nn.Module]) -> None:
        CALLS.append(f"{self.name}: after {len(modules)}")

    def calibration_ends(self, quantizer: Modifier) -> None:
        CALLS.append(f"{self.name}: calibration ends")


@pytest.fixture
def quantizer() -> Quantizer:
    CALLS.clear()
    return Quantizer()


def calibrate(quantizer: Quantizer) -> list[str]:
    """Run the events of one epoch through upstream's own dispatch, and return what was written down."""
    CALLS.clear()
    quantizer.initialized_ = True
    quantizer.update_event(State(), Event(type_=EventType.CALIBRATION_START))
    quantizer.update_event(State(), Event(type_=EventType.SEQUENTIAL_EPOCH_END), modules=[nn.Linear(1, 1)])
    quantizer.update_event(State(), Event(type_=EventType.CALIBRATION_END))
    return list(CALLS)


def test_the_observer_stands_around_every_event(quantizer):
    observe(quantizer, Observer("a"))
    assert calibrate(quantizer) == [
        "a: calibration starts",
        "start",
        "a: before 1",
        "quantize 1",
        "a: after 1",
        "end",
        "a: calibration ends",
    ]


def test_what_the_events_return_is_passed_on(quantizer):
    observe(quantizer, Observer("a"))
    assert quantizer.on_calibration_start(State(), Event()) == "started"
    assert quantizer.on_sequential_epoch_end(State(), Event(), []) == "quantized"
    assert quantizer.on_sequential_epoch_end(state=State(), event=Event(), modules=[]) == "quantized"
    assert quantizer.on_calibration_end(State(), Event()) == "ended"


def test_undo_leaves_the_quantizer_as_it_was(quantizer):
    undo = observe(quantizer, Observer("a"))
    undo()
    assert calibrate(quantizer) == ["start", "quantize 1", "end"]
    assert "on_calibration_start" not in vars(quantizer)


def test_other_quantizers_are_not_observed(quantizer):
    other = Quantizer()
    observe(quantizer, Observer("a"))
    assert calibrate(other) == ["start", "quantize 1", "end"]


def test_two_observers_see_every_event_once(quantizer):
    observe(quantizer, Observer("a"))
    observe(quantizer, Observer("b"))
    calls = calibrate(quantizer)
    assert len(calls) == len(set(calls)) == 11
    quantizing = calls.index("quantize 1")
    assert {"a: before 1", "b: before 1"} < set(calls[:quantizing])
    assert {"a: after 1", "b: after 1"} < set(calls[quantizing:])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-in-first-out", "last-in-first-out"])
def test_two_observers_can_be_undone_in_any_order(quantizer, order):
    undo = [observe(quantizer, Observer("a")), observe(quantizer, Observer("b"))]
    for position in order:
        undo[position]()
    assert calibrate(quantizer) == ["start", "quantize 1", "end"]


def test_a_quantizer_that_fails_is_not_reported_as_done(quantizer, monkeypatch):
    def on_sequential_epoch_end(*_: Any, **__: Any) -> None:
        raise RuntimeError("no inputs")

    monkeypatch.setattr(Quantizer, "on_sequential_epoch_end", on_sequential_epoch_end)
    observe(quantizer, Observer("a"))
    with pytest.raises(RuntimeError, match="no inputs"):
        calibrate(quantizer)
    assert CALLS == ["a: calibration starts", "start", "a: before 1"]


def test_what_is_finished_is_neither_calibrated_nor_quantized(quantizer):
    done, left = quantizer._module, nn.Linear(1, 1)
    observe(quantizer, Observer("a", done))
    observe(quantizer, Observer("b"))
    calibrate(quantizer)
    done(torch.zeros(1, 1))
    assert "hook" not in CALLS
    CALLS.clear()
    quantizer.on_sequential_epoch_end(State(), Event(), [done, left])
    assert {"quantize 1", "a: before 1", "a: after 1"} < set(CALLS)


def test_hooks_are_put_on_everything_else_and_as_before_afterwards(quantizer):
    observe(quantizer, Observer("a"))
    observe(quantizer, Observer("b", nn.Linear(1, 1)))
    calibrate(quantizer)
    quantizer._module(torch.zeros(1, 1))
    assert CALLS[-1] == "hook"
    assert "register_hook" not in vars(quantizer)
