"""Finished scores on disk, each under a key made of everything that decides it.

A comparison that was interrupted, or gets one more candidate, measures only what is new.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.atomic import write_json
from srd_modifier.evaluation.results import Score
from srd_modifier.evaluation.tasks.base import Items, Outcome

FORMAT = "srd-outcome-1"


def key_of(values: Mapping[str, Any]) -> str:
    """The name that scores of these circumstances have."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


class OutcomeStore:
    """A directory of outcomes, one file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, key: str) -> Outcome | None:
        """What was measured before; `None` if nothing was, or if the file is damaged, of which it warns."""
        path = self._path(key)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            outcome = values["outcome"]
            if (values["format"], values["sha256"]) != (FORMAT, _digest(outcome)):
                raise ValueError("its content is not what was written")
            return Outcome(
                scores=tuple(Score(**score) for score in outcome["scores"]),
                items={name: _items(each) for name, each in outcome["items"].items()},
                seconds=outcome["seconds"],
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}); it is measured again", stacklevel=2)
            return None

    def write(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._directory.mkdir(parents=True, exist_ok=True)
        values = json.loads(json.dumps(asdict(outcome)))
        write_json(self._path(key), {"format": FORMAT, "sha256": _digest(values), "outcome": values})

    def read_curve(self, key: str) -> tuple[float, ...] | None:
        """A curve over depth that was kept."""
        outcome = self.read(key)
        return None if outcome is None else outcome.items["depth"].values

    def write_curve(self, key: str, curve: tuple[float, ...]) -> None:
        """Keep a curve over depth."""
        self.write(key, Outcome((), {"depth": Items(curve, (1.0,) * len(curve))}))

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _items(values: dict[str, list[float]]) -> Items:
    return Items(tuple(values["values"]), tuple(values["weights"]))
