"""config.json as the settings of the text model, complete and in today's spelling."""

from collections.abc import Mapping
from typing import Any

from srd_modifier.errors import SRDError

# what says how the weights are stored, and nothing of what the model computes
_STORAGE_KEYS = ("quantization_config", "srd_config")


def text_model_type(config: Mapping[str, Any]) -> str:
    """The `model_type` of the text model, which is a part of one that also takes images or sound."""
    inner = config.get("text_config")
    values = inner if isinstance(inner, dict) and "model_type" in inner else config
    return str(values.get("model_type"))


def text_settings(config: Mapping[str, Any], where: str) -> Any:
    """The configuration object that Transformers makes of config.json.

    Configurations leave out what has its default value, and spell RoPE in several ways (`rope_theta` and
    `rope_scaling`, or `rope_parameters`). Transformers knows each model's defaults and brings every spelling into
    `rope_parameters`; nothing of it is repeated here.

    Args:
        config: config.json.
        where: names the file in messages.

    Raises:
        SRDError: a value is missing or of the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    values = {key: value for key, value in config.items() if key not in _STORAGE_KEYS}
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(values).get_text_config()
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise SRDError(f"{where} is not a configuration that Transformers reads: {reason}") from error


def head_size(settings: Any) -> int:
    """Rows of one attention head."""
    return getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
