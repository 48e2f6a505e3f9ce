"""Original weights to residuals, one layer at a time.

One capture belongs to one model and serves all SRDModifiers of its recipe, because a checkpoint has one sidecar.
A quantizer that overwrites the weights (GPTQ, AutoRound) has its residual computed right after it finished a layer;
one that only sets scales (round-to-nearest) leaves the originals in place, and its residual waits until the weights
are packed for saving, unless it depends on the layer's inputs (feedback, sensitivity, a budget), which are summed only
while the layer is calibrated. Either way W4 is what a loader will read back from the file, never `module.weight`.

Where several processes calibrate together (`distributed`), each quantizes and encodes some of a layer's modules, those
that share a second moment in the same process. Its residuals wait on its own disk until the first process, which alone
writes the sidecar, asks for them.

Where a killed calibration is to be resumed, every layer's results are put on the disk as it is finished (`finished`).
"""

import hashlib
import mmap
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.distributed import replace_module_parallel
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter, tensor_bytes
from srd_modifier.distributed import Ranks
from srd_modifier.errors import CheckpointError, RecipeError
from srd_modifier.heap import give_back
from srd_modifier.modifier.allocation import allocate
from srd_modifier.modifier.bases import base_state, dequantized, packed_base, put_back
from srd_modifier.modifier.calibrated import encode_all, predict, quantize_module
from srd_modifier.modifier.candidates import CandidateStore, ResidualSpool, StoredCandidate
from srd_modifier.modifier.finished import FinishedModule, FinishedSteps
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.modifier.rounded import encode_rounded
from srd_modifier.residual import EncodedResidual, ResidualFormat
from srd_modifier.residual.hessian import Hessian
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.patterns import pattern_value
from srd_modifier.selection.sensitivity import OutputSensitivity

_BASE_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")
_BASE_PARAMETERS = ("weight", "weight_scale", "weight_zero_point")
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
        ranks: the processes that quantize it.
        finished: what one process keeps on the disk, to be resumed; None if nothing is.
    """

    def __init__(self, model: nn.Module, ranks: Ranks | None = None, finished: FinishedSteps | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self._finished_steps = finished
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
        self._assigned: dict[nn.Module, int] = {}
        self._unsettled: dict[nn.Module, int] = {}
        self._encoded: set[str] = set()
        self._holders: dict[str, int] = {}
        self._spool: ResidualSpool | None = None
        self._writer: SidecarWriter | None = None
        self._finished = False
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="srd-residual")
        self._storing: deque[Future[None]] = deque()
        self._folder: Path | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folders: list[str] = []

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

    def check_data(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """A killed calibration is resumed on the same data only.

        Raises:
            CheckpointError: it was other data.
        """
        if self._finished_steps is not None:
            self._finished_steps.check_data(batches)

    def measure_damage(self) -> None:
        """Once, before the first calibration forward, when transforms before it have changed the weights."""
        if self._measure is None or self._output is not None:
            return
        if self._finished_steps is not None:
            self._output = self._finished_steps.sensitivity()
        if self._output is None:
            modules = {name: module for module, name in self.names.items() if isinstance(module, nn.Linear)}
            self._output = self._measure(modules)
            if self._finished_steps is not None:
                self._finished_steps.keep_sensitivity(self._output)

    def watch(self, modules: Iterable[nn.Linear]) -> list[nn.Linear]:
        """Those of the modules whose inputs no other SRDModifier sums already."""
        new = [module for module in modules if module not in self._watched]
        self._watched.update(new)
        return new

    def unwatch(self, modules: Iterable[nn.Linear]) -> None:
        """The inputs of these modules are not summed any more."""
        self._watched.difference_update(modules)

    @property
    def is_kept(self) -> bool:
        """Whether what is finished is kept on the disk, layer by layer."""
        return self._finished_steps is not None

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
        with self.ranks.together():
            self._make_folder(parent)
        assert self._folder is not None
        self._folders = self.ranks.gather(str(self._folder))

    def _make_folder(self, parent: Path | None) -> None:
        if self._finished_steps is not None:
            self._folder = self._finished_steps.directory
        else:
            self._temporary = tempfile.TemporaryDirectory(
                prefix=".srd-residual-", dir=parent, ignore_cleanup_errors=True
            )
            self._folder = Path(self._temporary.name)
        waiting = self._folder / "candidates"
        if self.budget is not None:
            waiting.mkdir(exist_ok=True)
            self._candidates = CandidateStore(waiting)
        elif self.ranks.first:
            self._begin_sidecar(keep=self._finished_steps is not None)
        else:
            waiting.mkdir()
            self._spool = ResidualSpool(waiting)

    def _begin_sidecar(self, *, keep: bool) -> None:
        directory = self._sidecar
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)  # a killed process may have begun it
        entries = {
            c.name: ResidualEntry(c.module.out_features, c.module.in_features, c.format) for c in self.modules.values()
        }
        self._writer = SidecarWriter(directory, entries, keep=keep)

    @property
    def _sidecar(self) -> Path:
        assert self._folder is not None
        return self._folder / "sidecar"

    # what a killed process has finished

    def find_finished(self) -> None:
        """Find the modules whose results are on the disk, before the first calibration forward."""
        if self._finished_steps is not None:
            self._finished_steps.find(self._holds)

    def _holds(self, name: str, one: FinishedModule) -> bool:
        """Whether the disk holds the residual that was stored of a module, which counts as stored then."""
        if not one.residual:
            return True
        if self._candidates is None:
            return self._writer is not None and self._writer.restore(name, one.residual)
        corrected = next(corrected for corrected in self.modules.values() if corrected.name == name)
        shape = (corrected.module.out_features, corrected.module.in_features)
        return self._candidates.restore(name, shape, _stored(corrected, one.candidates), one.residual["candidates"])

    def is_finished(self, module: nn.Module) -> bool:
        """Whether a module's results are on the disk, so that it is not calibrated again."""
        return self._finished_steps is not None and self._finished_steps.has(self.names.get(module, ""))

    def is_idle(self, modules: Iterable[nn.Module]) -> bool:
        """Whether calibration is resumed, and none of these modules is still to be calibrated."""
        if self._finished_steps is None or not self._finished_steps.is_resumed:
            return False
        return all(self.is_finished(module) for module in modules if module in self.names)

    def restore(self, modules: Sequence[nn.Linear], *, balance: float | None) -> bool:
        """Put the results of a layer's modules in their place; False if they are to be computed.

        Args:
            modules: that are quantized together.
            balance: of error feedback, if they were quantized here.
        """
        if self._finished_steps is None:
            return False
        finished = self._finished_steps.read([self.names[module] for module in modules])
        if finished is None:
            return False
        for module in modules:
            self._take(module, finished[self.names[module]], balance)
        return True

    def _take(self, module: nn.Linear, one: FinishedModule, balance: float | None) -> None:
        name = self.names[module]
        weight = put_back(module, one.base)
        if weight is not None:
            self._set_weight(module, weight, balance)
            if balance is not None:
                self._unsettled[module] = self.ranks.rank
        if one.mean_square is not None:
            self.inputs.restore(name, one.mean_square)
        if one.encoded:
            self._encoded.add(name)
        if one.damage is not None:
            self._damages[name] = one.damage
        self.base_digests |= one.base_digests

    def _keep(self, modules: Sequence[nn.Linear], packed: dict[nn.Module, dict[str, Tensor]]) -> None:
        """Put the results of modules that were quantized together on the disk.

        Args:
            modules: one at least.
            packed: their bases, where the quantizer changed the weights.
        """
        assert self._finished_steps is not None
        step = self.names[modules[0]]
        if self._finished_steps.is_kept(step):
            return  # the quantizer is observed by two SRDModifiers
        self._finish_storing()
        corrected = [self.names[module] for module in modules if module in self.modules]
        encoded = [name for name in corrected if name in self._encoded]
        if self._writer is not None:
            self._writer.flush(encoded)
        finished = {self.names[module]: self._result(module, packed.get(module)) for module in modules}
        self._finished_steps.keep(step, finished)

    def _result(self, module: nn.Linear, packed: dict[str, Tensor] | None) -> FinishedModule:
        name = self.names[module]
        encoded = name in self._encoded
        residual: dict[str, str] = {}
        candidates: list[ModuleSensitivity] = []
        if encoded and module in self.modules and self._candidates is not None:
            residual = {"candidates": self._candidates.digest(name)}
            candidates = [candidate.sensitivity for candidate in self._candidates.candidates[name]]
        elif encoded and module in self.modules and self._writer is not None:
            residual = self._writer.digests(name)
        bases = (f"{name}.{suffix}" for suffix in _BASE_TENSORS)
        return FinishedModule(
            base=base_state(module, packed, self._quantized.get(module)),
            mean_square=self.inputs.mean_square(name),
            encoded=encoded,
            residual=residual,
            base_digests={base: self.base_digests[base] for base in bases if base in self.base_digests},
            damage=self._damages.get(name),
            candidates=candidates,
        )

    # what the quantizers' events call

    def gather_inputs(self, modules: Iterable[nn.Linear]) -> None:
        """Add up what the processes saw of modules that are about to be quantized, and divide the work on them."""
        names = {self.names[module]: module for module in modules}
        if self.ranks.size == 1 or not names:
            return
        groups = self.inputs.shared(names, self.ranks)
        owners = self.ranks.divide({name: self._cost([names[one] for one in group]) for name, group in groups.items()})
        self._assigned = {names[one]: owners[name] for name, group in groups.items() for one in group}
        device = torch.device(get_execution_device(next(iter(names.values()))))
        self.inputs.gather(groups, self.ranks, owner=owners.__getitem__, device=device)

    def _cost(self, modules: Sequence[nn.Linear]) -> float:
        """What quantizing and encoding modules costs that share an input; only proportions matter."""
        weights = sum(module.out_features * module.in_features for module in modules)
        in_features = modules[0].in_features
        # error feedback passes every column's error to the others, after factoring their second moment
        return float(in_features * (weights + in_features**2) if self.by_inputs else weights)

    def keep_originals(self, modules: Iterable[nn.Module], *, overwritten: bool) -> None:
        """Keep the weights that are about to be quantized; copies, if the quantizer will overwrite them."""
        with self.ranks.together():
            for module in modules:
                if not isinstance(module, nn.Linear) or not self._is_mine(module):
                    continue
                if module in self.modules or self._measure is not None:
                    weight = module.weight.detach()
                    self._originals[module] = _copy(weight) if overwritten else weight

    def _is_mine(self, module: nn.Module) -> bool:
        return self._assigned.get(module, 0) == self.ranks.rank

    def settle_weights(self) -> None:
        """Put the quantized weights in place of those that the layers after them were calibrated with."""
        if not self._unsettled:
            return
        self.ranks.agree()  # the others, too, have calibrated with the old ones, which may be in shared memory
        for module, weight in self._quantized.items():
            update_offload_parameter(module, "weight", weight)
        self._quantized.clear()
        self.ranks.agree()
        self._spread(self._unsettled)
        self._unsettled = {}

    def _spread(self, owners: dict[nn.Module, int]) -> None:
        """Let every process have the base of modules that one of them quantized."""
        for module, owner in owners.items():
            for name in _BASE_PARAMETERS:
                parameter = getattr(module, name, None)
                if parameter is not None:
                    self.ranks.spread(parameter.data, owner=owner)

    @torch.no_grad()
    def after_quantizing(
        self, modules: Iterable[nn.Linear], quantizer: str, *, overwritten: bool, balance: float | None = None
    ) -> None:
        """Encode what quantizing these modules lost, and release their originals and inputs.

        Args:
            modules: that were quantized, those included that get no residual.
            quantizer: its name, for errors.
            overwritten: whether it changed the weights.
            balance: quantize the modules here first, with error feedback at this balance.

        Raises:
            RecipeError: a module saw no calibration data and needs it, or nothing at all was lost in any: their weights
                were quantized before.
        """
        modules = list(modules)
        lost: dict[str, bool] = {}
        bases: dict[nn.Module, dict[str, Tensor]] = {}
        keeps = self._finished_steps is not None and overwritten
        with self.ranks.together():
            for module in modules:
                if self._is_mine(module):
                    if balance is not None:
                        self._quantize_base(module, balance)
                    if module in self._originals or keeps:
                        base = packed_base(module, self._quantized.get(module))
                        if keeps:
                            bases[module] = base
                        if module in self._originals:
                            something = self._encode_quantized(module, base)
                            if module in self.modules:
                                lost[self.names[module]] = something
                self.inputs.release(self.names[module])
        if balance is not None:
            self._unsettled |= {module: self._assigned.get(module, 0) for module in modules}
            self._spread(self._unsettled)
        self._refuse_if_nothing_lost(self.ranks.merge(lost), quantizer)
        if self._finished_steps is not None and modules:
            self._keep(modules, bases)
        bases.clear()
        give_back()  # or every layer would leave a little more of the heap unused

    def _quantize_base(self, module: nn.Linear, balance: float) -> None:
        """Quantize a weight with error feedback.

        Until the next layer's turn it is `W4 + balance * (W - W4)`: the layers after this one are calibrated on the
        inputs that they will have, which with the residual are nearly the original ones.
        """
        name = self.names[module]
        try:
            quantized = quantize_module(module, self._hessian(name, module), balance)
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
        self._set_weight(module, quantized, balance)

    def _set_weight(self, module: nn.Linear, quantized: Tensor, balance: float | None) -> None:
        """Replace an original weight by the quantized one `[out, in]`; with a balance, by their mixture at first."""
        original = module.weight.detach()
        if balance is None:
            update_offload_parameter(module, "weight", quantized.to(original.dtype))
            return
        self._quantized[module] = quantized.to(original.dtype)
        mixed = quantized.float().lerp(original.float(), balance)
        update_offload_parameter(module, "weight", mixed.to(original.dtype))

    def _encode_quantized(self, module: nn.Linear, packed: dict[str, Tensor]) -> bool:
        """Encode what was lost in a module whose original was kept; False if that is nothing."""
        original = self._originals.pop(module)
        return (self._encode_by_inputs if self.by_inputs else self._encode)(module, original, packed)

    # what saving calls

    @torch.no_grad()
    def compress_remaining(self, parent: Path) -> None:
        """Pack the modules whose weights are still original, and encode what the packing loses."""
        self.reserve(parent)
        if self._finished:
            return
        with self.ranks.together():
            self._finish_storing()
        self._gather_results()
        if self.by_inputs:
            self._refuse_if_not_calibrated()
            if self.budget is not None:
                return  # what is written depends on the saved model's bytes: `settle`
        remaining = [module for module, corrected in self.modules.items() if corrected.name not in self._holders]
        for module in remaining:
            if (
                not hasattr(module, "quantization_scheme")
                or module.quantization_status == QuantizationStatus.COMPRESSED
            ):
                name = self.modules[module].name
                raise RecipeError(f"{name} was not calibrated by the recipe; its residual cannot be computed")
        self._pack(remaining)
        self._write({corrected.name: 0 for corrected in self.modules.values()})
        self._finish()

    def _pack(self, modules: list[nn.Module]) -> None:
        """Pack modules in their place, divided among the processes, and encode what that loses."""
        lost: dict[str, bool] = {}
        errors: list[Exception] = []

        def pack(module: nn.Module) -> None:
            original = getattr(module, "weight").detach()  # noqa: B009 - nn.Module types it as a Tensor
            compress_module(module)
            if original.is_meta or errors:
                return  # another process's; or this run has failed, but the others wait for what they all share
            try:
                name, packed = self.modules[module].name, get_direct_state_dict(module)
                if "weight_packed" not in packed:
                    raise CheckpointError(f"{name} was saved uncompressed before and is not packed any more")
                lost[name] = self._encode(module, original, packed)
                if self.ranks.size > 1:
                    self._finish_storing()  # before the packed weights move to memory that is shared
            except Exception as error:
                if self.ranks.size == 1:
                    raise
                errors.append(error)

        if self.ranks.size == 1:
            for module in modules:
                pack(module)
            self._finish_storing()
        else:
            replace_module_parallel(list(modules), pack)
        self.ranks.agree(errors[0] if errors else None)
        self._refuse_if_nothing_lost(self.ranks.merge(lost), "round-to-nearest")
        self._gather_results()

    def _gather_results(self) -> None:
        """Tell every process what the others have encoded."""
        here = dict.fromkeys(self._encoded, self.ranks.rank)
        self._holders = self.ranks.merge(here)
        self.base_digests = self.ranks.merge(self.base_digests)
        self._damages = self.ranks.merge(self._damages)
        if self._candidates is not None:
            self._candidates.candidates = self.ranks.merge(self._candidates.candidates)
            self._candidates.shapes = self.ranks.merge(self._candidates.shapes)

    def settle(self, directory: Path) -> None:
        """Spend the budget, if there is one, on the model that the first process saved to `directory`.

        Raises:
            ConfigError: the budget is too small for the W4 model, or the divergence out of reach.
        """
        store = self._candidates
        if store is None or self.budget is None or self._finished:
            return
        # in the model's order, whoever encoded them and when
        store.candidates = {c.name: store.candidates[c.name] for c in self.modules.values()}
        chosen: dict[str, int] = {}
        with self.ranks.together():
            if self.ranks.first:
                chosen = allocate(self.budget, store, self._damages, directory)
        chosen = self.ranks.from_first(chosen)
        self.modules = {
            module: replace(corrected, format=store.candidates[corrected.name][chosen[corrected.name]].format)
            for module, corrected in self.modules.items()
            if corrected.name in chosen
        }
        formats = Counter(corrected.format for corrected in self.modules.values())
        if formats:
            self._format = formats.most_common(1)[0][0]
        self._damages |= {name: store.candidates[name][number].sensitivity for name, number in chosen.items()}
        with self.ranks.together():
            if self.ranks.first:
                self._begin_sidecar(keep=False)
        self._write({corrected.name: chosen[corrected.name] for corrected in self.modules.values()})
        self._finish()

    def _write(self, numbers: dict[str, int]) -> None:
        """Let the first process write the residuals that wait on a disk, of each module the one with this number."""
        waiting = self._candidates or self._spool
        formats = {corrected.name: corrected for corrected in self.modules.values()}
        error: Exception | None = None
        for name, number in numbers.items():
            holder = self._holders[name]
            if not self.ranks.first and holder != self.ranks.rank:
                continue
            if holder == 0 and self._candidates is None:
                continue  # written already
            corrected = formats[name]
            entry = ResidualEntry(corrected.module.out_features, corrected.module.in_features, corrected.format)
            layout = entry.layout()
            try:
                encoded = None if holder != self.ranks.rank or waiting is None else waiting.get(name, number, layout)
            except Exception as own:
                error = error or own
                encoded = EncodedResidual(*(torch.empty(shape, dtype=dtype) for dtype, shape in layout.values()))
            if not self.ranks.first:
                assert encoded is not None
                self.ranks.send(list(encoded.tensors().values()))
                continue
            if encoded is None:
                encoded = EncodedResidual(*self.ranks.receive(holder, list(layout.values())))
            try:
                # after an error the others are listened to all the same: they wait to be
                if error is None and self._writer is not None:
                    self._writer.write(name, encoded)
            except Exception as own:
                error = own
        self.ranks.agree(error)

    def _finish(self) -> None:
        with self.ranks.together():
            if self._writer is not None and not self._finished:
                self._writer.finish(self.format)
        self._finished = True

    def sensitivity(self) -> Sensitivity | None:
        """The predicted damage of every quantized module, if it was asked for."""
        if self._output is None:
            return None
        damages = {name: self._damages[name] for name in self.names.values() if name in self._damages}
        return Sensitivity(method=self._output.method, tokens=self._output.tokens, modules=damages)

    def importance(self) -> dict[str, Tensor]:
        """Mean squared input of every quantized module that saw calibration data: float32 `[in_features]`."""
        return self.inputs.mean_squares()

    def files(self) -> list[Path]:
        """The finished files of the sidecar."""
        return sorted(self._sidecar.iterdir())

    def close(self) -> None:
        """Remove what waits on the disk; nothing can be saved afterwards."""
        self._background.shutdown(cancel_futures=True)
        if self._temporary is not None:
            self._temporary.cleanup()
        # a process that was killed left its own behind, on this machine or another
        for folder in self._folders if self.ranks.broken else ():
            shutil.rmtree(folder, ignore_errors=True)

    def _refuse_if_nothing_lost(self, lost: dict[str, bool], quantizer: str) -> None:
        if lost and not any(lost.values()):
            raise RecipeError(
                f"{next(iter(lost))}: {quantizer} lost nothing, its weights were on the 4-bit grid before; "
                "start from the original model, with SRDModifier before the quantizer"
            )

    def _refuse_if_not_calibrated(self) -> None:
        needed = self.modules if self._output is None else self.names
        missing = next((self.names[module] for module in needed if self.names[module] not in self._holders), None)
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
        residual = original.float() - dequantized(packed, module.out_features, module.in_features)
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
            self._candidates.write(name, shape, _stored(corrected, sensitivities[1:]), encoded)
            self._remember_base(name, packed)
        elif corrected is not None:
            self._store_soon(name, encoded[0], packed)
        if sensitivities:
            settled = corrected is not None and not corrected.candidates
            self._damages[name] = sensitivities[1 if settled else 0]
        return bool(residual.any()) or not bool(original.any())

    def _encode(self, module: nn.Module, original: Tensor, packed: dict[str, Tensor]) -> bool:
        """Encode the residual of one module and store it; False if nothing was lost in a weight that is not zero."""
        corrected = self.modules[module]
        name, fmt = corrected.name, corrected.format
        try:
            whole = encode_rounded(original, packed, fmt, key=name, importance=self.inputs.mean_square(name))
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
        self._encoded.add(name)
        self._store_soon(name, whole, packed)
        return bool(whole.scale.any()) or not bool(original.any())

    def _store_soon(self, name: str, encoded: EncodedResidual, packed: dict[str, Tensor]) -> None:
        """Hash and write in the background; at most a few modules wait, so that memory stays bounded."""
        self._storing.append(self._background.submit(self._store, name, encoded, packed))
        while len(self._storing) > _MAX_WAITING:
            self._storing.popleft().result()

    def _store(self, name: str, encoded: EncodedResidual, packed: dict[str, Tensor]) -> None:
        if self._writer is not None:
            self._writer.write(name, encoded)
        else:
            assert self._spool is not None
            self._spool.put(name, [encoded])
        self._remember_base(name, packed)

    def _remember_base(self, name: str, packed: dict[str, Tensor]) -> None:
        for suffix in _BASE_TENSORS:
            if packed.get(suffix) is not None:
                self.base_digests[f"{name}.{suffix}"] = hashlib.sha256(tensor_bytes(packed[suffix])).hexdigest()

    def _finish_storing(self) -> None:
        while self._storing:
            self._storing.popleft().result()


def _stored(corrected: CorrectedModule, sensitivities: Sequence[ModuleSensitivity]) -> list[StoredCandidate]:
    """The candidates of a module with what each leaves."""
    return [StoredCandidate(*pair) for pair in zip(corrected.candidates, sensitivities, strict=True)]


def _copy(weight: Tensor) -> Tensor:
    """A copy that gives its memory back to the system when it is released.

    From the heap, copies that come and go between the quantizer's own large temporaries leave holes that are never
    used again: a third more memory for a model of 135 million weights.
    """
    if weight.device.type != "cpu":
        return weight.clone()
    pages = mmap.mmap(-1, weight.nbytes)
    return torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel()).view(weight.shape).copy_(weight)
