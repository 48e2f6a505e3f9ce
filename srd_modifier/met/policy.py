"""The hydration policy: which chunks of depth get their residual for which intent.

An intent is what a caller is about to do with the model's next answer. INFORM needs the least, so it has the residual
of the first chunk only; HARM and DECEIVE, where a mistake costs most, have all of it. The W4 base is always there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.config import read_json
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.met.schema import MET_NAME
from srd_modifier.met.sums import check_met
from srd_modifier.selection.depth import CHUNKS, check_chunks

INTENTS = ("INFORM", "CLARIFY", "REFUSE", "UNCERTAIN", "HARM", "DECEIVE")
"""The intents of the default policy, from the one that loads least to those that load all."""

_GUARDED = ("early", "governance")
_DEFAULT: dict[str, tuple[str, ...]] = {
    "INFORM": ("early",),
    "CLARIFY": _GUARDED,
    "REFUSE": _GUARDED,
    "UNCERTAIN": _GUARDED,
    "HARM": tuple(CHUNKS),
    "DECEIVE": tuple(CHUNKS),
}


@dataclass(frozen=True)
class Policy:
    """The chunks of every intent.

    Attributes:
        intents: by intent the chunks whose residual it loads, in depth order; an empty tuple is the plain W4 model.
    """

    intents: dict[str, tuple[str, ...]]

    @classmethod
    def default(cls) -> "Policy":
        """The policy of a checkpoint that brings none.

        >>> Policy.default().chunks("REFUSE")
        ('early', 'governance')
        """
        return cls(dict(_DEFAULT))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> "Policy":
        """A policy from intents and lists of chunks, in any order; intents may be the caller's own.

        Args:
            values: lists of chunk names by intent. It is the whole policy: nothing is added to it.
            where: what an error calls the mapping, such as a file's name.

        Raises:
            ConfigError: there is no intent, or an intent or a chunk is not valid; the message names both.
        """
        if not isinstance(values, Mapping) or not values:
            raise ConfigError(f"{where} has no intents, expected a list of chunks for each intent")
        intents = {}
        for intent, chunks in values.items():
            if not isinstance(intent, str) or not intent.strip():
                raise ConfigError(f"{where}: intent {intent!r} is not a name; put quotes around it")
            if not isinstance(chunks, list | tuple) or not all(isinstance(chunk, str) for chunk in chunks):
                raise ConfigError(f"{where}: intent {intent} is {chunks!r}, expected a list out of {list(CHUNKS)}")
            try:
                intents[intent] = check_chunks(chunks)
            except ConfigError as error:
                raise ConfigError(f"{where}: intent {intent}: {error}") from None
            if len(intents[intent]) < len(chunks):
                raise ConfigError(f"{where}: intent {intent} lists a chunk twice: {list(chunks)}")
        return cls(intents)

    @classmethod
    def from_yaml(cls, path: Path) -> "Policy":
        """A custom policy: a YAML file with a line such as `INFORM: [early]` for every intent.

        Raises:
            CheckpointError: the file cannot be read or is not YAML.
            ConfigError: an intent or a chunk is not valid.
        """
        import yaml

        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such policy") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        # YAML lets the last of equal names win without a word
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{path}: intent {repeated} is there twice")
        return cls.from_mapping(values, str(path))

    def chunks(self, intent: str) -> tuple[str, ...]:
        """The chunks of an intent, in depth order.

        Raises:
            ConfigError: the policy does not know the intent.
        """
        if intent not in self.intents:
            raise ConfigError(f"intent {intent!r} is unknown, expected one of {', '.join(self.intents)}")
        return self.intents[intent]


def policy_of(directory: Path) -> Policy:
    """The policy of a checkpoint: that of its `met.json`, or the default where it has none.

    Raises:
        CheckpointError: `met.json` is damaged or of another version.
    """
    path = directory / MET_NAME
    if not path.is_file():
        return Policy.default()
    values = read_json(path)
    check_met(values, str(path))
    return Policy.from_mapping(values["hydration"], f"{path}: hydration")
