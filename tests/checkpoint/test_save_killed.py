"""A save that is killed, or runs out of disk, at every point: nothing, the old model or the new one, never a mixture.

A child process saves, and is killed right before its k-th call to the file system, for every k up to the last. It is
forked, so that libraries and tensors are there already and hundreds of kills take seconds.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import forked
import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import (
    CORRECTED,
    DEFAULT,
    ENTRIES,
    INDEX,
    base_tensors,
    digests,
    residuals,
    write_base,
    write_checkpoint,
)

from srd_modifier.checkpoint.atomic import merge_directory, new_directory
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.writer import SidecarWriter
from srd_modifier.errors import CheckpointError

Save = Callable[[], Any]
Result = TypeVar("Result")

# what Python reports through its audit hooks, whichever function was called, and what it does not
EVENTS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
}
CALLS = ("pwrite", "posix_fallocate", "sendfile", "write", "ftruncate")
KILLED, FINISHED = 9, 0


def in_child(work: Callable[[], int]) -> int:
    """Exit status of a forked process that does some work."""
    status = forked.in_child(lambda: os._exit(work()))
    assert os.WIFEXITED(status), f"the child died of signal {os.WTERMSIG(status)}"
    return os.WEXITSTATUS(status)


def killed_at(call: int, folder: Path, save: Save) -> bool:
    """Run `save` in a child that dies right before its `call`-th call below `folder`; False if it finished before."""

    def work() -> int:
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1
            if seen == call:
                os._exit(KILLED)

        def audit(event: str, args: tuple[Any, ...]) -> None:
            writing = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(folder))
            if event in EVENTS or writing:
                count()

        def counted(function: Callable[..., Result]) -> Callable[..., Result]:
            def wrapper(*args: Any, **kwargs: Any) -> Result:
                count()
                if function is pwrite and seen + 1 == call:  # instead of after this write, in the middle of it
                    function(args[0], args[1][: len(args[1]) // 2], args[2])
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return wrapper

        pwrite = os.pwrite
        os.fsync = lambda descriptor: count()  # takes long, and a killed process loses nothing that it has written
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        sys.addaudithook(audit)
        save()
        return FINISHED

    status = in_child(work)
    assert status in (KILLED, FINISHED), "the save failed by itself"
    return status == KILLED


def kill_everywhere(folder: Path, save: Save, check: Callable[[int], None], *, from_end: int = 0) -> int:
    """Kill `save` at every point and check after each; the number of points.

    With `from_end`, every one of the last points, and every tenth of those before.
    """
    last, step = 0, 64
    while from_end and step:  # how many there are, by doubling and halving
        if killed_at(last + step, folder, save):
            last += step
        else:
            step //= 2
        check(last)
    call = kills = 1
    while killed_at(call, folder, save):
        check(call)
        call += 10 if call < last - from_end - 10 else 1
        kills += 1
    return kills - 1


def outcome(target: Path, **known: dict[str, str]) -> str:
    """What a loader finds at `target`: `nothing`, `refused`, or the name of the known directory that it is."""
    if not target.exists():
        return "nothing"
    found = digests(target)
    for name, files in known.items():
        if found == files:
            Sidecar.open(target).verify()
            return name
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Sidecar.open(target)
    return "refused"


# --- saving as save_pretrained does it, with a model that is made already --------------------------------------------


@dataclass
class PreparedModel:
    """Stands for a quantized model: `save_pretrained` writes the small base."""

    seed: int
    base: Path

    def modules(self) -> tuple[()]:
        """All are packed."""
        return ()

    def save_pretrained(self, directory: str, *args: Any, **kwargs: Any) -> None:
        Path(directory).mkdir(exist_ok=True)
        for file in self.base.iterdir():
            shutil.copyfile(file, Path(directory, file.name))


class PreparedCapture:
    """Stands for a capture with the residuals computed: it writes them as the real one does."""

    modules = {module: SimpleNamespace(name=module) for module in CORRECTED}
    format, alpha, layer_alphas, base_digests = DEFAULT, 1.0, {}, {}

    def __init__(self, seed: int) -> None:
        self._residuals = residuals(seed)

    def compress_remaining(self, parent: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=".srd-residual-", dir=parent))
        writer = SidecarWriter(self._folder, ENTRIES)
        for module, encoded in self._residuals.items():
            writer.write(module, encoded)
        writer.finish(DEFAULT)

    def files(self) -> list[Path]:
        return sorted(self._folder.iterdir())

    def settle(self, directory: Path) -> None:
        """There is no budget to spend."""

    def importance(self) -> dict[str, Any]:
        return {}

    def sensitivity(self) -> None:
        return None


@pytest.fixture
def saver(tmp_path: Path) -> Callable[[int, Path], Save]:
    """A function that saves one of two models to a target through the modifier's own `save_pretrained`."""
    from srd_modifier.modifier.saving import install_save

    def make(seed: int, target: Path) -> Save:
        base = tmp_path / "models" / str(seed)
        if not base.is_dir():
            base.parent.mkdir(exist_ok=True)
            write_base(base, seed)
        capture = PreparedCapture(seed)

        def save() -> None:
            model: Any = PreparedModel(seed, base)
            install_save(model, capture)  # type: ignore[arg-type]
            model.save_pretrained(target)

        return save

    return make


def saved(save: Save, target: Path) -> dict[str, str]:
    """Save without a kill, for the bytes; the target is removed again."""
    assert in_child(lambda: save() or FINISHED) == FINISHED
    found = digests(target)
    shutil.rmtree(target)
    return found


def test_a_save_that_is_not_killed_is_whole(tmp_path: Path, saver: Callable[[int, Path], Save]) -> None:
    target = tmp_path / "work" / "out"
    saver(0, target)()
    Sidecar.open(target).verify()
    assert sorted(digests(target)) == [
        "config.json",
        "model.safetensors",
        "srd/residual-00001-of-00001.safetensors",
        "srd/residual.safetensors.index.json",
        "tokenizer.json",
    ]


def test_a_new_save_that_is_killed_leaves_nothing_or_all(tmp_path: Path, saver: Callable[[int, Path], Save]) -> None:
    target = tmp_path / "work" / "out"
    save = saver(0, target)
    new = saved(save, target)
    outcomes: list[str] = []

    def check(call: int) -> None:
        outcomes.append(outcome(target, new=new))
        for path in target.parent.iterdir():
            shutil.rmtree(path)

    assert kill_everywhere(tmp_path / "work", save, check) > 25
    assert set(outcomes) == {"nothing", "new"}
    assert outcomes == sorted(outcomes, key=["nothing", "new"].index)


def test_a_save_over_another_checkpoint_that_is_killed_is_never_a_mixture(
    tmp_path: Path, saver: Callable[[int, Path], Save]
) -> None:
    """The old model, the new one, or a directory without config.json that every loader refuses.

    The user's own files stay, and saving again heals what is refused.
    """
    target, notes = tmp_path / "work" / "out", "notes/plan.txt"
    save_old, save = saver(1, target), saver(0, target)
    new = saved(save, target)
    old = saved(save_old, target)
    assert all(new[name] != old[name] for name in new if name not in ("tokenizer.json", INDEX))

    def restore() -> None:
        shutil.rmtree(target, ignore_errors=True)
        save_old()
        (target / "notes").mkdir()
        (target / notes).write_text("the user's own")

    restore()
    kept = {notes: digests(target)[notes]}
    outcomes: list[str] = []

    def check(call: int) -> None:
        assert (target / notes).read_text() == "the user's own"
        outcomes.append(outcome(target, old=old | kept, new=new | kept))
        if outcomes[-1] == "refused":
            save()
            assert outcome(target, new=new | kept) == "new"
        if outcomes[-1] != "old":
            restore()

    assert kill_everywhere(tmp_path / "work", save, check) > 35
    assert set(outcomes) == {"old", "refused", "new"}
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)


@pytest.mark.slow
def test_a_save_over_a_plain_w4_model_that_is_killed_never_pairs_it_with_the_sidecar(
    tmp_path: Path, saver: Callable[[int, Path], Save]
) -> None:
    target = tmp_path / "work" / "out"
    save = saver(0, target)
    new = saved(save, target)

    def restore() -> None:
        shutil.rmtree(target, ignore_errors=True)
        write_base(target, 1)

    restore()
    old = digests(target)
    outcomes: set[str] = set()

    def check(call: int) -> None:
        found = digests(target)
        if found == old:
            outcomes.add("old")
            return
        outcomes.add(outcome(target, new=new))
        restore()

    kill_everywhere(tmp_path / "work", save, check)
    assert outcomes == {"old", "refused", "new"}


# --- new_directory, which the commands use ---------------------------------------------------------------------------


def test_an_overwrite_that_is_killed_leaves_the_old_one_the_new_one_or_nothing(tmp_path: Path) -> None:
    """What is not at the target then lies whole beside it, under a name that ends in .partial."""
    work = tmp_path / "work"
    work.mkdir()
    target = work / "out"
    old_source = write_checkpoint(tmp_path / "old", tmp_path / "scratch", seed=1)
    new_source = write_checkpoint(tmp_path / "new", tmp_path / "scratch")
    old, new = digests(old_source), digests(new_source)

    def restore() -> None:
        shutil.rmtree(work)
        shutil.copytree(old_source, target)

    def save() -> None:
        with new_directory(target, overwrite=True) as staging:
            shutil.copytree(new_source, staging, dirs_exist_ok=True)

    restore()
    outcomes: list[str] = []

    def check(call: int) -> None:
        outcomes.append(outcome(target, old=old, new=new))
        if outcomes[-1] == "nothing":
            beside = [digests(path) for path in work.iterdir() if path.name.endswith(".partial")]
            assert old in beside
            assert new in beside
        restore()

    assert kill_everywhere(work, save, check) > 15
    assert {"old", "new"} <= set(outcomes) <= {"old", "nothing", "new"}
    assert outcomes == sorted(outcomes, key=["old", "nothing", "new"].index)


# --- a disk that is full ---------------------------------------------------------------------------------------------

LIMITS = (0, 1, 100, 1000, 5000, 30_000, 100_000, 170_000, 200_000, 250_000, 270_000, 300_000, 400_000)


def failure(limit: int, save: Save, report: Path) -> str | None:
    """Type and message of what `save` raises when no file may grow beyond `limit` bytes; None if it finished."""

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save()
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            report.write_text(f"{type(error).__name__}: {error}")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            report.write_text("")
        return FINISHED

    assert in_child(work) == FINISHED
    return report.read_text() or None


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_full_disk_leaves_the_target_as_it_was(
    tmp_path: Path, saver: Callable[[int, Path], Save], existing: bool
) -> None:
    target = tmp_path / "work" / "out"
    save_old, save = saver(1, target), saver(0, target)
    new, old = saved(save, target), saved(save_old, target)
    failures = []
    for limit in LIMITS:
        if existing and not target.exists():
            save_old()
        message = failure(limit, save, tmp_path / "report")
        if message is None:
            assert outcome(target, new=new) == "new"
            shutil.rmtree(target)
            continue
        failures.append(message)
        assert message.startswith(("CheckpointError: cannot write ", "CheckpointError: cannot reserve ")), limit
        assert outcome(target, old=old) == ("old" if existing else "nothing")
        assert [path.name for path in target.parent.iterdir() if path.name.endswith(".partial")] == []
    assert 8 <= len(failures) < len(LIMITS)


def test_a_full_disk_while_the_model_is_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    """The safetensors library has an exception of its own for it."""
    target = tmp_path / "out"

    def save() -> None:
        with merge_directory(target) as staging:
            save_file(base_tensors(), staging / "model.safetensors")

    message = failure(10_000, save, tmp_path / "report")
    assert message is not None
    assert message.startswith(f"CheckpointError: cannot write {target}: ")
    assert "File too large" in message
    assert not target.exists()


def test_a_full_disk_while_importance_is_written(tmp_path: Path) -> None:
    base, scratch = tmp_path / "base", tmp_path / "scratch"
    write_base(base)
    writer = SidecarWriter(scratch, ENTRIES)
    for module, encoded in residuals().items():
        writer.write(module, encoded)
    writer.finish(DEFAULT)
    before = digests(base)

    def save() -> None:
        importance = {module: torch.rand(10_000) for module in CORRECTED}
        with new_directory(tmp_path / "out") as staging:
            shutil.copytree(base, staging, dirs_exist_ok=True, copy_function=os.link)
            attach_sidecar(staging, sorted(scratch.iterdir()), modules=CORRECTED, fmt=DEFAULT, importance=importance)

    message = failure(50_000, save, tmp_path / "report")
    assert message is not None
    assert message.startswith(f"CheckpointError: cannot write {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    assert digests(base) == before


# --- a whole oneshot -------------------------------------------------------------------------------------------------


@pytest.fixture
def quantized(random_llama: Path, group_scheme: Callable[..., dict[str, Any]]) -> Any:
    """A real model after its recipe, before it is saved."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from srd_modifier import SRDModifier

    model = AutoModelForCausalLM.from_pretrained(random_llama)
    oneshot(model=model, recipe=SRDModifier(config_groups=group_scheme(32), ignore=["lm_head"]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_real_save_that_is_killed(tmp_path: Path, quantized: Any, finished_checkpoint: Path, existing: bool) -> None:
    target = tmp_path / "work" / "out"
    target.parent.mkdir()

    def save() -> None:
        quantized.save_pretrained(target)

    new = saved(save, target)
    kept = {}
    old: dict[str, str] = {}

    def restore() -> None:
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        if existing:
            shutil.copytree(finished_checkpoint, target)
            # other bytes than the new ones, so that a mixture would show
            config = json.loads((target / "config.json").read_text())
            config["srd_config"]["alpha"] = 0.5
            (target / "config.json").write_text(json.dumps(config))
            (target / "notes.txt").write_text("the user's own")

    restore()
    if existing:
        old = digests(target)
        kept = {name: digest for name, digest in old.items() if name not in new}
        assert "notes.txt" in kept
    outcomes: list[str] = []

    def check(call: int) -> None:
        outcomes.append(outcome(target, **({"old": old} if existing else {}), new=kept | new))
        restore()

    assert kill_everywhere(tmp_path / "work", save, check, from_end=40) > 40
    assert set(outcomes) == ({"old", "refused", "new"} if existing else {"nothing", "new"})


@pytest.mark.slow
def test_a_real_save_on_a_full_disk_can_be_tried_again(tmp_path: Path, quantized: Any) -> None:
    target = tmp_path / "work" / "out"
    target.parent.mkdir()

    def save() -> None:
        quantized.save_pretrained(target)

    new = saved(save, target)
    for limit in (0, 100, 10_000, 100_000, 300_000, 1_000_000):
        message = failure(limit, save, tmp_path / "report")
        assert message is not None
        assert message.startswith("CheckpointError: cannot "), message
        assert not target.exists()

    def twice() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="cannot write"):
            save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save()
        return FINISHED

    assert in_child(twice) == FINISHED
    assert outcome(target, new=new) == "new"
