"""SRDModifier: the llm-compressor life cycle, and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from srd_modifier.checkpoint.config import check_alphas
from srd_modifier.distributed import Ranks
from srd_modifier.errors import ConfigError, RecipeError
from srd_modifier.modifier.candidates import DEFAULT_CANDIDATES
from srd_modifier.modifier.capture import CorrectedModule, ResidualCapture
from srd_modifier.modifier.companion import CompanionFile, every_batch
from srd_modifier.modifier.events import observe
from srd_modifier.modifier.finished import FinishedStep, FinishedSteps
from srd_modifier.modifier.plan import (
    QuantizedModule,
    check_budget,
    check_feedback_base,
    check_no_rival,
    check_parts,
    check_scale,
    check_weights,
    corrected_modules,
    find_quantizers,
    quantized_modules,
)
from srd_modifier.modifier.saving import install_save
from srd_modifier.residual import ResidualFormat
from srd_modifier.residual.calibrated import DEFAULT_BALANCE, check_balance
from srd_modifier.resuming.workplace import Workplace
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.choice import budget_of, check_choice
from srd_modifier.selection.patterns import pattern_value
from srd_modifier.selection.sensitivity import METHODS, OutputSensitivity, output_sensitivity

_BASE_ROUNDINGS = ("nearest", "feedback")
_SENSITIVITIES = ("off", *METHODS)


class SRDModifier(QuantizationModifier):
    """Keeps what W4A16 quantization loses, as an integer residual beside the checkpoint.

    With `scheme` or `config_groups` it quantizes by itself (round-to-nearest, or the observer that is set). With
    neither, it keeps the residual of the quantizer that follows it in the recipe: GPTQModifier, AutoRoundModifier, or
    AWQModifier with a quantizer after it. It then stands after the transforms and before the quantizer:

        quant_stage:
          quant_modifiers:
            SRDModifier:
              correct: {depth: [0.40, 0.77]}
            GPTQModifier:
              scheme: W4A16
              targets: [Linear]
              ignore: [lm_head]

    Life cycle:
        on_initialize            find the modules, refuse what cannot work, watch the quantizer
        (its calibration)        measure the sensitivity; sum the inputs; keep a layer's originals, encode when it is
                                 quantized
        on_finalize              let save_pretrained spend the budget and write the sidecar

    Attributes:
        correct: which quantized modules get a residual: `all`, or one of `{depth: [start, end]}`,
            `{chunks: [...]}`, `{targets: [...]}`; or what it may cost: `{budget: 13MB}` or `{budget: 5.5bpw}` of the
            whole model, or what may be lost: `{max_divergence: 1e-3}`. Width and density of each module's residual
            are then chosen by its predicted damage.
        alpha: the checkpoint's default dial, 0 (plain W4) to 1 (full correction); loaders can change it.
        layer_alphas: alpha by module name or `re:` pattern; the first match counts.
        residual_bits: 8, 6, 5, 4, 3, 2 or 1.
        residual_group_size: columns per scale of the residual; -1 is one scale per row.
        rounding: `nearest`, `stochastic`, `dithered`, or `feedback`: chosen under the layer's inputs, which takes
            calibration data and pays at 6 bits and fewer. A budget always takes feedback.
        density: share of the residual's entries that is kept.
        scale_dtype: of the residual's scales, `bfloat16` or `float32`.
        seed: of the noise of the two random roundings, and of the sensitivity's sampled labels.
        base_rounding: of W4 where SRDModifier quantizes by itself: `nearest`, or `feedback`.
        balance: with `base_rounding: feedback`, 0 (best at alpha 0) to 1 (best with the residual).
        sensitivity: how the damage of each module is predicted: `off`, `gradient`, `forward` (no backward pass, less
            exact), or `auto`, the first of these two that fits the memory. None is `auto` with a budget, else `off`.
        sensitivity_tokens: calibration tokens that it reads.
        candidates: formats that a budget chooses from, as mappings of `bits`, `group_size`, `density` and
            `scale_dtype`; by default those of `candidates.DEFAULT_CANDIDATES`.
        gguf: also write a GGUF file of the original model into the checkpoint's directory, calibrated on the recipe's
            data: a type such as `Q4_K_M`, or `{type: Q4_K_M, budget: 4.85bpw}`.
        spool_dir: where residuals wait until the model is saved; the system's temporary directory by default.
            Not used when SRDModifier quantizes by round-to-nearest.
        targets, ignore: without a scheme, which of the quantized modules may be corrected.
    """

    correct: Any = "all"
    alpha: float = 1.0
    layer_alphas: dict[str, float] = Field(default_factory=dict)
    residual_bits: int = 8
    residual_group_size: int = 64
    rounding: str = "nearest"
    density: float = 1.0
    scale_dtype: str = "bfloat16"
    seed: int = 0
    base_rounding: str = "nearest"
    balance: float = DEFAULT_BALANCE
    sensitivity: str | None = None
    sensitivity_tokens: int = 8192
    candidates: list[dict[str, Any]] | None = None
    gguf: Any = None
    # not written to recipe.yaml: a path of this machine
    spool_dir: str | None = Field(None, exclude=True)

    _capture: ResidualCapture | None = PrivateAttr(None)
    _finished: FinishedSteps | None = PrivateAttr(None)
    _quantizing: bool = PrivateAttr(False)
    _quantized: dict[nn.Module, QuantizedModule] = PrivateAttr(default_factory=dict)
    _model: nn.Module | None = PrivateAttr(None)
    _calibration: Any = PrivateAttr(None)
    _write_companion: Callable[[Path], None] | None = PrivateAttr(None)
    _undo: list[Callable[[], None]] = PrivateAttr(default_factory=list)

    @field_validator("sensitivity", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        """YAML reads `off` as false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _check_settings(self) -> "SRDModifier":
        check_choice(self.correct)
        check_alphas(self.alpha, self.layer_alphas)
        try:
            self.residual_format  # noqa: B018 - building it checks it
        except ConfigError as error:
            # two of its fields have other names here
            own = "residual_" if str(error).startswith(("bits is", "group_size is")) else ""
            raise ConfigError(f"{own}{error}") from None
        self._check_calibrated_settings()
        CompanionFile.parse(self.gguf)
        # with another quantizer it is that one's calibration that is watched
        if self.quantizes_itself and self.needs_inputs:
            self.requires_calibration_data = True
        return self

    def _check_calibrated_settings(self) -> None:
        check_balance(self.balance)
        if self.base_rounding not in _BASE_ROUNDINGS:
            raise ConfigError(f"base_rounding is {self.base_rounding!r}, expected one of {_BASE_ROUNDINGS}")
        if self.base_rounding != "nearest" and not self.quantizes_itself:
            raise ConfigError(
                "base_rounding is set, but the quantizer that follows SRDModifier rounds; give SRDModifier a scheme, "
                "or leave base_rounding out"
            )
        if self.sensitivity is not None and self.sensitivity not in _SENSITIVITIES:
            raise ConfigError(f"sensitivity is {self.sensitivity!r}, expected one of {_SENSITIVITIES}")
        if type(self.sensitivity_tokens) is not int or self.sensitivity_tokens < 1:
            raise ConfigError(f"sensitivity_tokens is {self.sensitivity_tokens!r}, expected a whole number above 0")
        if self.budget is not None and self.sensitivity == "off":
            raise ConfigError("sensitivity is 'off', but a budget is spent by it; leave it out, or choose another")
        if self.budget is not None:
            for name in ("residual_bits", "residual_group_size", "density", "scale_dtype"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, but a budget chooses it; set candidates instead"
                    )
            if self.rounding not in ("nearest", "feedback"):
                raise ConfigError(f"rounding is {self.rounding!r}, but a budget takes feedback; leave it out")
        if self.budget is None and self.candidates is not None:
            raise ConfigError("candidates are what a budget chooses from; set correct to a budget, or leave them out")
        self.candidate_formats  # noqa: B018 - building them checks them

    @property
    def budget(self) -> Budget | None:
        """The budget that decides what is corrected, if there is one."""
        return budget_of(self.correct)

    @property
    def sensitivity_method(self) -> str:
        """`sensitivity` with its default resolved."""
        return self.sensitivity or ("off" if self.budget is None else "auto")

    @property
    def needs_inputs(self) -> bool:
        """Whether residual or base depend on the second moment of the layers' inputs."""
        return "feedback" in (self.rounding, self.base_rounding) or self.sensitivity_method != "off"

    @property
    def candidate_formats(self) -> tuple[ResidualFormat, ...]:
        """What the budget chooses from; empty without one."""
        if self.budget is None:
            return ()
        if self.candidates is None:
            return DEFAULT_CANDIDATES
        if not self.candidates:
            raise ConfigError("candidates is empty, expected at least one format")
        known = ("bits", "group_size", "density", "scale_dtype")
        formats = []
        for position, candidate in enumerate(self.candidates):
            unknown = sorted(set(candidate) - set(known))
            if unknown:
                raise ConfigError(f"candidates[{position}] has {unknown[0]!r}, expected only {known}")
            try:
                formats.append(ResidualFormat(**candidate, rounding="feedback"))
            except ConfigError as error:
                raise ConfigError(f"candidates[{position}].{error}") from None
        return tuple(formats)

    @property
    def residual_format(self) -> ResidualFormat:
        """The settings of the residual as the mathematics takes them."""
        return ResidualFormat(
            bits=self.residual_bits,
            group_size=self.residual_group_size,
            rounding=self.rounding,
            density=self.density,
            scale_dtype=self.scale_dtype,
            seed=self.seed,
        )

    @property
    def quantizes_itself(self) -> bool:
        """Whether this modifier quantizes, instead of the one that follows it."""
        return self.scheme is not None or self.config_groups is not None

    def resume_in(self, place: Workplace[FinishedStep]) -> None:
        """Keep on the disk what calibration finishes, and go on behind what is there; for one process, before it runs.

        Args:
            place: for the first SRDModifier of the recipe; its steps were done by the same task.
        """
        self._finished = FinishedSteps(place)

    def is_idle(self, modules: Iterable[nn.Module]) -> bool:
        """Whether calibration is resumed, and none of these modules is still to be calibrated."""
        return self._capture is not None and self._capture.is_idle(modules)

    # life cycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the modules, refuse what cannot work, watch the quantizer."""
        recipe = active_session().lifecycle.recipe.modifiers
        quantizers = find_quantizers(self, recipe, quantizes_itself=self.quantizes_itself)
        quantized = quantized_modules(state.model, quantizers)
        if self.quantizes_itself:
            check_no_rival(state.model, self, quantized, recipe)
        if self.spool_dir and not Path(self.spool_dir).is_dir():
            raise RecipeError(f"spool_dir {self.spool_dir} is not a directory")
        chosen = corrected_modules(
            state.model, quantized, targets=self._may_correct(), ignore=self.ignore, correct=self.correct
        )
        if self.base_rounding == "feedback":
            check_feedback_base(quantized)
        if self.needs_inputs and state.data.calib is None:
            raise RecipeError(
                "SRDModifier needs calibration data for feedback, sensitivity and budgets; give oneshot a dataset"
            )
        companion = CompanionFile.parse(self.gguf)
        if companion is not None:
            if state.data.calib is None:
                raise RecipeError("gguf is calibrated on the recipe's data; give oneshot a dataset, or leave it out")
            original_model = companion.check(state.model)
        if any(_overwrites_weights(quantizer) for quantizer in quantizers):
            check_weights(quantized[name] for name in chosen)
        if self.quantizes_itself:
            super().on_initialize(state, **kwargs)

        self._capture = self._shared_capture(state, recipe)
        if companion is not None:
            batches = every_batch(state.data.calib, self._capture.ranks)
            self._write_companion = partial(companion.write, original_model, batches)
        self._capture.inputs.second_moments |= self.needs_inputs
        if self.needs_inputs:
            # round-to-nearest would get no data; all SRDModifiers share one sidecar, whose residuals then need inputs
            own = [m for m in recipe if isinstance(m, SRDModifier) and m.quantizes_itself]
            for modifier in [*quantizers, *own]:
                modifier.requires_calibration_data = True
        if self.budget is not None:
            if sum(isinstance(modifier, SRDModifier) for modifier in recipe) > 1:
                raise RecipeError("a budget is spent on the whole model; keep one SRDModifier in the recipe")
            check_budget(self.budget, state.model, quantized)
            self._capture.budget = self.budget
        self._model, self._calibration = state.model, state.data.calib
        self._capture.add(
            [
                CorrectedModule(
                    name,
                    quantized[name].module,
                    self.residual_format,
                    pattern_value(name, self.layer_alphas, self.alpha),
                    self.candidate_formats,
                )
                for name in chosen
            ],
            self.residual_format,
            self.alpha,
            self.layer_alphas,
        )
        self._quantized = {entry.module: entry for entry in quantized.values()}
        self._capture.plan_damage({entry.module: name for name, entry in quantized.items()}, self._sensitivity_of)
        self._undo = [observe(quantizer, self) for quantizer in quantizers]
        logger.info(f"SRD keeps the residual of {len(chosen)} of {len(quantized)} quantized modules")
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Let save_pretrained write the sidecar, once for all SRDModifiers of the recipe."""
        for undo in self._undo:
            undo()
        self._model = self._calibration = None
        srd_modifiers = [m for m in active_session().lifecycle.recipe.modifiers if isinstance(m, SRDModifier)]
        if self is srd_modifiers[-1] and self._capture is not None:
            companions = [m._write_companion for m in srd_modifiers if m._write_companion is not None]
            install_save(state.model, self._capture, companions, self._capture.ranks)
        return True

    def close(self) -> None:
        """Remove the residuals that wait on the disk: the model is saved, or never will be."""
        if self._capture is not None:
            self._capture.close()

    # without a scheme its own epoch has nothing to do: the quantizer's events, observed, do the work

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin calibration, if it quantizes itself."""
        if self.quantizes_itself:
            super().on_calibration_start(state, event, **kwargs)

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any) -> None:
        """Set the scales, if it quantizes itself."""
        if self.quantizes_itself:
            # upstream sets the scales of every module with a scheme, those of another SRDModifier too
            theirs = self._capture.names.keys() - self._quantized.keys() if self._capture is not None else set()
            own = [module for module in modules if module not in theirs]
            super().on_sequential_epoch_end(state, event, own, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """End calibration, if it quantizes itself."""
        if self.quantizes_itself:
            super().on_calibration_end(state, event, **kwargs)

    # what `observe` calls around the quantizer's events

    def calibration_starts(self, quantizer: Modifier) -> None:
        """Measure the sensitivity, sum the inputs of the quantizer's modules, reserve the disk space if need be."""
        assert self._capture is not None
        self._capture.check_data(self._calibration)
        self._capture.measure_damage()
        if _overwrites_weights(quantizer) or self._capture.by_inputs or self._capture.is_kept:
            self._capture.reserve(Path(self.spool_dir) if self.spool_dir else None)
        self._capture.find_finished()
        for module in self._capture.watch(self._own(quantizer, self._quantized)):
            if not self.is_finished(module):
                self.register_hook(module, partial(self._add_inputs, self._quantized[module].name), "forward_pre")

    def is_finished(self, module: nn.Module) -> bool:
        """Whether a killed calibration has quantized a module, which is put back instead."""
        return self._capture is not None and self._capture.is_finished(module)

    def restore(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Put finished modules back, and return the others."""
        assert self._capture is not None
        self._capture.settle_weights()
        own = self._own(quantizer, modules)
        restored = set(own) if self._capture.restore(own, balance=self._balance(quantizer)) else set()
        return [module for module in modules if module not in restored]

    def before_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """Keep the originals of a layer that is about to be overwritten."""
        assert self._capture is not None
        self._quantizing = True
        own = self._own(quantizer, modules)
        self._capture.gather_inputs(own)
        overwritten = _overwrites_weights(quantizer)
        if overwritten or self._capture.by_inputs:
            self._capture.keep_originals(own, overwritten=overwritten)

    def after_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """Encode what the quantizer lost in that layer."""
        assert self._capture is not None
        self._quantizing = False
        own = self._own(quantizer, modules)
        self._capture.ranks.agree()  # what other processes have quantized is in its place
        with self._capture.ranks.together():
            for module in own:
                check_scale(self._quantized[module].name, module)
        self._capture.after_quantizing(
            own,
            type(quantizer).__name__,
            overwritten=_overwrites_weights(quantizer),
            balance=self._balance(quantizer),
        )

    def calibration_ends(self, quantizer: Modifier) -> None:
        """Stop summing inputs."""
        assert self._capture is not None
        self._capture.settle_weights()
        self._capture.unwatch(self._own(quantizer, self._quantized))
        self.remove_hooks()

    def _add_inputs(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # AutoRound runs forwards of its own while it quantizes, most of them with weights that are rounded already
        if self._capture is not None and not self._quantizing:
            self._capture.inputs.add(name, inputs[0])

    @property
    def _sensitivity_of(self) -> Callable[[dict[str, nn.Linear]], OutputSensitivity] | None:
        """What measures the sensitivity of modules by this modifier's settings; None if it is off."""
        return None if self.sensitivity_method == "off" else self._measure_sensitivity

    def _measure_sensitivity(self, modules: dict[str, nn.Linear]) -> OutputSensitivity:
        assert self._model is not None
        assert self._capture is not None
        with DisableQuantization(self._model):
            output = output_sensitivity(
                self._model,
                self._calibration,
                modules,
                tokens=self.sensitivity_tokens,
                seed=self.seed,
                method=self.sensitivity_method,
                ranks=self._capture.ranks,
            )
        logger.info(
            f"SRD measured the sensitivity of {len(modules)} modules on {output.tokens:,} tokens: {output.method}"
        )
        return output

    def _own(self, quantizer: Modifier, modules: Iterable[nn.Module]) -> list[nn.Linear]:
        """Those of the modules that this quantizer quantizes; another one may follow it in the recipe."""
        found = (self._quantized.get(module) for module in modules)
        return [entry.module for entry in found if entry is not None and entry.quantizer is quantizer]

    def _balance(self, quantizer: Modifier) -> float | None:
        """That of error feedback where this modifier quantizes by it."""
        return self.balance if quantizer is self and self.base_rounding == "feedback" else None

    def _may_correct(self) -> list[str]:
        return sorted(self.resolved_targets) if self.quantizes_itself else list(self.targets)

    def _shared_capture(self, state: State, recipe: Sequence[Modifier]) -> ResidualCapture:
        """The first SRDModifier's capture: all of a recipe share a sidecar."""
        first = next(modifier for modifier in recipe if isinstance(modifier, SRDModifier))
        if first._capture is not None:
            return first._capture
        ranks = Ranks.current()
        check_parts(state.data.calib, ranks)
        return ResidualCapture(state.model, ranks, first._finished)


def _overwrites_weights(quantizer: Modifier) -> bool:
    """Round-to-nearest only sets scales; every other quantizer is taken to change the weights."""
    if isinstance(quantizer, SRDModifier):
        return quantizer.base_rounding == "feedback"
    return type(quantizer) is not QuantizationModifier
