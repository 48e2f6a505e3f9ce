"""Where in the depth of a model a module sits.

Depth is `layer / layers`: of 8 decoder layers, layer 4 is at 0.5. A range takes the layers whose depth is at
least its start and below its end, so that ranges that meet share no layer and miss none.
"""

import re
from collections.abc import Iterable

from srd_modifier.errors import ConfigError

CHUNKS: dict[str, tuple[float, float]] = {
    "early": (0.0, 0.20),
    "factual": (0.20, 0.40),
    "reasoning": (0.40, 0.77),
    "governance": (0.77, 1.0),
}
"""The four chunks of depth; a mixture of experts uses the same split, experts included."""

# the containers that hold the decoder layers across architectures, then the layer's number
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")

# encoders of images and sound have layers of their own, which are not the decoder's
_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio|image)[^.]*\.")


def layer_of(name: str) -> int | None:
    """The decoder layer that a module belongs to, or None outside the layers.

    >>> layer_of("model.layers.11.mlp.experts.3.up_proj"), layer_of("lm_head")
    (11, None)
    """
    found = None if _TOWER.search(name) else _LAYER.search(name)
    return int(found.group(1)) if found else None


def count_layers(names: Iterable[str]) -> int:
    """Decoder layers of a model with modules of these names; 0 if none has a layer number."""
    return max((layer for name in names if (layer := layer_of(name)) is not None), default=-1) + 1


def in_range(name: str, layers: int, start: float, end: float) -> bool:
    """Whether a module's depth is in `[start, end)`; one outside the layers has no depth.

    Compared as whole layers: `0.55 * 100` is 55.00000000000001 in floating point, and layer 55 belongs to the
    range that starts at 0.55.
    """
    layer = layer_of(name)
    return layer is not None and _ceil(start * layers) <= layer < _ceil(end * layers)


def chunk_of(name: str, layers: int) -> str | None:
    """The chunk that a module belongs to, or None outside the layers."""
    return next((chunk for chunk, (start, end) in CHUNKS.items() if in_range(name, layers, start, end)), None)


def check_chunks(chunks: Iterable[str]) -> tuple[str, ...]:
    """The chunk names, in depth order and without repeats.

    Raises:
        ConfigError: a name is not a chunk.
    """
    asked = [chunks] if isinstance(chunks, str) else list(chunks)
    for chunk in asked:
        if chunk not in tuple(CHUNKS):
            raise ConfigError(f"chunk {chunk!r} is unknown, expected some of {list(CHUNKS)}")
    return tuple(chunk for chunk in CHUNKS if chunk in asked)


def _ceil(boundary: float) -> int:
    return -int(-(boundary - 1e-9) // 1)
