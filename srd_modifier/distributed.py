"""The processes that quantize one model together, as `torchrun` starts them.

A process alone is the first of one, and asks torch for nothing. Between several, what is said here goes over a gloo
group of its own, whatever the model's tensors are exchanged by: it carries objects and tensors of the CPU, and waits
for a process that writes a large model.

An error is everybody's: `agree` (and `together`, around a piece of work) lets every process end with a sentence when
one of them failed. A process that was killed cannot speak; the others then find its connection closed.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from datasets import Dataset

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# as long as llm-compressor waits for the process that saves
_PATIENCE = timedelta(hours=3)
# what gloo says of a connection whose other end has gone
_GONE = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "Connection refused")

Key = TypeVar("Key")


class Ranks:
    """The processes of a run, seen from one of them.

    All of its methods that talk are for every process to call, in the same order.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        broken: whether one of them is known to have failed.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.broken = 0, 1, False
        self._group: Any = None

    @classmethod
    def current(cls) -> "Ranks":
        """The processes of torch's default group, or this one alone; all of them call it together."""
        from torch import distributed

        ranks = cls()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            ranks.rank, ranks.size = distributed.get_rank(), distributed.get_world_size()
            with ranks._talking():
                ranks._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    # errors

    def agree(self, error: Exception | None = None) -> None:
        """Wait for all processes, and raise in each if one brings an error: its own, or a sentence that names it.

        Raises:
            SRDError: another process failed, or is gone.
        """
        if self.size > 1:
            try:
                messages = self.gather(None if error is None else _in_one_line(error))
            except SRDError:
                if error is None:
                    raise
                messages = []
            failed = [rank for rank, message in enumerate(messages) if message is not None]
            self.broken = self.broken or bool(failed)
            if failed and error is None:
                raise SRDError(
                    f"process {failed[0]} of {self.size} failed, and this one with it: {messages[failed[0]]}"
                )
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A piece of work, without talk between processes, that has succeeded when it has in all of them.

        Raises:
            SRDError: it failed in another process.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as own:
            error = own
        self.agree(error)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Work of a library that talks between processes by itself.

        Raises:
            SRDError: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(words in str(error) for words in _GONE):
                raise
            raise self._lost() from error

    # objects

    def gather(self, value: Any) -> list[Any]:
        """What each process brings, in their order."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self._talking():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def merge(self, values: Mapping[Key, Any]) -> dict[Key, Any]:
        """The mappings of all processes in one; the later process counts where two have the same key."""
        return {key: value for part in self.gather(dict(values)) for key, value in part.items()}

    def from_first(self, value: Any = None) -> Any:
        """What the first process brings."""
        if self.size == 1:
            return value
        from torch import distributed

        found = [value if self.first else None]
        with self._talking():
            distributed.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    # tensors

    def sum(self, tensor: Tensor, *, owner: int | None = None) -> None:
        """Add up, in place, the tensors `[...]` that the processes bring; for one of them, or for all.

        In the other processes the contents are undefined afterwards.
        """
        if self.size == 1:
            return
        from torch import distributed

        with self._talking():
            if owner is None:
                distributed.all_reduce(tensor, group=self._group_for(tensor))
            else:
                distributed.reduce(tensor, dst=owner, group=self._group_for(tensor))

    def spread(self, tensor: Tensor, *, owner: int) -> None:
        """Copy one process's tensor `[...]` into those of the others.

        llm-compressor keeps weights on the CPU in memory that the processes of a machine share: nothing to do then.
        """
        if self.size == 1 or (tensor.device.type == "cpu" and tensor.is_shared()):
            return
        from torch import distributed

        with self._talking(), torch.no_grad():
            distributed.broadcast(tensor, src=owner, group=self._group_for(tensor))

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors of the CPU to the first process, which calls `receive`."""
        from torch import distributed

        with self._talking():
            for tensor in tensors:
                distributed.send(_as_bytes(tensor.contiguous()), dst=0, group=self._group)

    def receive(self, sender: int, layout: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """What a process sends, whose dtypes and shapes are known."""
        from torch import distributed

        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in layout]
        with self._talking():
            for tensor in tensors:
                distributed.recv(_as_bytes(tensor), src=sender, group=self._group)
        return tensors

    # work

    def divide(self, costs: Mapping[Key, float]) -> dict[Key, int]:
        """The process of each piece of work, so that all have about as much to do; the same in every process."""
        if self.size == 1:
            return dict.fromkeys(costs, 0)
        from compressed_tensors.distributed import greedy_bin_packing

        _, _, assigned = greedy_bin_packing(list(range(len(costs))), self.size, list(costs.values()).__getitem__)
        return {key: assigned[number] for number, key in enumerate(costs)}

    def _group_for(self, tensor: Tensor) -> Any:
        # tensors of an accelerator go by the default group, which is made for them
        return self._group if tensor.device.type == "cpu" else None

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # also the base of torch.distributed's own
            raise self._lost() from error

    def _lost(self) -> SRDError:
        self.broken = True
        return SRDError(
            f"process {self.rank} of {self.size} lost touch with the others, of which one has ended or hangs; "
            "its own message says why"
        )


def in_order(parts: Sequence[Sequence[Any]], length: Callable[[Any], int]) -> list[Any]:
    """The samples of all processes in the order that one process alone has them in.

    llm-compressor gives each process a contiguous part of the samples and sorts it by falling length, as it sorts them
    all for one; parts that are not sorted (a data loader of the user's) follow one after the other.

    Args:
        parts: the samples of each process, in its own order.
        length: of a sample.
    """
    lengths = [[length(sample) for sample in part] for part in parts]
    samples = [sample for part in parts for sample in part]
    if all(list(one) == sorted(one, reverse=True) for one in lengths):
        samples.sort(key=length, reverse=True)  # stable, also when reversed
    return samples


def own_part(dataset: "Dataset") -> "Dataset":
    """This process's part of a tokenized data set that all processes have: contiguous, and as large as the others.

    It is what `oneshot` takes for its own; a process alone gets all of it.

    Raises:
        SRDError: there are fewer samples than processes.
    """
    from torch import distributed

    rank, size = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
    if size == 1:
        return dataset
    if len(dataset) < size:
        raise SRDError(f"{len(dataset)} samples are too few for {size} processes; start fewer, or give more text")
    return dataset.select(range(len(dataset) * rank // size, len(dataset) * (rank + 1) // size))


def launched_rank() -> int:
    """The number of this process as its launcher says, before any group is there; 0 without a launcher."""
    return int(os.environ["RANK"]) if all(name in os.environ for name in _LAUNCHED) else 0


@contextmanager
def launched() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, for the duration; or be alone, or in the group that is there.

    A process that the launcher ends, because another failed, cleans up behind itself first.
    """
    from torch import distributed

    joins = (
        all(name in os.environ for name in _LAUNCHED)
        and int(os.environ["WORLD_SIZE"]) > 1
        and distributed.is_available()
        and not distributed.is_initialized()
    )
    if not joins:
        yield Ranks.current()
        return
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        if torch.accelerator.is_available():
            from compressed_tensors.distributed import init_dist

            init_dist()
        else:
            distributed.init_process_group("gloo")  # init_dist asks for an accelerator
        yield Ranks.current()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        signal.signal(signal.SIGTERM, previous)


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, SRDError) else f"{type(error).__name__}: {message}"


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 `[bytes]`: gloo does not know every dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8)
