"""The sidecar that `save_pretrained` writes with the model.

llm-compressor replaces `model.save_pretrained` on the instance; we stand around its replacement. Model, sidecar and
srd_config are put together in a temporary sibling of the target and appear there together.

Where several processes calibrated together, all of them save, as llm-compressor wants it: each packs some of the
modules, and the first one writes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from torch import nn

from srd_modifier.checkpoint.atomic import merge_directory
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.distributed import Ranks
from srd_modifier.errors import SRDError
from srd_modifier.heap import give_back
from srd_modifier.modifier.capture import ResidualCapture


def install_save(
    model: nn.Module,
    capture: ResidualCapture,
    companions: Sequence[Callable[[Path], None]] = (),
    ranks: Ranks | None = None,
) -> None:
    """Let `model.save_pretrained` write the capture's sidecar too, and what else belongs into the directory."""
    ranks = ranks or Ranks()
    inner: Callable[..., Any] = getattr(model, "save_pretrained")  # noqa: B009 - nn.Module types it as a Tensor

    @wraps(inner)  # also copies the mark by which llm-compressor knows that it has been here
    def save_pretrained(
        save_directory: str | Path, quantization_format: str | None = None, save_compressed: bool = True, **kwargs: Any
    ) -> Any:
        if not save_compressed:
            return inner(save_directory, quantization_format, save_compressed, **kwargs)
        if kwargs.get("push_to_hub"):
            raise SRDError(
                "save_pretrained(push_to_hub=True) would upload the model without its sidecar; save to a directory, "
                "then upload that with `hf upload`"
            )
        target = Path(save_directory).resolve()  # a link leads to the disk that the residual belongs on, too
        with ranks.together():
            target.parent.mkdir(parents=True, exist_ok=True)
        capture.compress_remaining(target.parent)
        if ranks.size == 1 and quantization_format is None:
            _pack(model)
        directory = target
        with ExitStack() as stack:
            with ranks.together():
                if ranks.first:
                    directory = stack.enter_context(merge_directory(target))
            result = inner(str(directory), quantization_format, save_compressed, **kwargs)
            capture.settle(directory)
            with ranks.together():
                if ranks.first:
                    complete(directory)
        ranks.agree()  # it is in its place when any of them goes on
        return result

    def complete(directory: Path) -> None:
        attach_sidecar(
            directory,
            capture.files(),
            modules=[corrected.name for corrected in capture.modules.values()],
            fmt=capture.format,
            alpha=capture.alpha,
            layer_alphas=capture.layer_alphas,
            importance=capture.importance(),
            base_digests=capture.base_digests,
            sensitivity=capture.sensitivity(),
        )
        for write in companions:
            write(directory)

    setattr(model, "save_pretrained", save_pretrained)  # noqa: B010


def _pack(model: nn.Module) -> None:
    """Pack what is not packed yet, as llm-compressor is about to, but keep nothing of what a module took meanwhile.

    Packed weights that come to lie between temporaries of several megabytes keep these from being used again: twice as
    much memory at the end as there are tensors.
    """
    give_back()
    for module in model.modules():
        if (
            is_module_quantized(module)
            and getattr(module, "quantization_status", None) != QuantizationStatus.COMPRESSED
        ):
            compress_module(module)
            give_back()
