"""SRDModifier: the llm-compressor life cycle, and nothing else."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from srd_modifier.checkpoint.config import check_alphas
from srd_modifier.errors import ConfigError, RecipeError
from srd_modifier.modifier.capture import CorrectedModule, ResidualCapture
from srd_modifier.modifier.events import observe
from srd_modifier.modifier.plan import (
    check_no_rival,
    check_scale,
    check_weights,
    corrected_modules,
    find_quantizers,
    quantized_modules,
)
from srd_modifier.modifier.saving import install_save
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.choice import check_choice
from srd_modifier.selection.patterns import pattern_value


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
        (its calibration)        sum squared inputs; keep a layer's originals, encode when it is quantized
        on_finalize              let save_pretrained write the sidecar

    Attributes:
        correct: which quantized modules get a residual: `all`, or one of `{depth: [start, end]}`,
            `{chunks: [...]}`, `{targets: [...]}`.
        alpha: the checkpoint's default dial, 0 (plain W4) to 1 (full correction); loaders can change it.
        layer_alphas: alpha by module name or `re:` pattern; the first match counts.
        residual_bits: 8, 6, 5, 4, 3, 2 or 1.
        residual_group_size: columns per scale of the residual; -1 is one scale per row.
        rounding: `nearest`, `stochastic` or `dithered`.
        density: share of the residual's entries that is kept.
        scale_dtype: of the residual's scales, `bfloat16` or `float32`.
        seed: of the noise of the two random roundings.
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
    # not written to recipe.yaml: a path of this machine
    spool_dir: str | None = Field(None, exclude=True)

    _capture: ResidualCapture | None = PrivateAttr(None)
    _quantizing: bool = PrivateAttr(False)
    _names: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _undo: list[Callable[[], None]] = PrivateAttr(default_factory=list)

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
        return self

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
        if any(_overwrites_weights(quantizer) for quantizer in quantizers):
            check_weights(quantized[name] for name in chosen)
        if self.quantizes_itself:
            super().on_initialize(state, **kwargs)

        self._capture = self._shared_capture(state.model, recipe)
        self._capture.add(
            [
                CorrectedModule(
                    name,
                    quantized[name].module,
                    self.residual_format,
                    pattern_value(name, self.layer_alphas, self.alpha),
                )
                for name in chosen
            ],
            self.residual_format,
            self.alpha,
            self.layer_alphas,
        )
        self._names = {entry.module: name for name, entry in quantized.items()}
        self._undo = [observe(quantizer, self) for quantizer in quantizers]
        logger.info(f"SRD keeps the residual of {len(chosen)} of {len(quantized)} quantized modules")
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Let save_pretrained write the sidecar, once for all SRDModifiers of the recipe."""
        for undo in self._undo:
            undo()
        srd_modifiers = [m for m in active_session().lifecycle.recipe.modifiers if isinstance(m, SRDModifier)]
        if self is srd_modifiers[-1] and self._capture is not None:
            install_save(state.model, self._capture)
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
            super().on_sequential_epoch_end(state, event, modules, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """End calibration, if it quantizes itself."""
        if self.quantizes_itself:
            super().on_calibration_end(state, event, **kwargs)

    # what `observe` calls around the quantizer's events

    def calibration_starts(self, quantizer: Modifier) -> None:
        """Sum the squared inputs of the quantizer's modules; reserve the disk space if weights will be overwritten."""
        assert self._capture is not None
        if _overwrites_weights(quantizer):
            self._capture.reserve(Path(self.spool_dir) if self.spool_dir else None)
        for module, name in self._names.items():
            self.register_hook(module, partial(self._add_inputs, name), "forward_pre")

    def before_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """Keep the originals of a layer that is about to be overwritten."""
        assert self._capture is not None
        self._quantizing = True
        if _overwrites_weights(quantizer):
            self._capture.keep_originals(module for module in modules if module in self._names)

    def after_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """Encode what the quantizer lost in that layer."""
        assert self._capture is not None
        self._quantizing = False
        for module in modules:
            if module in self._names:
                check_scale(self._names[module], module)
        self._capture.encode_overwritten(modules, type(quantizer).__name__)

    def calibration_ends(self, quantizer: Modifier) -> None:
        """Stop summing inputs."""
        self.remove_hooks()

    def _add_inputs(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # AutoRound runs forwards of its own while it quantizes, most of them with weights that are rounded already
        if self._capture is not None and not self._quantizing:
            self._capture.add_inputs(name, inputs[0])

    def _may_correct(self) -> list[str]:
        return sorted(self.resolved_targets) if self.quantizes_itself else list(self.targets)

    def _shared_capture(self, model: nn.Module, recipe: Sequence[Modifier]) -> ResidualCapture:
        """The first SRDModifier's capture: all of a recipe share a sidecar."""
        first = next(modifier for modifier in recipe if isinstance(modifier, SRDModifier))
        return first._capture or ResidualCapture(model)


def _overwrites_weights(quantizer: Modifier) -> bool:
    """Round-to-nearest only sets scales; every other quantizer is taken to change the weights."""
    return type(quantizer) not in (QuantizationModifier, SRDModifier)
