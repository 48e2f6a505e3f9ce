"""Keep what W4A16 quantization loses: an integer residual beside any compressed-tensors checkpoint.

Importing this package registers it with the libraries around it, whenever they are imported, in any order:

    llm-compressor    `SRDModifier` in YAML and Python recipes
    Transformers      `AutoModelForCausalLM.from_pretrained(DIR)` gives the corrected model

and costs next to nothing: torch and everything heavier are imported when a name below is first used.

    SRDModifier        the modifier, for Python recipes (needs the extra [quantize])
    load_corrected     from_pretrained with the dial as arguments
    set_alpha          turn the dial of a loaded model, in place
    hydrate, release   add or remove the residual of chunks of depth, in place
    fake_quantize_     base and residual applied to any model's weights, nothing saved

>>> import srd_modifier
>>> model = srd_modifier.load_corrected("out/model-srd", alpha=0.5)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from srd_modifier._registration import register
from srd_modifier._version import __version__

if TYPE_CHECKING:
    from srd_modifier.modifier import SRDModifier
    from srd_modifier.simulate import fake_quantize_
    from srd_modifier.transformers import hydrate, load_corrected, release, set_alpha

__all__ = [
    "SRDModifier",
    "__version__",
    "fake_quantize_",
    "hydrate",
    "load_corrected",
    "release",
    "set_alpha",
]

_HOMES = {
    "SRDModifier": "srd_modifier.modifier",
    "fake_quantize_": "srd_modifier.simulate",
    "hydrate": "srd_modifier.transformers",
    "load_corrected": "srd_modifier.transformers",
    "release": "srd_modifier.transformers",
    "set_alpha": "srd_modifier.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "SRDModifier":
        from srd_modifier._extras import require

        require("llmcompressor", extra="quantize")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
