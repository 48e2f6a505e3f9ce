"""The families of models that can be written as GGUF, one file each.

A family says which tensors its models have, what they are called and how their rows lie in a GGUF file, and which
hyper-parameters llama.cpp reads. To add one, declare a `Family` in a file of its own and name it in `FAMILIES`.

base        what a family is, and the tensors of a model found by one
attention   the parts of a layer that most families share
rope        rotary position embeddings
settings    config.json, complete and in today's spelling
"""

from collections.abc import Mapping
from typing import Any

from srd_modifier.errors import SRDError
from srd_modifier.gguf.families.base import Family, GGUFTensor, Piece
from srd_modifier.gguf.families.gemma3 import GEMMA3
from srd_modifier.gguf.families.gemma4 import GEMMA4
from srd_modifier.gguf.families.llama import LLAMA
from srd_modifier.gguf.families.mistral import MISTRAL
from srd_modifier.gguf.families.qwen2 import QWEN2
from srd_modifier.gguf.families.qwen3 import QWEN3
from srd_modifier.gguf.families.qwen3moe import QWEN3MOE
from srd_modifier.gguf.families.settings import text_model_type
from srd_modifier.gguf.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family", "GGUFTensor", "Piece", "family_of"]

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3MOE, SMOLLM3, GEMMA3, GEMMA4)


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a model.

    Args:
        config: config.json.
        where: names the file in messages.

    Raises:
        SRDError: there is none for this `model_type`, or llama.cpp does not compute what config.json says.
    """
    model_type = text_model_type(config)
    for family in FAMILIES:
        if model_type in family.model_types:
            family.settings(config, where)
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise SRDError(
        f"{where}: models of type {model_type!r} cannot be written as GGUF yet, only {', '.join(known)}; to add one, "
        "declare its Family in srd_modifier/gguf/families"
    )
