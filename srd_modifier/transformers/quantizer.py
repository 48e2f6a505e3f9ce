"""The hook into Transformers: plain `from_pretrained(DIR)` gives the corrected model.

Transformers asks its compressed-tensors quantizer to prepare the modules before the weights are read and to finish
them after. For a checkpoint with a sidecar, this one finishes every packed module itself: W4 in float32 from the file,
plus the residual, rounded once to the model's dtype. What comes out is an ordinary dense model, with nothing of
the quantization left in it, so saving it again writes an honest dense checkpoint.
"""

from typing import Any

from torch import nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from srd_modifier.checkpoint.config import CONFIG_KEY, given_settings, module_alphas
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.transformers.correction import Correction, correction_of, is_corrected, remember
from srd_modifier.transformers.source import checkpoint_directory
from srd_modifier.transformers.stacks import check_readable, dense_experts, forget_decompression, stacking, stacks

_SETTINGS = ("alpha", "layer_alphas", "chunks")


class SRDQuantizer(CompressedTensorsHfQuantizer):
    """Transformers' compressed-tensors quantizer, which also adds the residual of a checkpoint that has one."""

    # of the model that is being loaded; a list of names only, because Transformers copies its quantizers
    _stacks: tuple[str, ...] = ()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        files, given = kwargs.get("checkpoint_files"), getattr(model.config, CONFIG_KEY, None)
        if not files or given is None:
            return
        # everything that can be wrong with the sidecar is found before the weights are read
        directory = checkpoint_directory(files[0])
        overrides = given_settings(directory, given, _SETTINGS)
        chunks = overrides.pop("chunks", None)
        sidecar = Sidecar.open(directory)
        check_readable(model, sidecar.base)
        correction = Correction(
            sidecar, dial=module_alphas(sidecar.config, sidecar.base.layers, **overrides), hydrated=set()
        )
        correction.hydrated = correction.in_chunks(chunks)
        # with the model and not here: Transformers copies its quantizers, and mapped files cannot be copied
        remember(model, correction)
        self._stacks = stacks(model)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """How the checkpoint's tensors become the model's: experts are read packed, and dense where they are not.

        Upstream reads all experts of a quantized model as packed, and stacks those of some architectures only.
        """
        if not self._stacks:
            return list(super().update_weight_conversions(weight_conversions))
        given = [*weight_conversions, *stacking(self._stacks, weight_conversions)]
        # those of packed tensors stand first: the pattern of a dense weight matches their names too
        return [*super().update_weight_conversions(given), *dense_experts(given)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not is_corrected(model):
            super()._process_model_after_weight_loading(model, **kwargs)
            return
        # here, because every import of Transformers would otherwise import compressed-tensors
        from srd_modifier.transformers.dense import make_dense

        correction = correction_of(model)
        correction.applied = correction.wanted()
        plain = make_dense(model, correction.sidecar, correction.applied)
        correction.sidecar.release()  # what was read of the mapped files would stay in memory beside the weights
        self.compressor.remove_decompression_hook(model)
        if plain and hasattr(model.config, "quantization_config"):
            self.remove_quantization_config(model)
            forget_decompression(model)
        delattr(model.config, CONFIG_KEY)
