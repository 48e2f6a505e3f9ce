"""The lock by itself, and what of a model runs under it."""

import copy
import pickle
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from types import FrameType

import pytest
import torch
from background import A_WHILE, SOON, in_background
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel

from srd_modifier import hydrate, release, set_alpha
from srd_modifier.errors import SRDError
from srd_modifier.transformers.locking import WeightsLock, guard, steady_weights

IDS = torch.arange(8)[None]


@pytest.fixture
def lock() -> WeightsLock:
    return WeightsLock()


@pytest.fixture
def model(finished_checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(finished_checkpoint)


def change(lock: WeightsLock, log: list[str] | None = None, name: str = "") -> None:
    with lock.changing():
        if log is not None:
            log.append(name)


def call(lock: WeightsLock, log: list[str] | None = None, name: str = "") -> None:
    with lock.calling():
        if log is not None:
            log.append(name)


def is_waiting(future: Future) -> bool:
    try:
        future.exception(timeout=A_WHILE)
    except NotDone:
        return True
    return False


# --- the lock


def test_calls_run_at_the_same_time(lock):
    with lock.calling():
        in_background(lambda: call(lock)).result(SOON)


def test_a_change_waits_for_a_call(lock):
    with lock.calling():
        changed = in_background(lambda: change(lock))
        assert is_waiting(changed)
    changed.result(SOON)


def test_calls_and_changes_wait_for_a_change(lock):
    with lock.changing():
        waiting = [in_background(lambda: call(lock)), in_background(lambda: change(lock))]
        assert all(is_waiting(future) for future in waiting)
    for future in waiting:
        future.result(SOON)


def test_a_call_waits_behind_a_waiting_change(lock):
    log: list[str] = []
    with lock.calling():
        changed = in_background(lambda: change(lock, log, "change"))
        assert is_waiting(changed)
        called = in_background(lambda: call(lock, log, "call"))
        assert is_waiting(called)
    changed.result(SOON)
    called.result(SOON)
    assert log == ["change", "call"]


def test_a_call_inside_a_call_does_not_wait_behind_a_waiting_change(lock):
    with lock.calling():
        changed = in_background(lambda: change(lock))
        assert is_waiting(changed)
        with lock.calling():
            assert not changed.done()
        assert is_waiting(changed)  # the inner call ends, the outer goes on
    changed.result(SOON)


def test_first_come_first_served(lock):
    log: list[str] = []
    with lock.changing():
        order = ["call 1", "change 1", "call 2", "change 2", "call 3"]
        waiting = []
        for name in order:
            run = call if name.startswith("call") else change
            waiting.append(in_background(lambda run=run, name=name: run(lock, log, name)))
            assert is_waiting(waiting[-1])
    for future in waiting:
        future.result(SOON)
    assert log == order


def test_neither_changes_nor_calls_without_end_keep_the_other_out(lock):
    ended = threading.Event()

    def again_and_again(run) -> None:
        while not ended.is_set():
            run(lock)

    try:
        calling = [in_background(lambda: again_and_again(call)) for _ in range(2)]
        in_background(lambda: change(lock)).result(SOON)
        changing = [in_background(lambda: again_and_again(change)) for _ in range(2)]
        in_background(lambda: call(lock)).result(SOON)
        in_background(lambda: change(lock)).result(SOON)
    finally:
        ended.set()
    for future in calling + changing:
        future.result(SOON)


def test_a_change_in_the_middle_of_a_call_of_this_thread(lock):
    with lock.calling(), pytest.raises(SRDError, match="in the middle of its own forward, generate or hydration"):
        change(lock)
    change(lock)  # which has not been left waiting


def test_a_change_in_the_middle_of_a_change_of_this_thread(lock):
    with lock.changing(), pytest.raises(SRDError, match="call set_alpha, hydrate or release after it has returned"):
        change(lock)
    change(lock)


def test_a_call_in_the_middle_of_a_change_of_this_thread(lock):
    with lock.changing():
        call(lock)
    change(lock)


def test_what_fails_is_over(lock):
    for block in (lock.calling(), lock.changing()):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
    in_background(lambda: change(lock)).result(SOON)


def test_leaving_what_was_never_entered(lock):
    lock.leave("call")
    with lock.calling():
        lock.leave("call")
        changed = in_background(lambda: change(lock))
        assert is_waiting(changed)
    changed.result(SOON)


def test_a_call_whose_frame_has_ended_is_over(lock):
    def interrupted() -> None:
        lock.enter(sys._getframe())

    def going_on(began: threading.Event, ended: threading.Event) -> None:
        lock.enter(sys._getframe())
        began.set()
        ended.wait(SOON)

    interrupted()
    change(lock)
    began, ended = threading.Event(), threading.Event()
    in_background(lambda: going_on(began, ended))
    assert began.wait(SOON)
    changed = in_background(lambda: change(lock))
    time.sleep(1.5)  # long enough for it to look again
    assert not changed.done()
    ended.set()
    changed.result(SOON)


# --- a model


class Pause(LogitsProcessor):
    """Stops a generation at its second token until it is told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on, self.steps = threading.Event(), threading.Event(), 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == 2:
            self.reached.set()
            assert self.go_on.wait(SOON)
        return scores


def generate(model: PreTrainedModel, *processors: LogitsProcessor) -> torch.Tensor:
    """Logits of every step."""
    output = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        logits_processor=list(processors),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


CHANGES = [lambda model: set_alpha(model, 0), release, lambda model: hydrate(model, intent="INFORM")]


@pytest.mark.parametrize("changes", CHANGES, ids=["set_alpha", "release", "hydrate"])
def test_a_generation_has_one_set_of_weights_from_first_to_last_token(changes, model, finished_checkpoint):
    before = generate(AutoModelForCausalLM.from_pretrained(finished_checkpoint))
    pause = Pause()
    generated = in_background(lambda: generate(model, pause))
    assert pause.reached.wait(SOON)
    changed = in_background(lambda: changes(model))
    assert is_waiting(changed)
    pause.go_on.set()
    assert torch.equal(generated.result(SOON), before)
    changed.result(SOON)
    assert not torch.equal(generate(model), before)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.model], ids=["model", "base model"])
def test_a_forward_has_one_set_of_weights_from_first_to_last_layer(of, model, finished_checkpoint):
    def run(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return of(model)(input_ids=IDS)[0]

    before = run(AutoModelForCausalLM.from_pretrained(finished_checkpoint))
    reached, go_on = threading.Event(), threading.Event()

    def pause(*_) -> None:
        reached.set()
        assert go_on.wait(SOON)

    hook = model.model.layers[2].register_forward_hook(pause)
    forward = in_background(lambda: run(model))
    assert reached.wait(SOON)
    released = in_background(lambda: release(model))
    assert is_waiting(released)
    go_on.set()
    assert torch.equal(forward.result(SOON), before)
    released.result(SOON)
    hook.remove()
    assert not torch.equal(run(model), before)


@pytest.mark.parametrize("changes", CHANGES, ids=["set_alpha", "release", "hydrate"])
def test_a_change_from_inside_a_generation_is_refused(changes, model):
    class Changing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            changes(model)
            return scores

    with pytest.raises(SRDError, match="cannot change in the middle of its own forward, generate"):
        generate(model, Changing())
    changes(model)  # now it may


def test_a_change_from_inside_a_forward_is_refused(model):
    hook = model.model.layers[0].register_forward_hook(lambda *_: release(model))
    with pytest.raises(SRDError, match="cannot change in the middle of its own forward"):
        model(input_ids=IDS)
    hook.remove()
    release(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("run", [lambda model: model(input_ids=IDS), generate], ids=["forward", "generate"])
def test_a_call_that_fails_or_is_interrupted_is_over(run, error, model):
    def fail(*_) -> None:
        raise error

    hook = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(error):
        run(model)
    in_background(lambda: release(model)).result(SOON)
    with pytest.raises(error):
        run(model)
    hydrate(model)  # in the same thread
    hook.remove()
    run(model)


def test_a_forward_that_a_hook_before_ours_stops(model):
    def fail(*_) -> None:
        raise ValueError

    model.register_forward_pre_hook(fail, prepend=True)
    with steady_weights(model):
        with pytest.raises(ValueError, match=r"^$"):
            model(input_ids=IDS)
        released = in_background(lambda: release(model))
        assert is_waiting(released)
    released.result(SOON)


def test_steady_weights(model, logits):
    with steady_weights(model):
        before = logits(model)
        released = in_background(lambda: release(model))
        assert is_waiting(released)
        assert torch.equal(logits(model), before)  # though a change is waiting
        with pytest.raises(SRDError, match="in the middle of its own forward"):
            release(model)
    released.result(SOON)
    assert not torch.equal(logits(model), before)


def test_steady_weights_of_a_model_without_a_residual(random_llama, logits):
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    with steady_weights(model):
        logits(model)


def test_two_models_do_not_wait_for_each_other(model, finished_checkpoint):
    other = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    with steady_weights(model):
        release(other)
        in_background(lambda: hydrate(other)).result(SOON)


def test_a_model_that_assists_itself(model):
    output = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, assistant_model=model)
    assert output.shape == (1, 12)
    release(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_without_a_lock(copied, model, logits):
    before = logits(model)
    again = copied(model)
    with steady_weights(model):
        assert torch.equal(logits(again), before)
        released = in_background(lambda: release(model))
        assert is_waiting(released)
        in_background(lambda: generate(again)).result(SOON)  # does not wait behind it
    released.result(SOON)
    assert torch.equal(logits(again), before)


def test_hooks_are_there_once(model):
    before = len(model._forward_hooks), len(model.model._forward_pre_hooks)
    guard(model)
    assert (len(model._forward_hooks), len(model.model._forward_pre_hooks)) == before == (1, 1)


def test_a_saved_model_has_nothing_of_it(model, tmp_path, random_llama, logits):
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.state_dict().keys() == AutoModelForCausalLM.from_pretrained(random_llama).state_dict().keys()
    assert not again._forward_hooks
    assert torch.equal(logits(again), logits(model))


def test_a_model_that_is_gone_takes_its_lock_with_it(finished_checkpoint):
    import gc

    from srd_modifier.transformers.locking import _LOCKS

    gc.collect()
    before = len(_LOCKS)
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    generate(model)
    assert len(_LOCKS) == before + 2
    del model
    gc.collect()
    assert len(_LOCKS) == before


# --- torch.compile


COMPILED = {
    "torch.compile(model)": lambda model, **options: torch.compile(model, **options),
    "model.compile()": lambda model, **options: model.compile(**options) or model,
    "a forward": lambda model, **options: setattr(model, "forward", torch.compile(model.forward, **options)) or model,
    "a function": lambda model, **options: torch.compile(lambda **inputs: model(**inputs), **options),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "one graph"])
def test_a_compiled_model_follows_the_dial(how, fullgraph, model, finished_checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    compiled = COMPILED[how](model, backend="eager", fullgraph=fullgraph)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        release(model)
        release(plain)
        assert torch.equal(compiled(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("how", ["torch.compile(model)", "a forward"])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "one graph"])
def test_a_change_waits_for_a_compiled_model(how, fullgraph, model):
    reached, go_on = threading.Event(), threading.Event()

    def backend(graph, _):
        def run(*inputs):
            reached.set()
            assert go_on.wait(SOON)
            return graph(*inputs)

        return run

    compiled = COMPILED[how](model, backend=backend, fullgraph=fullgraph)
    with torch.no_grad():
        forward = in_background(lambda: compiled(input_ids=IDS))
        assert reached.wait(SOON)
        released = in_background(lambda: release(model))
        assert is_waiting(released)
    go_on.set()
    forward.result(SOON)
    released.result(SOON)


def test_the_frame_of_a_call_is_found(model):
    # where it were not, an interrupted forward would keep changes out for ever
    from srd_modifier.transformers.locking import _running_call

    found = []
    model.register_forward_hook(lambda module, *_: found.append(_running_call(module)))
    model(input_ids=IDS)
    assert isinstance(found[0], FrameType)
    assert found[0].f_code.co_name == "_wrapped_call_impl"
