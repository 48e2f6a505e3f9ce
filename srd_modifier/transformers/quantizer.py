"""The hook into Transformers: plain `from_pretrained(DIR)` gives the corrected model.

Transformers asks its compressed-tensors quantizer to prepare the modules before the weights are read and to finish
them after. For a checkpoint with a sidecar, this one finishes every packed module itself: W4 in float32 from the file,
plus the residual, rounded once to the model's dtype. What comes out is an ordinary dense model, with nothing of
the quantization left in it, so saving it again writes an honest dense checkpoint.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from srd_modifier.checkpoint.config import CONFIG_KEY, module_alphas, read_model_config
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import ConfigError
from srd_modifier.transformers.correction import Correction, remember
from srd_modifier.transformers.source import checkpoint_directory

_OVERRIDES = ("alpha", "layer_alphas", "chunks")


class SRDQuantizer(CompressedTensorsHfQuantizer):
    """Transformers' compressed-tensors quantizer, which also adds the residual of a checkpoint that has one."""

    _sidecar: Sidecar | None = None
    _alphas: dict[str, float]
    _chunks: list[str] | None = None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        files, given = kwargs.get("checkpoint_files"), getattr(model.config, CONFIG_KEY, None)
        if not files or not given:
            return
        # everything that can be wrong with the sidecar is found before the weights are read
        directory = checkpoint_directory(files[0])
        overrides = _overrides(directory, given)
        self._sidecar = Sidecar.open(directory)
        self._chunks = overrides.pop("chunks", None)
        self._alphas = module_alphas(self._sidecar.config, self._sidecar.base.layers, **overrides)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._sidecar is None:
            super()._process_model_after_weight_loading(model, **kwargs)
            return
        # here, because every import of Transformers would otherwise import compressed-tensors
        from srd_modifier.transformers.dense import make_dense

        layers = self._sidecar.base.layers
        active = module_alphas(self._sidecar.config, layers, chunks=self._chunks, alpha=1.0)
        applied = {module: alpha if active[module] else 0.0 for module, alpha in self._alphas.items()}
        plain = make_dense(model, self._sidecar, applied)
        self.compressor.remove_decompression_hook(model)
        if plain and hasattr(model.config, "quantization_config"):
            self.remove_quantization_config(model)
        delattr(model.config, CONFIG_KEY)
        remember(model, Correction(self._sidecar, self._alphas, applied))


def _overrides(directory: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user passed as `from_pretrained(..., srd_config={...})`."""
    stored = read_model_config(directory).get(CONFIG_KEY, {})
    overrides = {name: value for name, value in given.items() if name not in stored or stored[name] != value}
    for name in overrides:
        if name not in _OVERRIDES:
            raise ConfigError(f"srd_config.{name} cannot be set when loading, only {', '.join(_OVERRIDES)}")
    return overrides
