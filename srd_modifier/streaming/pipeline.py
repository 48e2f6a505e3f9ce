"""llm-compressor's life cycle on a model without weights, which are brought in for one decoder layer at a time."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.base_writer import BaseWriter
from srd_modifier.checkpoint.writer import SidecarWriter, tensor_bytes
from srd_modifier.errors import RecipeError
from srd_modifier.heap import give_back
from srd_modifier.residual import ResidualFormat
from srd_modifier.resuming.journal import Journal
from srd_modifier.streaming.layers import Step
from srd_modifier.streaming.originals import Originals
from srd_modifier.streaming.record import Record

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

_MAX_WAITING = 2

_log = logging.getLogger(__name__)


@contextmanager
def life_cycle(model: Any, recipe: "Recipe") -> Iterator[None]:
    """Initialize the recipe's modifiers on a model without weights, and finalize them when all is done."""
    from llmcompressor.core import active_session

    session = active_session()
    session.reset()
    session.initialize(model=model, start=-1, recipe=recipe, calib_data=None)
    yield
    session.finalize()


class LayerByLayer:
    """The steps of a streamed quantization, each written and noted before the next begins.

    Args:
        originals: the model's weights.
        base: the files of the W4 model.
        sidecar: the files of the residual; None without one.
        formats: of the residual, by module that gets one.
        journal: of what is done.
    """

    def __init__(
        self,
        originals: Originals,
        base: BaseWriter,
        sidecar: SidecarWriter | None,
        formats: Mapping[str, ResidualFormat],
        journal: Journal[Record],
    ) -> None:
        self._originals = originals
        self._base = base
        self._sidecar = sidecar
        self._formats = formats
        self._journal = journal
        self.digests: dict[str, str] = {}
        self.lost = False

    def run(self, steps: list[Step], done: list[Record], show: Callable[[list[Step]], Iterable[Step]]) -> None:
        """Quantize, encode and copy what is not on the disk already.

        Args:
            steps: all of the model.
            done: what was written before.
            show: gives the steps that are left one by one, and shows how far it is.

        Raises:
            RecipeError: a weight is not finite.
            CheckpointError: the disk refuses.
        """
        from compressed_tensors.quantization import QuantizationStatus
        from llmcompressor.core import LifecycleCallbacks

        records = {record.step: record for record in done}
        LifecycleCallbacks.calibration_start()
        left = [step for step in steps if not self._is_done(step, records.get(step.name))]
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="srd-writing") as background:
            for step in show(left):
                self._run(step, background)
        LifecycleCallbacks.calibration_end()
        for step in steps:
            for _, module in step.quantized:  # whom the end of calibration marks as not packed yet
                setattr(module, "quantization_status", QuantizationStatus.COMPRESSED)  # noqa: B010

    @torch.no_grad()
    def _run(self, step: Step, background: ThreadPoolExecutor) -> None:
        from compressed_tensors.compressors.base import compress_module
        from compressed_tensors.utils import get_direct_state_dict
        from llmcompressor.core import LifecycleCallbacks

        from srd_modifier.modifier.rounded import encode_rounded

        waiting: deque[Future[None]] = deque()
        base: dict[str, str] = {}
        residual: dict[str, dict[str, str]] = {}
        lost = False

        def write_base(tensors: dict[str, Tensor]) -> None:
            for name, tensor in tensors.items():
                base[name] = self._base.write(name, [tensor_bytes(tensor)])

        def write_residual(module: str, encoded: Any) -> None:
            assert self._sidecar is not None
            self._sidecar.write(module, encoded)
            residual[module] = self._sidecar.digests(module)

        def soon(*task: Any) -> None:
            waiting.append(background.submit(*task))
            while len(waiting) > _MAX_WAITING:
                waiting.popleft().result()

        with self._originals.present(step.quantized):
            if step.quantized:
                LifecycleCallbacks.sequential_epoch_end([module for _, module in step.quantized])
            for name, module in step.quantized:
                original: Any = module.weight
                compress_module(module)
                packed = get_direct_state_dict(module)
                saved = {suffix: tensor for suffix, tensor in packed.items() if suffix != "bias" and tensor is not None}
                soon(write_base, {f"{name}.{suffix}": tensor for suffix, tensor in saved.items()})
                if name in self._formats:
                    try:
                        encoded = encode_rounded(original.detach(), packed, self._formats[name], key=name)
                    except ValueError as error:
                        raise RecipeError(f"{name}: {error}") from error
                    lost |= bool(encoded.scale.any()) or not bool(original.any())
                    soon(write_residual, name, encoded)
                self._originals.release()
                give_back()
            while waiting:
                waiting.popleft().result()
        for name in step.copied:
            base[name] = self._base.write(name, self._originals.chunks(name))
        self._originals.release()
        self._base.flush(base)
        if self._sidecar is not None:
            self._sidecar.flush(residual)
        record = Record(step.name, base, residual, lost)
        self._journal.add(record)
        self._take(record)

    def _is_done(self, step: Step, record: Record | None) -> bool:
        from compressed_tensors.compressors.base import compress_module

        if record is None:
            return False
        corrected = [name for name, _ in step.quantized if name in self._formats]
        intact = (
            set(record.base) == step.saved
            and set(record.residual) == set(corrected)
            and all(self._base.holds(tensor, digest) for tensor, digest in record.base.items())
        )
        if not intact or not all(self._restored(name, record.residual[name]) for name in corrected):
            _log.warning("%s was written, but its bytes are not what was written; it is done again", step.name)
            return False
        for _, module in step.quantized:
            compress_module(module)  # without weights: only what is saved of the module's settings counts now
        self._take(record)
        return True

    def _restored(self, module: str, digests: Mapping[str, str]) -> bool:
        return self._sidecar is not None and self._sidecar.restore(module, digests)

    def _take(self, record: Record) -> None:
        self.digests |= record.base
        self.lost |= record.lost
