"""Original weights to residuals, one layer at a time.

One capture belongs to one model and serves all SRDModifiers of its recipe, because a checkpoint has one sidecar.
A quantizer that overwrites the weights (GPTQ, AutoRound) has its residual computed right after it finished a layer;
one that only sets scales (round-to-nearest) leaves the originals in place, and its residual waits until the weights
are packed for saving, unless it depends on the layer's inputs (feedback, sensitivity, a budget), which are summed only
while the layer is calibrated. Either way W4 is what a loader will read back from the file, never `module.weight`.
"""

import hashlib
import mmap
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor, compress_module
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter, tensor_bytes
from srd_modifier.errors import CheckpointError, RecipeError
from srd_modifier.modifier.allocation import allocate
from srd_modifier.modifier.calibrated import encode_all, predict, quantize_module
from srd_modifier.modifier.candidates import CandidateStore, StoredCandidate
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.residual import EncodedResidual, ResidualFormat, concatenate_rows, encode
from srd_modifier.residual.hessian import Hessian
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.patterns import pattern_value
from srd_modifier.selection.sensitivity import OutputSensitivity

_BASE_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")
_BLOCK_ENTRIES = 2**21
_MAX_WAITING = 2


@dataclass(frozen=True)
class CorrectedModule:
    """A module that gets a residual.

    Attributes:
        name: in the model.
        module: itself.
        format: of its residual.
        alpha: its dial.
        candidates: formats that a budget chooses from; it may also choose none. Empty where `format` is certain.
    """

    name: str
    module: nn.Linear
    format: ResidualFormat
    alpha: float
    candidates: tuple[ResidualFormat, ...] = ()


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
        self._quantized: dict[nn.Module, Tensor] = {}
        self.inputs = CalibrationInputs()
        self.budget: Budget | None = None
        self.names: dict[nn.Module, str] = {}
        self._watched: set[nn.Module] = set()
        self._measure: Callable[[dict[str, nn.Linear]], OutputSensitivity] | None = None
        self._output: OutputSensitivity | None = None
        self._damages: dict[str, ModuleSensitivity] = {}
        self._candidates: CandidateStore | None = None
        self._encoded: set[str] = set()
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

    def plan_damage(
        self, modules: dict[nn.Module, str], measure: Callable[[dict[str, nn.Linear]], OutputSensitivity] | None
    ) -> None:
        """Plan one SRDModifier's part of the sensitivity: a checkpoint has all its quantized modules or none.

        Args:
            modules: that are quantized.
            measure: the output sensitivity of modules; the first modifier's that has one is used for all.
        """
        self.names |= modules
        self._measure = self._measure or measure

    def measure_damage(self) -> None:
        """Once, before the first calibration forward, when transforms before it have changed the weights."""
        if self._measure is None or self._output is not None:
            return
        modules = {name: module for module, name in self.names.items() if isinstance(module, nn.Linear)}
        self._output = self._measure(modules)

    def watch(self, modules: Iterable[nn.Linear]) -> list[nn.Linear]:
        """Those of the modules whose inputs no other SRDModifier sums already."""
        new = [module for module in modules if module not in self._watched]
        self._watched.update(new)
        return new

    def unwatch(self, modules: Iterable[nn.Linear]) -> None:
        """The inputs of these modules are not summed any more."""
        self._watched.difference_update(modules)

    @property
    def by_inputs(self) -> bool:
        """Whether residuals depend on the layer's inputs, so that they are encoded while the layer is calibrated."""
        return self.inputs.second_moments

    def reserve(self, parent: Path | None) -> None:
        """Make the place where residuals wait, in `parent` or the system's temporary directory.

        Without a budget the disk space of the whole sidecar is reserved there.

        Raises:
            CheckpointError: there is not enough.
        """
        if self._folder is not None:
            return
        self._folder = tempfile.TemporaryDirectory(prefix=".srd-residual-", dir=parent, ignore_cleanup_errors=True)
        if self.budget is None:
            self._begin_sidecar()
        else:
            waiting = Path(self._folder.name) / "candidates"
            waiting.mkdir()
            self._candidates = CandidateStore(waiting)

    def _begin_sidecar(self) -> None:
        assert self._folder is not None
        entries = {
            c.name: ResidualEntry(c.module.out_features, c.module.in_features, c.format) for c in self.modules.values()
        }
        self._writer = SidecarWriter(Path(self._folder.name) / "sidecar", entries)

    # what the quantizers' events call

    def keep_originals(self, modules: Iterable[nn.Module], *, overwritten: bool) -> None:
        """Keep the weights that are about to be quantized; copies, if the quantizer will overwrite them."""
        for module in modules:
            if isinstance(module, nn.Linear) and (module in self.modules or self._measure is not None):
                weight = module.weight.detach()
                self._originals[module] = _copy(weight) if overwritten else weight

    def settle_weights(self) -> None:
        """Put the quantized weights in place of those that the layers after them were calibrated with."""
        for module, weight in self._quantized.items():
            update_offload_parameter(module, "weight", weight)
        self._quantized.clear()

    @torch.no_grad()
    def after_quantizing(self, modules: Iterable[nn.Linear], quantizer: str, *, balance: float | None = None) -> None:
        """Encode what quantizing these modules lost, and release their originals and inputs.

        Args:
            modules: that were quantized, those included that get no residual.
            quantizer: its name, for errors.
            balance: quantize the modules here first, with error feedback at this balance.

        Raises:
            RecipeError: a module saw no calibration data and needs it, or nothing at all was lost in any: their weights
                were quantized before.
        """
        corrected, nothing_lost = [], []
        for module in modules:
            if balance is not None:
                self._quantize_base(module, balance)
            if module in self._originals:
                lost = self._encode_quantized(module)
                if module in self.modules:
                    corrected.append(module)
                    nothing_lost.append(lost)
            self.inputs.release(self.names[module])
        self._refuse_if_nothing(corrected, nothing_lost, quantizer)

    def _quantize_base(self, module: nn.Linear, balance: float) -> None:
        """Quantize a weight with error feedback.

        Until the next layer's turn it is `W4 + balance * (W - W4)`: the layers after this one are calibrated on the
        inputs that they will have, which with the residual are nearly the original ones.
        """
        name, original = self.names[module], module.weight.detach()
        try:
            quantized = quantize_module(module, self._hessian(name, module), balance)
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
        self._quantized[module] = quantized.to(original.dtype)
        update_offload_parameter(module, "weight", quantized.lerp(original.float(), balance).to(original.dtype))

    def _encode_quantized(self, module: nn.Linear) -> bool:
        """Encode what was lost in a module whose original was kept; True if that is nothing."""
        scheme = module.quantization_scheme
        state = {name: tensor for name, tensor in get_direct_state_dict(module).items() if tensor is not None}
        state["weight"] = self._quantized.get(module, state["weight"])
        compressor = BaseCompressor.get_value_from_registry(infer_module_format(type(module), scheme).value)
        packed = compressor.compress(state, scheme)
        original = self._originals.pop(module)
        return (self._encode_by_inputs if self.by_inputs else self._encode)(module, original, packed)

    # what saving calls

    @torch.no_grad()
    def compress_remaining(self, parent: Path) -> None:
        """Pack the modules whose weights are still original, and encode what the packing loses."""
        self.reserve(parent)
        self._finish_storing()
        if self.by_inputs:
            self._refuse_if_not_calibrated()
            if self.budget is not None:
                return  # what is written depends on the saved model's bytes: `settle`
        assert self._writer is not None
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
        self._finish()

    def settle(self, directory: Path) -> None:
        """Spend the budget, if there is one, on the model that was saved to `directory`.

        Raises:
            ConfigError: the budget is too small for the W4 model, or the divergence out of reach.
        """
        store = self._candidates
        if store is None or self.budget is None or self._finished:
            return
        chosen = allocate(self.budget, store, self._damages, directory)
        self.modules = {
            module: replace(corrected, format=store.candidates[corrected.name][chosen[corrected.name]].format)
            for module, corrected in self.modules.items()
            if corrected.name in chosen
        }
        formats = Counter(corrected.format for corrected in self.modules.values())
        if formats:
            self._format = formats.most_common(1)[0][0]
        self._damages |= {name: store.candidates[name][number].sensitivity for name, number in chosen.items()}
        self._begin_sidecar()
        assert self._writer is not None
        for name, number in chosen.items():
            self._writer.write(name, store.read(name, number))
        self._finish()

    def _finish(self) -> None:
        self._finish_storing()
        if not self._finished:
            assert self._writer is not None
            self._writer.finish(self.format)
            self._finished = True

    def sensitivity(self) -> Sensitivity | None:
        """The predicted damage of every quantized module, if it was asked for."""
        if self._output is None:
            return None
        return Sensitivity(method=self._output.method, tokens=self._output.tokens, modules=dict(self._damages))

    def importance(self) -> dict[str, Tensor]:
        """Mean squared input of every quantized module that saw calibration data: float32 `[in_features]`."""
        return self.inputs.mean_squares()

    def files(self) -> list[Path]:
        """The finished files of the sidecar."""
        assert self._folder is not None
        return sorted((Path(self._folder.name) / "sidecar").iterdir())

    def close(self) -> None:
        """Remove what waits on the disk; nothing can be saved afterwards."""
        self._background.shutdown(cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()

    def _refuse_if_nothing(self, done: Sequence[nn.Module], nothing_lost: list[bool], quantizer: str) -> None:
        if done and all(nothing_lost):
            raise RecipeError(
                f"{self.modules[done[0]].name}: {quantizer} lost nothing, its weights were on the 4-bit grid before; "
                "start from the original model, with SRDModifier before the quantizer"
            )

    def _refuse_if_not_calibrated(self) -> None:
        needed = self.modules if self._output is None else self.names
        missing = next((self.names[module] for module in needed if self.names[module] not in self._encoded), None)
        if missing is not None:
            raise RecipeError(f"{missing} was not calibrated by the recipe; its residual cannot be computed")

    def _hessian(self, name: str, module: nn.Linear) -> Hessian:
        hessian = self.inputs.hessian(name, module.weight.device)
        if hessian is not None:
            return hessian
        if not self.inputs.mean_squares():
            raise RecipeError(
                f"{name} saw no calibration data, which feedback and sensitivity need; give the recipe a dataset, "
                "and let SRDModifier quantize by itself if the quantizer after it runs without one"
            )
        # an expert that no token reached: every column counts the same
        return Hessian.prepare(torch.zeros(module.in_features, module.in_features, device=module.weight.device))

    def _encode_by_inputs(self, module: nn.Linear, original: Tensor, packed: dict[str, Tensor]) -> bool:
        """Encode one module's residual under its Hessian, in every candidate format, and predict what each leaves."""
        name = self.names[module]
        zero_points = unpack_zero_points(packed.get("weight_zero_point"), module.out_features)
        base = dequantize_w4(packed["weight_packed"], packed["weight_scale"], zero_points, module.in_features)
        residual = original.float() - base
        corrected = self.modules.get(module)
        formats = () if corrected is None else corrected.candidates or (corrected.format,)
        try:
            hessian = self._hessian(name, module)
            encoded = encode_all(residual, formats, hessian, name, self.inputs.mean_square(name))
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
        self._encoded.add(name)
        sensitivities = (
            []
            if self._output is None
            else predict(name, residual, formats, encoded, hessian, self._output.values[name].to(residual.device))
        )
        if corrected is not None and corrected.candidates:
            assert self._candidates is not None
            shape = (module.out_features, module.in_features)
            candidates = [StoredCandidate(*pair) for pair in zip(formats, sensitivities[1:], strict=True)]
            self._candidates.write(name, shape, candidates, encoded)
            self._remember_base(name, packed)
        elif corrected is not None:
            self._store_soon(name, encoded[0], packed)
        if sensitivities:
            settled = corrected is not None and not corrected.candidates
            self._damages[name] = sensitivities[1 if settled else 0]
        return not bool(residual.any()) and bool(original.any())

    def _encode(self, module: nn.Module, original: Tensor, packed: dict[str, Tensor]) -> bool:
        """Encode the residual of one module and store it; True if nothing was lost in a weight that is not zero."""
        corrected = self.modules[module]
        name, fmt = corrected.name, corrected.format
        out_features, in_features = original.shape
        # a block of rows at a time while it is in the cache, where the format allows it
        block = max(1, _BLOCK_ENTRIES // in_features) if fmt.rows_are_independent else out_features
        zero_points = unpack_zero_points(packed.get("weight_zero_point"), out_features)
        importance = self.inputs.mean_square(name)
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
        self._remember_base(name, packed)

    def _remember_base(self, name: str, packed: dict[str, Tensor]) -> None:
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
