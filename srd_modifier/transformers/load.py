"""from_pretrained with the dial as arguments."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier.checkpoint.config import CONFIG_KEY, check_alphas
from srd_modifier.errors import CheckpointError
from srd_modifier.selection.depth import check_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_corrected(
    checkpoint: str | Path,
    *,
    alpha: float | None = None,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
    **kwargs: Any,
) -> "PreTrainedModel":
    """Load an SRD checkpoint as a causal language model.

    Args:
        checkpoint: a directory, a hub id, or a container, which is verified first.
        alpha: the dial, 0 (plain W4) to 1 (full correction); None is the checkpoint's own.
        layer_alphas: alpha by module name or `re:` pattern; None is the checkpoint's own, unless alpha is given.
        chunks: correct only these chunks of depth; `hydrate` adds others later. None is all.
        kwargs: of `AutoModelForCausalLM.from_pretrained`: dtype, device_map, revision, token, ...

    Raises:
        CheckpointError: there is no residual, or it is damaged or of another base.
        ConfigError: an alpha is outside [0, 1] or a chunk is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_alphas(0.0 if alpha is None else alpha, layer_alphas)
    hub_arguments = ("revision", "token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
    config = AutoConfig.from_pretrained(checkpoint, **{k: v for k, v in kwargs.items() if k in hub_arguments})
    if getattr(config, CONFIG_KEY, None) is None:
        raise CheckpointError(f"{checkpoint}: config.json has no srd_config, this is not an SRD checkpoint")
    overrides = {
        "alpha": alpha,
        "layer_alphas": None if layer_alphas is None else dict(layer_alphas),
        "chunks": None if chunks is None else list(check_chunks(chunks)),
    }
    setattr(config, CONFIG_KEY, {name: value for name, value in overrides.items() if value is not None})
    return AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **kwargs)
