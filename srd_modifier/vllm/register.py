"""What vLLM learns at its start: that a checkpoint with `srd_config` has a quantization config of its own.

This runs in every vLLM process, more than once, whatever the model is. So nothing of vLLM is imported that vLLM has
not imported by itself, and the rest of this package only when an SRD checkpoint is seen.
"""

from typing import Any

METHOD = "srd"


def register() -> None:
    """Register the quantization method `srd`; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    if METHOD not in _CUSTOMIZED_METHOD_TO_QUANT_CONFIG:
        register_quantization_config(METHOD)(_detecting_config())


def _detecting_config() -> type:
    """The class that vLLM asks whether a checkpoint is one of ours; an answer of its own comes from CorrectedConfig."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class SRDDetection(QuantizationConfig):
        def __new__(cls) -> "SRDDetection":
            """VLLM's way to go on with `--quantization srd` where there is no quantization_config."""
            from srd_modifier.errors import ConfigError

            raise ConfigError(f"--quantization {METHOD} is for SRD checkpoints, and this model is not quantized")

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            """`srd` for a compressed-tensors checkpoint with srd_config, unless the user asks for plain W4."""
            ours = hf_quant_cfg.get("quant_method") == "compressed-tensors" and user_quant in (None, METHOD)
            return METHOD if ours and getattr(hf_config, "srd_config", None) is not None else None

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 75

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            from srd_modifier.vllm.config import CorrectedConfig

            return CorrectedConfig.from_config(config)

    return SRDDetection
