"""One consistent set of weights for every call of a model, while other threads change them.

A call of a corrected model (its forward, its base model's forward, or `generate`) reads the weights; `set_alpha`,
`hydrate` and `release` write them. Any number of calls run at a time; a change waits for those that are running, and
the calls that come after it wait for the change. A call inside a call, as each forward of `generate` is, belongs to the
outer one and never waits.

Nothing of this hangs on the model but two hooks, which are functions of this module: a model is copied, pickled and
saved as before, and the hooks of a copy find no lock and do nothing.
"""

import functools
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from srd_modifier.errors import SRDError

_LOCKS: WeakKeyDictionary[nn.Module, "WeightsLock"] = WeakKeyDictionary()

_MARK = "_srd_guarded"  # on a method that is wrapped already
_LOOK_AGAIN_SECONDS = 1.0  # how often a waiting change looks for calls that were interrupted
_CALL_CODE = getattr(nn.Module.__call__, "__code__", None)


class WeightsLock:
    """Many calls at a time, or one change; first come, first served, so that neither can keep the other out."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._calls: dict[int, list[object]] = {}  # by thread: the running calls, the outermost first
        self._changing: int | None = None  # the thread that changes the weights
        self._waiting: list[_Place] = []

    def enter(self, call: object) -> None:
        """Begin a call in this thread; waits for changes that came earlier, unless it is inside another call.

        Args:
            call: what `leave` will be given. A frame counts as ended when it has ended, whether or not it left.
        """
        thread = threading.get_ident()
        with self._state:
            if thread not in self._calls and thread != self._changing:
                with self._queue(changes=False) as place:
                    self._state.wait_for(lambda: self._changing is None and not self._change_before(place))
            self._calls.setdefault(thread, []).append(call)

    def leave(self, call: object) -> None:
        """End a call of this thread, and what was begun inside it; one that never began is no error."""
        thread = threading.get_ident()
        with self._state:
            calls = self._calls.get(thread, [])
            if call in calls:
                del calls[calls.index(call) :]
                if not calls:
                    del self._calls[thread]
                    self._state.notify_all()

    @contextmanager
    def calling(self) -> Generator[None, None, None]:
        """A call in this thread, for as long as the block runs."""
        call = object()
        self.enter(call)
        try:
            yield
        finally:
            self.leave(call)

    @contextmanager
    def changing(self) -> Generator[None, None, None]:
        """A change of the weights by this thread; waits until no call is running.

        Raises:
            SRDError: this thread is inside a call or a change, and would wait for itself.
        """
        thread = threading.get_ident()
        with self._state:
            self._forget_ended()
            if thread in self._calls or thread == self._changing:
                raise SRDError(
                    "the weights of a model cannot change in the middle of its own forward, generate or hydration; "
                    "call set_alpha, hydrate or release after it has returned"
                )
            with self._queue(changes=True) as place:
                while self._changing is not None or self._calls or self._waiting[0] is not place:
                    self._state.wait(_LOOK_AGAIN_SECONDS)
                    self._forget_ended()
                self._changing = thread
        try:
            yield
        finally:
            with self._state:
                self._changing = None
                self._state.notify_all()

    @contextmanager
    def _queue(self, *, changes: bool) -> Generator["_Place", None, None]:
        place = _Place(changes)
        self._waiting.append(place)
        try:
            yield place
        finally:
            self._waiting.remove(place)
            self._state.notify_all()  # whoever stands behind may be next

    def _change_before(self, place: "_Place") -> bool:
        return any(earlier.changes for earlier in self._waiting[: self._waiting.index(place)])

    def _forget_ended(self) -> None:
        """Drop calls that can no longer leave: torch runs no hook after a KeyboardInterrupt."""
        running = {thread: [call for call in calls if not _has_ended(call)] for thread, calls in self._calls.items()}
        self._calls = {thread: calls for thread, calls in running.items() if calls}


class _Place:
    """A place in the queue; two are never equal."""

    def __init__(self, changes: bool) -> None:
        self.changes = changes


def guard(model: nn.Module) -> None:
    """Make the calls of a model wait for changes of its weights, and the changes for the calls.

    A call is a forward of the model or of its base model, a `generate`, or a call of `torch.compile(model)`. What
    `torch.compile` makes of a larger whole, and of a model compiled in place (`model.compile()`), is traced
    without the hooks: such calls belong in `steady_weights`.
    """
    if model in _LOCKS:
        return
    lock = WeightsLock()
    for module in {model, getattr(model, "base_model", model)}:
        _LOCKS[module] = lock
        module.register_forward_pre_hook(_before_forward, prepend=True)
        module.register_forward_hook(_after_forward, always_call=True)
    _guard_generate(type(model))
    _guard_compiled_modules()


@contextmanager
def steady_weights(model: nn.Module) -> Generator[None, None, None]:
    """Keep the weights of a model as they are during several calls, such as a generation loop of one's own.

    `set_alpha`, `hydrate` and `release` wait in other threads until the block ends, and are refused in this one. The
    block must not wait for another thread that calls the model: that call may be waiting behind a change.

    Args:
        model: any model; for one without a residual there is nothing to do.
    """
    lock = _LOCKS.get(model)
    if lock is None:
        yield
        return
    with lock.calling():
        yield


@contextmanager
def changing_weights(model: nn.Module) -> Generator[None, None, None]:
    """Change the weights of a guarded model while no call of it is running.

    Raises:
        SRDError: this thread is inside a call of the model.
    """
    with _LOCKS[model].changing():
        yield


def _before_forward(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a graph cannot wait: who runs it does
    lock = _LOCKS.get(module)
    if lock is not None:
        lock.enter(_running_call(module))


def _after_forward(module: nn.Module, _: Any, __: Any) -> None:
    if torch.compiler.is_compiling():
        return
    lock = _LOCKS.get(module)
    if lock is not None:
        lock.leave(_running_call(module))


def _running_call(module: nn.Module) -> object:
    """The frame of the module's call that runs this hook; the module itself where frames are not to be had."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL_CODE:
        frame = frame.f_back
    return frame or module


def _has_ended(call: object) -> bool:
    if not isinstance(call, FrameType):
        return False
    try:
        call.clear()  # refused, whatever the thread, while the frame is running
    except RuntimeError:
        return False
    return True


# --- what is not a hook is wrapped at its class, once


def _guard_generate(model: type) -> None:
    """`generate`, wherever the model's class has it from; Transformers has no hook around it."""
    for kind in model.__mro__:
        if "generate" in vars(kind):
            _wrap(kind, "generate", lambda model: model)


def _guard_compiled_modules() -> None:
    """Calls of what `torch.compile(model)` returns; torch traces the model's own hooks, and they do nothing then."""
    from torch._dynamo.eval_frame import OptimizedModule  # Transformers has imported it

    _wrap(OptimizedModule, "__call__", lambda compiled: compiled._orig_mod)


def _wrap(kind: Any, method: str, model_of: Callable[[Any], nn.Module]) -> None:
    """Have a method of a class run under the lock of its model, if that has one."""
    plain = getattr(kind, method)
    if getattr(plain, _MARK, None) is kind:  # a subclass may have copied the mark with the name and the docstring
        return

    @functools.wraps(plain)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(self, *args, **kwargs)
        lock = _LOCKS.get(model_of(self))
        if lock is None:
            return plain(self, *args, **kwargs)
        with lock.calling():
            return plain(self, *args, **kwargs)

    setattr(guarded, _MARK, kind)
    setattr(kind, method, guarded)
