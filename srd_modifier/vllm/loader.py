"""The one patch of vLLM: its default loader is given the corrected tensors in the place of the W4 ones.

vLLM has no hook for weights that a quantization config brings along. `DefaultModelLoader.get_all_weights` is the
single place through which the tensors of a checkpoint pass, before each model routes them by name; it is replaced
in a process when the first layer of an SRD checkpoint is made there.
"""

import inspect
from collections.abc import Iterator
from functools import wraps

from torch import Tensor, nn
from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DummyModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.vllm.register import METHOD

_PARAMETERS = ["self", "model_config", "model"]
_installed = False


def install() -> None:
    """Replace `DefaultModelLoader.get_all_weights`, once per process.

    Raises:
        SRDError: this vLLM has another method than the one that is known.
    """
    global _installed
    if _installed:
        return
    original = getattr(DefaultModelLoader, "get_all_weights", None)
    found = None if original is None else list(inspect.signature(original).parameters)
    if original is None or found != _PARAMETERS:
        have = "is gone" if found is None else f"takes ({', '.join(found)})"
        raise SRDError(
            f"DefaultModelLoader.get_all_weights of this vLLM {have}, srd-modifier relies on one that takes "
            f"({', '.join(_PARAMETERS)}): install a vLLM that it is tested with, or serve plain W4 with "
            "`--quantization compressed-tensors`"
        )

    @wraps(original)
    def get_all_weights(
        self: DefaultModelLoader, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        weights = original(self, model_config, model)
        if model_config.quantization != METHOD:
            return weights
        from srd_modifier.vllm.stream import corrected_weights

        return corrected_weights(weights, model_config, model)

    DefaultModelLoader.get_all_weights = get_all_weights
    _installed = True


def check_loader(load_config: LoadConfig) -> None:
    """Raise ConfigError if the weights will be read in a way that leaves the sidecar out."""
    loader = _LOAD_FORMAT_TO_MODEL_LOADER[load_config.load_format]  # not made: some need another library
    if issubclass(loader, DummyModelLoader):
        return  # random weights, on purpose
    if getattr(loader, "get_all_weights", None) is not DefaultModelLoader.get_all_weights:
        raise ConfigError(
            f"--load-format {load_config.load_format} does not read the residual of an SRD checkpoint; leave it at "
            "'auto', or serve plain W4 with `--quantization compressed-tensors`"
        )
