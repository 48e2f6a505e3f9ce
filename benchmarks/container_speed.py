"""Speed of signed containers against sha256sum: pack, verify and extract of a sharded checkpoint.

    python -m benchmarks.container_speed [--size GB] [--shards N] [--repeats N] [--json FILE]

The checkpoint is a Llama's in bf16, its weights random bytes. Two peers hash the same files: one `sha256sum` process
per core, which is what a user would run, and Python's hashlib on all cores, which is harder to reach where sha256sum
was built without libcrypto and so without the processor's SHA instructions. `copy` is what reading, writing and
flushing cost with no hashing: how fast a container could be packed at most. It and all the rest that is ours run in a
process of its own, imports not counted, in memory just used before (see `warm_memory`). The rows "command" are the
whole of `srd axm`: with imports, in whatever memory there is. Pack also builds the policy file.

All files are in the page cache, which a round that is not counted fills. Everything is measured once in a round, in
turn, with nothing left to be written from before; the ratios are medians over the rounds. Read and written are what
the process asked of the kernel, as multiples of the checkpoint's bytes: 1.00 is one pass. Mapped files are not in them,
and are in the memory.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.models import REPOSITORY, SHAPES, TINY_LLAMA
from benchmarks.scratch import scratch

_BLOCK = 1 << 21
_SHAPE = SHAPES["smollm2-1.7b"]
_DEMANDED = 0.8
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_SRD = [sys.executable, "-c", "from srd_modifier.cli import main; main()"]


@dataclass(frozen=True)
class Cost:
    """What a piece of work cost.

    Attributes:
        seconds: wall time.
        flush_seconds: of them, from the begin of the first fsync to the end of the last.
        peak_mb: largest resident memory (VmHWM) while it ran, mapped files included.
        rise_mb: the same above what was resident before, which is the interpreter with everything imported.
        read: bytes that it read through system calls.
        written: bytes that it wrote through system calls.
        read_from_disk: bytes that the disk had to deliver; none if all was in the page cache.
    """

    seconds: float
    flush_seconds: float = 0.0
    peak_mb: float = 0.0
    rise_mb: float = 0.0
    read: int = 0
    written: int = 0
    read_from_disk: int = 0


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it reads and makes."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The directory that is packed."""
        return self.folder / "checkpoint"

    @property
    def container(self) -> Path:
        """What pack makes, and verify and extract read."""
        return self.folder / "container.axm"

    @property
    def output(self) -> Path:
        """What extract and copy make."""
        return self.folder / "output"

    @property
    def key(self) -> Path:
        """Key file."""
        return self.folder / "key"

    @property
    def files(self) -> list[Path]:
        """The files of the checkpoint, the largest first."""
        return sorted((path for path in self.checkpoint.rglob("*") if path.is_file()), key=lambda p: -p.stat().st_size)

    @property
    def size(self) -> int:
        """Bytes of the checkpoint."""
        return sum(path.stat().st_size for path in self.files)


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def write_checkpoint(place: Place, size: int, shards: int) -> None:
    """Write a checkpoint of about `size` bytes: random weights in shards, index, config.json, tokenizer."""
    import torch
    from safetensors.torch import save_file

    place.checkpoint.mkdir()
    shapes = _tensors(size)
    limit = -(-sum(map(_bytes, shapes.values())) // shards)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + _bytes(shape) // 2 > limit and len(groups) < shards:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _bytes(shape)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weights = {
            name: torch.frombuffer(bytearray(os.urandom(_bytes(shapes[name]))), dtype=torch.bfloat16).view(shapes[name])
            for name in names
        }
        save_file(weights, place.checkpoint / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": weight_map}
    _write_json(place.checkpoint / "model.safetensors.index.json", index)
    layers = sum(name.endswith("q_proj.weight") for name in shapes)
    _write_json(place.checkpoint / "config.json", _config(layers))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, place.checkpoint / name)


def _tensors(size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of as many layers as `size` bytes hold."""
    hidden, inner = _SHAPE.hidden, _SHAPE.intermediate
    width = hidden // _SHAPE.heads * _SHAPE.kv_heads
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    outside = {"model.embed_tokens.weight": (_SHAPE.vocabulary, hidden), "model.norm.weight": (hidden,)}
    left = size - sum(map(_bytes, outside.values()))
    layers = max(1, round(left / sum(map(_bytes, layer.values()))))
    inside = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    return outside | inside


def _bytes(shape: tuple[int, ...]) -> int:
    count = 2
    for length in shape:
        count *= length
    return count


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": _SHAPE.hidden,
        "intermediate_size": _SHAPE.intermediate,
        "num_attention_heads": _SHAPE.heads,
        "num_key_value_heads": _SHAPE.kv_heads,
        "vocab_size": _SHAPE.vocabulary,
        "tie_word_embeddings": True,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


# -- the work, in a process of its own ---------------------------------------------------------------------------------


def _hash(place: Place) -> None:
    def work(path: Path) -> str:
        sha256 = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(_BLOCK))
            while count := file.readinto(buffer):
                sha256.update(buffer[:count])
        return sha256.hexdigest()

    with ThreadPoolExecutor(_CORES) as pool:
        list(pool.map(work, place.files))


def _copy(place: Place) -> None:
    """All files, one after the other in one new file, as pack writes them."""
    files = place.files
    starts = [sum(path.stat().st_size for path in files[:number]) for number in range(len(files))]

    def work(path: Path, start: int) -> None:
        buffer = memoryview(bytearray(_BLOCK))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                written = 0
                while written < count:
                    written += os.pwrite(target.fileno(), buffer[written:count], start + written)
                start += count

    with place.output.open("xb", buffering=0) as target, ThreadPoolExecutor(_CORES) as pool:
        list(pool.map(work, files, starts))
        os.fsync(target.fileno())


def _pack(place: Place) -> None:
    from srd_modifier.axm import find_key, pack

    key = find_key(place.key)
    assert key is not None
    pack([place.checkpoint], place.container, key)


def _verify(place: Place) -> None:
    from srd_modifier.axm import find_key, verify

    verify(place.container, key=find_key(place.key))


def _extract(place: Place) -> None:
    from srd_modifier.axm import Container, extract, find_key

    with Container(place.container, key=find_key(place.key)) as container:
        extract(container, place.output)


_WORK: dict[str, Callable[[Place], None]] = {
    "hash": _hash,
    "copy": _copy,
    "pack": _pack,
    "verify": _verify,
    "extract": _extract,
}


def worker(folder: str, name: str, *, flush: bool) -> None:
    """Do a piece of work and print its cost as JSON, the last line of stdout."""
    place = Place(Path(folder))
    # all that the work imports where it is used
    import srd_modifier.axm
    import srd_modifier.checkpoint.sidecar
    import srd_modifier.met  # noqa: F401

    warm_memory(place)
    with _flushes(flush=flush) as times:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes what is resident now
        memory, counters = _status("VmRSS"), _io()
        started = time.perf_counter()
        _WORK[name](place)
        seconds = time.perf_counter() - started
        after, peak = _io(), _status("VmHWM")
    cost = Cost(
        seconds,
        max(times) - min(times) if times else 0.0,
        peak,
        peak - memory,
        *(after[field] - counters[field] for field in ("rchar", "wchar", "read_bytes")),
    )
    print(json.dumps(asdict(cost)), flush=True)


def warm_memory(place: Place) -> float:
    """Write a file of the checkpoint's size to the page cache and remove it; returns the seconds.

    The host of a virtual machine takes back memory that has been free for two seconds, and delivers it anew, slowly,
    when it is touched. Without this, whatever writes first would be measured with that.
    """
    started, block, path = time.perf_counter(), b"x" * _BLOCK, place.folder / "warm"
    with path.open("xb", buffering=0) as file:
        for start in range(0, place.size, _BLOCK):
            file.write(block[: place.size - start])
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


@contextmanager
def _flushes(*, flush: bool) -> Iterator[list[float]]:
    """Gives the times at which each fsync began and ended; leaves them out, and so the disk, if not `flush`."""
    fsync, times = os.fsync, []

    def timed(descriptor: int) -> None:
        times.append(time.perf_counter())
        if flush:
            fsync(descriptor)
        times.append(time.perf_counter())

    os.fsync = timed
    try:
        yield times
    finally:
        os.fsync = fsync


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


# -- measuring ---------------------------------------------------------------------------------------------------------


def _sha256sum(place: Place) -> Cost:
    """One process per core, each with its share of the files: the next largest goes to who has the least."""
    shares: list[list[Path]] = [[] for _ in range(_CORES)]
    for path in place.files:
        min(shares, key=lambda share: sum(file.stat().st_size for file in share)).append(path)
    started = time.perf_counter()
    processes = [subprocess.Popen(["sha256sum", *share], stdout=subprocess.DEVNULL) for share in shares if share]
    if any([process.wait() for process in processes]):
        sys.exit("sha256sum failed")
    return Cost(time.perf_counter() - started)


def _worker(name: str, *flags: str) -> Callable[[Place], Cost]:
    def run(place: Place) -> Cost:
        arguments = ["--worker", str(place.folder), name, *flags]
        finished = _run([sys.executable, "-m", "benchmarks.container_speed", *arguments])
        return Cost(**json.loads(finished.strip().splitlines()[-1]))

    return run


def _command(*arguments: str) -> Callable[[Place], Cost]:
    def run(place: Place) -> Cost:
        values = {"checkpoint": place.checkpoint, "container": place.container, "output": place.output}
        command = [*_SRD, "axm", *(argument.format(**values) for argument in arguments), "--key-file", str(place.key)]
        started = time.perf_counter()
        _run(command)
        return Cost(time.perf_counter() - started)

    return run


def _run(command: list[str]) -> str:
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    return finished.stdout


_SUMS, _HASHLIB = "sha256sum processes", "hashlib threads"
# in this order: what verifies and extracts reads what the pack before it made
_ROWS: dict[str, Callable[[Place], Cost]] = {
    _SUMS: _sha256sum,
    _HASHLIB: _worker("hash"),
    "copy": _worker("copy"),
    "pack, command": _command("pack", "{checkpoint}", "--output", "{container}"),
    "pack, not flushed": _worker("pack", "--no-flush"),
    "pack": _worker("pack"),
    "verify": _worker("verify"),
    "verify, command": _command("verify", "{container}"),
    "extract": _worker("extract"),
    "extract, command": _command("extract", "{container}", "--output", "{output}"),
}


def _round(place: Place) -> dict[str, Cost]:
    costs = {}
    for name, measured in _ROWS.items():
        # a row makes what it makes anew: replacing a file would be timed with it
        if name.startswith("pack"):
            place.container.unlink(missing_ok=True)
        if place.output.is_dir():
            shutil.rmtree(place.output)
        place.output.unlink(missing_ok=True)
        os.sync()
        costs[name] = measured(place)
    return costs


# -- printing ----------------------------------------------------------------------------------------------------------


def _sha256sum_of() -> str:
    """Which sha256sum this is, and whether it can use the processor's instructions: only libcrypto's code does."""
    binary = shutil.which("sha256sum")
    if binary is None:
        sys.exit("there is no sha256sum here, it comes with GNU coreutils")
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    libraries = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    return f"{version}, {'with' if 'libcrypto' in libraries else 'without'} libcrypto"


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "unknown")
    instructions = {"sha_ni", "sha2"} & set(info.split())
    return f"{_CORES} cores of {model} {'with' if instructions else 'without'} SHA instructions"


def _busy_seconds() -> tuple[float, float]:
    """Seconds that all cores were busy, or taken by a virtual machine's host, and those of our own processes."""
    user, nice, system, _, _, interrupts, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ticks = user + nice + system + interrupts + soft + steal
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return ticks / os.sysconf("SC_CLK_TCK"), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _print(costs: list[dict[str, Cost]], size: int) -> None:
    titles = f"{'GB/s':>5} {'range':>11} {'sha256sum':>9} {'hashlib':>7} {'flush':>5} {'peak MB':>7} {'rise':>5}"
    print(f"\n{'':20} {titles} {'read':>5} {'written':>7} {'disk':>5}")
    for name in _ROWS:
        column = [round_[name] for round_ in costs]
        speeds = sorted(size / cost.seconds / 1e9 for cost in column)
        line = f"{name:20} {statistics.median(speeds):5.2f} {speeds[0]:5.2f}-{speeds[-1]:5.2f} "
        line += f"{_ratio(costs, name, _SUMS):8.2f}x {_ratio(costs, name, _HASHLIB):6.2f}x"
        if column[0].peak_mb:
            median = {field: statistics.median(getattr(cost, field) for cost in column) for field in asdict(column[0])}
            share = statistics.median(cost.flush_seconds / cost.seconds for cost in column)
            line += f" {share:5.0%} {median['peak_mb']:7.0f} {median['rise_mb']:5.1f} {median['read'] / size:5.2f}"
            line += f" {median['written'] / size:7.2f} {median['read_from_disk'] / size:5.2f}"
        print(line)
    for name in ("pack", "verify"):
        ratio = _ratio(costs, name, _SUMS)
        verdict = "enough" if ratio >= _DEMANDED else "NOT ENOUGH"
        print(f"{name}: {ratio:.2f}x of sha256sum, {_DEMANDED}x is demanded: {verdict}")


def _ratio(costs: list[dict[str, Cost]], name: str, peer: str) -> float:
    """Median over the rounds of the peer's time over this one's: above 1 is faster."""
    return statistics.median(round_[peer].seconds / round_[name].seconds for round_ in costs)


def _check_room(folder: Path, size: int) -> None:
    """Refuse what disk or page cache do not hold: checkpoint, container, copy, and what `warm_memory` writes."""
    needed = 4 * size + (1 << 30)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    memory = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for what, free in ((f"bytes are free on the disk of {folder}", shutil.disk_usage(folder).free),
                       ("bytes of memory are free for the page cache", memory)):  # fmt: skip
        if free < needed:
            sys.exit(f"{free:,} {what}, {needed:,} are needed; choose a smaller --size")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=2.0, metavar="GB", help="Of the checkpoint, in 10^9 bytes.")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="Rounds that are counted.")
    parser.add_argument("--json", type=Path, default=None, help="Write the costs of all rounds.")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "WORK"), help=argparse.SUPPRESS)
    parser.add_argument("--no-flush", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, flush=not options.no_flush)
        return
    print(f"{_processor()}, Linux {platform.release()}")
    print(f"{_sha256sum_of()}; hashlib with {ssl.OPENSSL_VERSION}")
    with scratch() as folder:
        _check_room(folder, int(options.size * 1e9))
        place = Place(folder)
        write_checkpoint(place, int(options.size * 1e9), options.shards)
        _run([*_SRD, "axm", "keygen", str(place.key)])
        print(
            f"{place.size:,} bytes in {len(place.files)} files, {options.shards} of them shards; all in the page cache"
        )
        first, again = (place.size / warm_memory(place) / 1e9 for _ in range(2))
        print(f"page cache takes {first:.2f} GB/s in memory that has been free, {again:.2f} GB/s in what was just used")
        _round(place)
        costs = []
        for number in range(options.repeats):
            before = _busy_seconds()
            costs.append(_round(place))
            busy, ours = (after - start for after, start in zip(_busy_seconds(), before, strict=True))
            speeds = (f"{name} {place.size / cost.seconds / 1e9:.2f}" for name, cost in costs[-1].items())
            print(f"round {number + 1}, GB/s: {', '.join(speeds)}; {max(0, 1 - ours / busy):.0%} of the cores' work "
                  "was not ours", flush=True)  # fmt: skip
        _print(costs, place.size)
    if options.json:
        rounds = [{name: asdict(cost) for name, cost in round_.items()} for round_ in costs]
        options.json.write_text(json.dumps(rounds, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
