"""Packing and unpacking that are killed at a hundred random moments each: no target, or a whole one.

The child is forked, so that everything is imported already, and killed from outside after a time that is drawn at
random from what the work takes undisturbed.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import forked
import pytest
from containers import SECRET, write_files
from small_checkpoint import digests

from srd_modifier.axm.container import Container
from srd_modifier.axm.extract import extract, extract_gguf
from srd_modifier.axm.keys import Key
from srd_modifier.axm.pack import pack

KILLS = 100
KEY = Key(SECRET)


def large_files(seed: int) -> dict[str, bytes]:
    """Enough of them that most of the time goes into copying."""
    choose = random.Random(seed)
    sizes = {"model.gguf": 4_000_000, "srd/a.safetensors": 2_000_000, "srd/b.safetensors": 1_000_000}
    small = {f"part/{number}.json": choose.randbytes(100) for number in range(20)}
    return {"met.json": b"{}\n"} | small | {name: choose.randbytes(size) for name, size in sizes.items()}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory where that is possible: nothing here depends on a disk, and it may be slow."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder) / "work"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two directories of the same names."""
    return [write_files(tmp_path_factory.mktemp("models") / str(seed), large_files(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def containers(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("containers")
    for number, model in enumerate(models):
        pack([model], folder / f"{number}.axm", KEY)
    return [folder / "0.axm", folder / "1.axm"]


def start(work: Callable[[], object]) -> int:
    """A forked process that does some work without waiting for the disk, and exits with 0."""
    return forked.start(work, fsync=False)


def kill_often(
    work: Callable[[], object], reset: Callable[[], object], check: Callable[[], str], kills: int
) -> list[str]:
    """Kill `work` at random moments, look after each kill, and put everything back; what was found, kill by kill."""
    durations = []
    for _ in range(3):
        before = time.perf_counter()
        assert os.waitpid(start(work), 0)[1] == 0
        durations.append(time.perf_counter() - before)
        reset()
    choose, found = random.Random(1), []
    while len(found) < kills:
        child = start(work)
        time.sleep(choose.uniform(0, median(durations)))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        outcome = check()
        reset()
        if os.WIFSIGNALED(status):
            found.append(outcome)
        else:  # it was faster than the signal
            assert os.WEXITSTATUS(status) == 0
            assert outcome == "new"
    return found


def clean(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@pytest.mark.slow
def test_a_pack_that_is_killed(work: Path, models: list[Path], containers: list[Path]) -> None:
    target = work / "out.axm"
    partial = []

    def check() -> str:
        partial.extend(path for path in work.iterdir() if path != target)
        if not target.exists():
            return "nothing"
        with Container(target, key=KEY) as opened:
            opened.verify()
        assert target.read_bytes() == containers[0].read_bytes()
        return "new"

    clean(work)
    found = kill_often(lambda: pack([models[0]], target, KEY), lambda: clean(work), check, KILLS)
    assert set(found) <= {"nothing", "new"}
    assert all(path.name.startswith(".out.axm.") and path.name.endswith(".partial") for path in partial)
    assert partial, "none was killed while it was written"


@pytest.mark.slow
def test_a_pack_over_another_container_that_is_killed(work: Path, models: list[Path], containers: list[Path]) -> None:
    target = work / "out.axm"
    known = {containers[0].read_bytes(): "old", containers[1].read_bytes(): "new"}

    def reset() -> None:
        clean(work)
        shutil.copyfile(containers[0], target)

    reset()
    found = kill_often(
        lambda: pack([models[1]], target, KEY, overwrite=True), reset, lambda: known[target.read_bytes()], KILLS // 4
    )
    assert set(found) <= {"old", "new"}


@pytest.mark.slow
def test_an_extract_that_is_killed(work: Path, models: list[Path], containers: list[Path]) -> None:
    target = work / "out"
    whole = digests(models[0])
    partial = []

    def unpack() -> None:
        with Container(containers[0], key=KEY) as opened:
            extract(opened, target)

    def check() -> str:
        partial.extend(path for path in work.iterdir() if path != target)
        if not target.exists():
            return "nothing"
        assert digests(target) == whole
        return "new"

    clean(work)
    found = kill_often(unpack, lambda: clean(work), check, KILLS)
    assert set(found) <= {"nothing", "new"}
    assert all(path.name.startswith(".out.") and path.name.endswith(".partial") for path in partial)
    assert partial, "none was killed while it was written"


@pytest.mark.slow
def test_an_extract_of_the_gguf_that_is_killed(work: Path, models: list[Path], containers: list[Path]) -> None:
    target = work / "out.gguf"
    whole = (models[0] / "model.gguf").read_bytes()

    def unpack() -> None:
        with Container(containers[0], key=KEY) as opened:
            extract_gguf(opened, target)

    def check() -> str:
        if not target.exists():
            return "nothing"
        assert target.read_bytes() == whole
        return "new"

    clean(work)
    assert set(kill_often(unpack, lambda: clean(work), check, KILLS // 4)) <= {"nothing", "new"}


def test_what_a_kill_leaves_behind_is_in_nobodys_way(
    tmp_path: Path, model: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt has a temporary name of its own."""

    def die(source: Path, target: Path) -> None:
        os._exit(7)

    def work() -> None:
        monkeypatch.setattr(Path, "replace", die)
        pack([model], tmp_path / "out.axm", key)

    assert os.WEXITSTATUS(os.waitpid(start(work), 0)[1]) == 7
    assert not (tmp_path / "out.axm").exists()
    assert len(list(tmp_path.glob(".out.axm.*.partial"))) == 1
    pack([model], tmp_path / "out.axm", key)
    with Container(tmp_path / "out.axm", key=key) as opened:
        opened.verify()
