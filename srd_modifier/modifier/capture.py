"""Original weights to residuals, one layer at a time.

One capture belongs to one model and serves all SRDModifiers of its recipe, because a checkpoint has one sidecar.
A quantizer that overwrites the weights (GPTQ, AutoRound) has its residual computed right after it finished a layer;
one that only sets scales (round-to-nearest) leaves the originals in place, and its residual waits until the weights
are packed for saving. Either way W4 is what a loader will read back from the file, never `module.weight`.
"""

import hashlib
import mmap
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor, compress_module
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn

from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter, tensor_bytes
from srd_modifier.errors import CheckpointError, RecipeError
from srd_modifier.residual import EncodedResidual, ResidualFormat, concatenate_rows, encode
from srd_modifier.selection.patterns import pattern_value

_BASE_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")
_BLOCK_ENTRIES = 2**21
_MAX_WAITING = 2


@dataclass(frozen=True)
class CorrectedModule:
    """A module that gets a residual."""

    name: str
    module: nn.Linear
    format: ResidualFormat
    alpha: float


class ResidualCapture:
    """The residuals of one model, from the original weights to the files of the sidecar.

    Args:
        model: the model being quantized.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[nn.Module, CorrectedModule] = {}
        self._format: ResidualFormat | None = None
        self.alpha = 1.0
        self.layer_alphas: dict[str, float] = {}
        self.base_digests: dict[str, str] = {}
        self._originals: dict[nn.Module, Tensor] = {}
        self._input_squares: dict[str, Tensor] = {}
        self._input_tokens: dict[str, int] = {}
        self._writer: SidecarWriter | None = None
        self._finished = False
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="srd-residual")
        self._storing: deque[Future[None]] = deque()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(
        self, modules: Iterable[CorrectedModule], fmt: ResidualFormat, alpha: float, layer_alphas: dict[str, float]
    ) -> None:
        """Plan the residual of one SRDModifier's modules; the first modifier's settings become the checkpoint's.

        Raises:
            RecipeError: a module already has one.
        """
        added: dict[nn.Module, CorrectedModule] = {corrected.module: corrected for corrected in modules}
        for module, corrected in added.items():
            if module in self.modules:
                raise RecipeError(
                    f"two SRDModifiers correct {corrected.name}; let their targets, ignore or correct differ"
                )
        if self._format is None:
            self._format, self.alpha, self.layer_alphas = fmt, alpha, dict(layer_alphas)
        else:
            # patterns of one modifier must not reach the modules of another: names stand before them
            own = {
                c.name: c.alpha
                for c in added.values()
                if pattern_value(c.name, self.layer_alphas, self.alpha) != c.alpha
            }
            self.layer_alphas = own | self.layer_alphas
        self.modules.update(added)
        order = {module: position for position, module in enumerate(self.model.modules())}
        self.modules = dict(sorted(self.modules.items(), key=lambda item: order[item[0]]))

    @property
    def format(self) -> ResidualFormat:
        """The checkpoint's default format: the first modifier's."""
        assert self._format is not None
        return self._format

    def reserve(self, parent: Path | None) -> None:
        """Reserve the disk space of the whole sidecar, in `parent` or the system's temporary directory.

        Raises:
            CheckpointError: there is not enough.
        """
        if self._writer is None:
            self._folder = tempfile.TemporaryDirectory(prefix=".srd-residual-", dir=parent, ignore_cleanup_errors=True)
            entries = {
                c.name: ResidualEntry(c.module.out_features, c.module.in_features, c.format)
                for c in self.modules.values()
            }
            self._writer = SidecarWriter(Path(self._folder.name), entries)

    # what the quantizers' events call

    def keep_originals(self, modules: Iterable[nn.Module]) -> None:
        """Copy the weights that are about to be overwritten."""
        for module in modules:
            if isinstance(module, nn.Linear) and module in self.modules:
                self._originals[module] = _copy(module.weight.detach())

    @torch.no_grad()
    def encode_overwritten(self, modules: Iterable[nn.Module], quantizer: str) -> None:
        """Encode the residual of modules whose originals were kept, and release these.

        Raises:
            RecipeError: nothing at all was lost in any of them: their weights were quantized before.
        """
        done = [module for module in modules if module in self._originals]
        nothing_lost = []
        for module in done:
            scheme = module.quantization_scheme
            state = {name: tensor for name, tensor in get_direct_state_dict(module).items() if tensor is not None}
            compressor = BaseCompressor.get_value_from_registry(infer_module_format(type(module), scheme).value)
            packed = compressor.compress(state, scheme)
            nothing_lost.append(self._encode(module, self._originals.pop(module), packed))
        self._refuse_if_nothing(done, nothing_lost, quantizer)

    def add_inputs(self, name: str, inputs: Tensor) -> None:
        """Add a module's calibration inputs `[..., in_features]` to its mean square."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        squares = rows.square().sum(dim=0)
        self._input_squares[name] = self._input_squares[name] + squares if name in self._input_squares else squares
        self._input_tokens[name] = self._input_tokens.get(name, 0) + len(rows)

    # what saving calls

    @torch.no_grad()
    def compress_remaining(self, parent: Path) -> None:
        """Pack the modules whose weights are still original, and encode what the packing loses."""
        self.reserve(parent)
        assert self._writer is not None
        self._finish_storing()
        missing = set(self._writer.missing)
        done, nothing_lost = [], []
        for module, corrected in self.modules.items():
            if corrected.name not in missing:
                continue
            if (
                not hasattr(module, "quantization_scheme")
                or module.quantization_status == QuantizationStatus.COMPRESSED
            ):
                raise RecipeError(f"{corrected.name} was not calibrated by the recipe; its residual cannot be computed")
            original = corrected.module.weight.detach()
            compress_module(module)
            packed = get_direct_state_dict(module)
            if "weight_packed" not in packed:
                raise CheckpointError(f"{corrected.name} was saved uncompressed before and is not packed any more")
            done.append(module)
            nothing_lost.append(self._encode(module, original, packed))
        self._refuse_if_nothing(done, nothing_lost, "round-to-nearest")
        self._finish_storing()
        if not self._finished:
            self._writer.finish(self.format)
            self._finished = True

    def importance(self) -> dict[str, Tensor]:
        """Mean squared input of every quantized module that saw calibration data: float32 `[in_features]`."""
        return {name: square.cpu() for name in self._input_squares if (square := self._mean_square(name)) is not None}

    def files(self) -> list[Path]:
        """The finished files of the sidecar."""
        assert self._folder is not None
        return sorted(Path(self._folder.name).iterdir())

    def close(self) -> None:
        """Remove what waits on the disk; nothing can be saved afterwards."""
        self._background.shutdown(cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()

    def _refuse_if_nothing(self, done: list[nn.Module], nothing_lost: list[bool], quantizer: str) -> None:
        if done and all(nothing_lost):
            raise RecipeError(
                f"{self.modules[done[0]].name}: {quantizer} lost nothing, its weights were on the 4-bit grid before; "
                "start from the original model, with SRDModifier before the quantizer"
            )

    def _mean_square(self, name: str) -> Tensor | None:
        return self._input_squares[name] / self._input_tokens[name] if name in self._input_squares else None

    def _encode(self, module: nn.Module, original: Tensor, packed: dict[str, Tensor]) -> bool:
        """Encode the residual of one module and store it; True if nothing was lost in a weight that is not zero."""
        corrected = self.modules[module]
        name, fmt = corrected.name, corrected.format
        out_features, in_features = original.shape
        # a block of rows at a time while it is in the cache, where the format allows it
        block = max(1, _BLOCK_ENTRIES // in_features) if fmt.rows_are_independent else out_features
        zero_points = unpack_zero_points(packed.get("weight_zero_point"), out_features)
        importance = self._mean_square(name)
        encoded = []
        try:
            for start in range(0, out_features, block):
                rows = slice(start, start + block)
                base = dequantize_w4(
                    packed["weight_packed"][rows],
                    packed["weight_scale"][rows],
                    None if zero_points is None else zero_points[rows],
                    in_features,
                )
                residual = torch.sub(original[rows].float(), base, out=base)
                encoded.append(encode(residual, fmt, key=name, importance=importance))
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
        whole = encoded[0] if len(encoded) == 1 else concatenate_rows(encoded)
        self._store_soon(name, whole, packed)
        return not bool(whole.scale.any()) and bool(original.any())

    def _store_soon(self, name: str, encoded: EncodedResidual, packed: dict[str, Tensor]) -> None:
        """Hash and write in the background; at most a few modules wait, so that memory stays bounded."""
        self._storing.append(self._background.submit(self._store, name, encoded, packed))
        while len(self._storing) > _MAX_WAITING:
            self._storing.popleft().result()

    def _store(self, name: str, encoded: EncodedResidual, packed: dict[str, Tensor]) -> None:
        assert self._writer is not None
        self._writer.write(name, encoded)
        for suffix in _BASE_TENSORS:
            if packed.get(suffix) is not None:
                self.base_digests[f"{name}.{suffix}"] = hashlib.sha256(tensor_bytes(packed[suffix])).hexdigest()

    def _finish_storing(self) -> None:
        while self._storing:
            self._storing.popleft().result()


def _copy(weight: Tensor) -> Tensor:
    """A copy that gives its memory back to the system when it is released.

    From the heap, copies that come and go between the quantizer's own large temporaries leave holes that are never
    used again: a third more memory for a model of 135 million weights.
    """
    if weight.device.type != "cpu":
        return weight.clone()
    pages = mmap.mmap(-1, weight.nbytes)
    return torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel()).view(weight.shape).copy_(weight)
