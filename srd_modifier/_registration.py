"""Post-import hooks: the libraries learn of us when they are imported, not because we import them.

A hook must never raise, or it would fail an import that has nothing to do with us; what goes wrong becomes a
warning that says what will not work.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import wrapt

from srd_modifier import _container_hooks

_registered = False


def register() -> None:
    """Register the hooks, once per process."""
    global _registered
    if _registered:
        return
    _registered = True
    wrapt.register_post_import_hook(_guarded(_register_modifier, "SRDModifier in YAML recipes"), "llmcompressor")
    wrapt.register_post_import_hook(
        _guarded(_register_quantizer, "loading corrected models in Transformers"), "transformers.quantizers.auto"
    )
    for module in _container_hooks.MODULES:
        wrapt.register_post_import_hook(
            _guarded(_container_hooks.install, "reading .axm containers in Transformers"), module
        )


def _guarded(hook: Callable[[ModuleType], None], what: str) -> Callable[[ModuleType], None]:
    def guarded(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception as error:
            warnings.warn(f"srd-modifier: {what} is not available: {type(error).__name__}: {error}", stacklevel=2)

    return guarded


def _register_modifier(_: ModuleType) -> None:
    import_module("srd_modifier.modifier")  # registers the class, now or when its own import is done


def _register_quantizer(auto: ModuleType) -> None:
    from srd_modifier.transformers.quantizer import SRDQuantizer

    # `register_quantizer` refuses a name that is taken, and ours must be this one: the checkpoint is plain
    # compressed-tensors for everybody else
    auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = SRDQuantizer
