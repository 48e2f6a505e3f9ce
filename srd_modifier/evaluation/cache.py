"""What a reference model said of a text, kept on disk: log-probabilities of 16 bits over the whole vocabulary.

A model is compared with its reference again and again on the same text, and the reference is the larger of the two.
Its log-probabilities are stored once, in shards of a few windows, under a key made of everything that decides them:
the digest of the model's files, the tokens, the windows, dtype and library versions. A run that was interrupted goes on
where it stopped. While a shard is there its model is never loaded.

A row's log-probabilities from the largest down to 32 nats below it are stored in 65,535 equal steps, so each is within
half a step, 2.5e-4 nats, of what the model gave (what is less likely is raised to that floor, 1e-14 of the largest
probability), and a row is made to sum to 1 again after reading. The token that each row ranks first and the likelihood
of the text's own tokens are stored exactly. On a divergence the steps act like noise of mean zero: `docs/evaluation.md`
has what was measured.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srd_modifier.checkpoint.atomic import sibling, write_json
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scores import NamedModel, default_batch_size, scored_logits
from srd_modifier.evaluation.windows import Window, batches, window_inputs

FORMAT = "srd-reference-1"
STEPS = 65_535
FLOOR = 32.0
HALF_STEP = FLOOR / STEPS / 2

_SHARD_BYTES = 1 << 26
_LARGEST_SHARE_OF_FREE_SPACE = 0.5


class TooLargeError(SRDError):
    """What a reference would take on disk is more than was allowed."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of a shard, decoded when they are asked for.

    Attributes:
        codes: uint16 [rows, vocabulary], 0 the floor.
        floor: log-probability of code 0, float64 [rows, 1].
        step: nats between two codes, float64 [rows, 1].
        top: the most likely token, int64 [rows].
        nll: negative log-likelihood of the text's own token, float64 [rows].
    """

    codes: Tensor
    floor: Tensor
    step: Tensor
    top: Tensor
    nll: Tensor

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.codes.shape[-1])

    def log_probabilities(self, first: int, last: int) -> Tensor:
        """Of some rows: float64 [rows, vocabulary], each row summing to 1."""
        # int32 on the way: torch computes little in uint16
        values = self.codes[first:last].int().double().mul_(self.step[first:last]).add_(self.floor[first:last])
        return values.sub_(values.logsumexp(-1, keepdim=True))

    def part(self, first: int, last: int) -> "StoredRows":
        """Rows `first` to `last`."""
        return StoredRows(*(tensor[first:last] for tensor in self._tensors()))

    @staticmethod
    def joined(parts: "Sequence[StoredRows]") -> "StoredRows":
        """The rows of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return StoredRows(*(torch.cat(tensors) for tensors in zip(*(part._tensors() for part in parts), strict=True)))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.floor, self.step, self.top, self.nll


def store(log_probabilities: Tensor, targets: Tensor) -> StoredRows:
    """Encode rows, each value to within `HALF_STEP` if it is not below the floor.

    What `StoredRows.log_probabilities` gives may be off by as much again, the same for a whole row, which it makes sum
    to 1.

    Args:
        log_probabilities: float64 [rows, vocabulary].
        targets: the text's own tokens, int64 [rows].
    """
    highest = log_probabilities.amax(-1, keepdim=True)
    floor = log_probabilities.amin(-1, keepdim=True).maximum(highest - FLOOR)
    step = ((highest - floor) / STEPS).clamp_min(torch.finfo(torch.float64).tiny)
    codes = ((log_probabilities - floor) / step).round_().clamp_(0, STEPS).int().to(torch.uint16)
    nll = -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    return StoredRows(codes.cpu(), floor.cpu(), step.cpu(), log_probabilities.argmax(-1).cpu(), nll.cpu())


class StoredReference:
    """A reference whose log-probabilities are on disk, or will be when they are first asked for.

    Raises:
        TooLargeError: When it is first asked: it would not fit.

    Args:
        name: What errors call the reference.
        directory: Where all references are kept.
        key: Everything that decides the figures; another key is another folder.
        tokens: The stream, int64 [tokens].
        windows: All windows that will be asked for.
        load: Loads the model; called only if a shard is missing.
        first_token: As `window_inputs` takes it.
        limit: The most bytes it may take on disk, `None` for half of what is free.
        batch_size: Windows the model reads at once.
        progress: Called while the model is asked with (windows done, windows in all).
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        key: Mapping[str, Any],
        tokens: Tensor,
        windows: Sequence[Window],
        load: Callable[[], NamedModel],
        *,
        first_token: int | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
        self._key = hashlib.sha256(text.encode() + tokens.numpy().tobytes()).hexdigest()
        self._name = name
        self._directory = directory / self._key[:32]
        self._tokens, self._windows, self._first_token = tokens, list(windows), first_token
        self._load, self._limit, self._batch_size, self._progress = load, limit, batch_size, progress
        self._place = {(window.start, window.stop): number for number, window in enumerate(windows)}
        self._shards: list[list[Window]] | None = None
        self._open: tuple[int, StoredRows] | None = None

    @property
    def name(self) -> str:
        """The model's."""
        return self._name

    def prepare(self) -> None:
        """Find out whether it fits.

        Raises:
            TooLargeError: It does not.
        """
        self._cut()

    def rows(self, batch: Sequence[Window], inputs: Tensor) -> StoredRows:
        """What the model said of a batch's scored tokens."""
        return StoredRows.joined([self._window(window) for window in batch])

    def nll(self) -> Tensor:
        """Negative log-likelihood of every scored token of the text, float32 [tokens], exactly as the model gave it."""
        return torch.cat([self._shard(number).nll for number in range(len(self._cut()))]).float()

    def _window(self, window: Window) -> StoredRows:
        place = self._place[window.start, window.stop]
        for number, shard in enumerate(self._cut()):
            if place < len(shard):
                start = sum(each.scored for each in shard[:place])
                return self._shard(number).part(start, start + window.scored)
            place -= len(shard)
        raise IndexError(f"window {window} is not of this text")

    def _cut(self) -> list[list[Window]]:
        """The windows of each shard: as many as make 64 MiB. Needs the vocabulary, which the first shard knows."""
        if self._shards is None:
            vocabulary = self._vocabulary()
            self._shards = []
            size = _SHARD_BYTES
            for window in self._windows:
                more = 2 * vocabulary * window.scored
                if size + more > _SHARD_BYTES:
                    self._shards.append([])
                    size = 0
                self._shards[-1].append(window)
                size += more
        return self._shards

    def _vocabulary(self) -> int:
        index = self._directory / "index.json"
        try:
            values = json.loads(index.read_text(encoding="utf-8"))
            vocabulary = int(values["vocabulary"])
            if values["sha256"] == self._index_digest(vocabulary):
                return vocabulary
            warnings.warn(f"{index} is damaged and is written again", stacklevel=2)
        except FileNotFoundError:
            pass  # the first time
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{index} is damaged and is written again", stacklevel=2)
        model = self._load()
        with torch.no_grad():
            logits = scored_logits(model, window_inputs(self._tokens, self._windows[:1]), self._windows[0].scored)
        vocabulary = int(logits.shape[-1])
        self._require_space(vocabulary)
        self._directory.mkdir(parents=True, exist_ok=True)
        digest = self._index_digest(vocabulary)
        write_json(index, {"format": FORMAT, "vocabulary": vocabulary, "reference": self.name, "sha256": digest})
        return vocabulary

    def _index_digest(self, vocabulary: int) -> str:
        """The vocabulary decides which windows a shard has, so a wrong one would give other tokens' rows."""
        return hashlib.sha256(f"{self._key} {vocabulary}".encode()).hexdigest()

    def _require_space(self, vocabulary: int) -> None:
        need = self.bytes_needed(vocabulary)
        existing = next(path for path in (self._directory, *self._directory.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if self._limit is not None and need > self._limit:
            raise TooLargeError(
                f"the log-probabilities of {self.name} take {need / 1e9:.1f} GB on disk, "
                f"more than {self._limit / 1e9:.1f} GB"
            )
        if need > _LARGEST_SHARE_OF_FREE_SPACE * free:
            raise TooLargeError(
                f"{self._directory}: the log-probabilities of {self.name} take {need / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free; choose another --cache-dir, fewer --max-tokens, or --no-cache"
            )

    def bytes_needed(self, vocabulary: int) -> int:
        """Bytes on disk of all shards."""
        return sum(window.scored for window in self._windows) * (2 * vocabulary + 32)

    def _shard(self, number: int) -> StoredRows:
        if self._open is None or self._open[0] != number:
            rows = self._read(number)
            if rows is None:
                rows = self._compute(number)
                self._write(number, rows)
            self._open = (number, rows)
        return self._open[1]

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05}.safetensors"

    def _identity(self, number: int) -> str:
        """What a shard holds: a part of this text as this reference reads it."""
        windows = self._cut()[number]
        return f"{self._key} {windows[0].start}-{windows[-1].stop}"

    def _read(self, number: int) -> StoredRows | None:
        """A shard, None if it is not there or is not what was written."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                rows = StoredRows(**{name: file.get_tensor(name) for name in StoredRows.__dataclass_fields__})
        except (OSError, SafetensorError) as error:
            reason = str(error)
        else:
            if (metadata.get("key"), metadata.get("sha256")) == (self._identity(number), _digest(rows)):
                return rows
            reason = "its bytes are not those that were written"
        warnings.warn(f"{path} is damaged ({reason}); the reference {self.name} is computed again", stacklevel=2)
        return None

    def _compute(self, number: int) -> StoredRows:
        model, shards = self._load(), self._cut()
        windows = shards[number]
        done = sum(map(len, shards[:number]))
        size = self._batch_size or default_batch_size(windows)
        parts = []
        with torch.no_grad():
            for batch in batches(windows, size):
                if self._progress is not None:
                    self._progress(done, len(self._windows))
                inputs = window_inputs(self._tokens, batch, first_token=self._first_token)
                logits = scored_logits(model, inputs, batch[0].scored)
                targets = inputs[:, -batch[0].scored :].reshape(-1)
                # a window at a time, which bounds what float64 takes
                for first in range(0, len(logits), batch[0].scored):
                    rows = slice(first, first + batch[0].scored)
                    parts.append(store(logits[rows].double().log_softmax(-1), targets[rows].to(logits.device)))
                done += len(batch)
        if self._progress is not None:
            self._progress(done, len(self._windows))
        return StoredRows.joined(parts)

    def _write(self, number: int, rows: StoredRows) -> None:
        path = self._path(number)
        temporary = sibling(path)
        tensors = {name: getattr(rows, name).contiguous() for name in StoredRows.__dataclass_fields__}
        try:
            metadata = {"format": FORMAT, "key": self._identity(number), "sha256": _digest(rows)}
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise SRDError(f"{path}: cannot be written: {error}; choose another --cache-dir or --no-cache") from error
        finally:
            temporary.unlink(missing_ok=True)


def _digest(rows: StoredRows) -> str:
    digest = hashlib.sha256()
    for tensor in rows._tensors():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
