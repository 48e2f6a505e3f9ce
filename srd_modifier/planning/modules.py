"""What a recipe does to the modules of a model without weights, and the tensors that would then be saved."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from srd_modifier.checkpoint.base_writer import Layout, tensor_size
from srd_modifier.errors import RecipeError
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.depth import chunk_of, count_layers

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

HEAD, IGNORED, EMBEDDING, UNTARGETED = "output head", "ignore", "embedding", "not a target"


@dataclass(frozen=True)
class PlannedModule:
    """A module that would be quantized to W4A16.

    Attributes:
        name: in the model.
        shape: `(out_features, in_features)`.
        base: the stored tensors of W4 by suffix: `weight_packed`, `weight_scale`, `weight_shape`, and
            `weight_zero_point` where the scheme is asymmetric.
        residual: the format of its residual; None if it gets none, or if a budget decides.
        chunk: of depth; None outside the decoder layers.
    """

    name: str
    shape: tuple[int, int]
    base: Layout
    residual: ResidualFormat | None
    chunk: str | None

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`, `down_proj`."""
        return self.name.rpartition(".")[-1]

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def base_bytes(self) -> int:
        """Bytes of the tensors of W4."""
        return sum(map(tensor_size, self.base.values()))

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residual's tensors; 0 without one."""
        return 0 if self.residual is None else self.residual.bytes(*self.shape)


@dataclass(frozen=True)
class ModulePlan:
    """What a recipe does to a model.

    Attributes:
        modules: that are quantized, in the model's order.
        skipped: reason by the name of every Linear and Embedding that stays as it is.
        saved: every tensor of the W4A16 model's files.
        buffers: names of those that are no parameters.
        budget: that decides which modules get a residual, if there is one.
        has_residual: whether the recipe writes one.
        alphas: `alpha` and `layer_alphas` of srd_config.
        format: the default format in srd_config.
        calibrates: whether the recipe needs calibration data.
        sensitivity: whether the predicted damage of every module is saved.
        candidates: formats that the budget chooses from.
        gguf: the recipe's own setting for a GGUF file in the same directory; None without one.
    """

    modules: tuple[PlannedModule, ...]
    skipped: Mapping[str, str]
    saved: Layout
    buffers: frozenset[str]
    budget: Budget | None
    has_residual: bool
    alphas: tuple[float, Mapping[str, float]]
    format: ResidualFormat
    calibrates: bool
    sensitivity: bool
    candidates: tuple[ResidualFormat, ...]
    gguf: Any


def plan_modules(model: nn.Module, recipe: "Recipe") -> ModulePlan:
    """Apply a recipe to a model on the meta device, with llm-compressor's own matching and quantization parameters.

    Args:
        model: of `build_skeleton`; it gets the quantization parameters.
        recipe: of `quantizing.load_recipe`.

    Raises:
        RecipeError: what `srd quantize` refuses before it calibrates: other schemes than W4A16, groups that do not
            divide a module, two quantizers for one module, nothing to correct.
        ConfigError: a budget is too small.
    """
    from llmcompressor.modifiers.quantization import QuantizationMixin

    from srd_modifier.modifier import SRDModifier
    from srd_modifier.modifier.plan import (
        check_budget,
        check_feedback_base,
        check_no_rival,
        corrected_modules,
        find_quantizers,
        quantized_modules,
    )

    modifiers = recipe.modifiers
    own = [modifier for modifier in modifiers if isinstance(modifier, SRDModifier)]
    formats: dict[str, ResidualFormat] = {}
    budget = None
    for srd in own:
        quantizers = find_quantizers(srd, modifiers, quantizes_itself=srd.quantizes_itself)
        quantized = quantized_modules(model, quantizers)
        if srd.quantizes_itself:
            check_no_rival(model, srd, quantized, modifiers)
        targets = sorted(srd.resolved_targets) if srd.quantizes_itself else list(srd.targets)
        chosen = corrected_modules(model, quantized, targets=targets, ignore=srd.ignore, correct=srd.correct)
        if srd.base_rounding == "feedback":
            check_feedback_base(quantized)
        if srd.budget is not None:
            if len(own) > 1:
                raise RecipeError("a budget is spent on the whole model; keep one SRDModifier in the recipe")
            check_budget(srd.budget, model, quantized)
            budget = srd.budget
        else:
            formats |= dict.fromkeys(chosen, srd.residual_format)
    # an SRDModifier without a scheme corrects what another quantizes
    quantizers = [
        modifier
        for modifier in modifiers
        if isinstance(modifier, QuantizationMixin) and getattr(modifier, "quantizes_itself", True)
    ]
    if not quantizers:
        raise RecipeError("the recipe has no quantizer, so there is nothing to plan")
    names = quantized_modules(model, quantizers)
    for quantizer in quantizers:
        try:
            quantizer.initialize_quantization(model)
        except ValueError as error:
            raise RecipeError(f"llm-compressor refuses the recipe: {' '.join(str(error).split())}") from error
    layers = count_layers(name for name, _ in model.named_modules())
    modules = tuple(
        PlannedModule(
            name=name,
            shape=(entry.module.out_features, entry.module.in_features),
            base=packed_layout(entry.module),
            residual=formats.get(name),
            chunk=chunk_of(name, layers),
        )
        for name, entry in names.items()
    )
    first = own[0] if own else None
    return ModulePlan(
        modules=modules,
        skipped=_skipped(model, quantizers),
        saved=saved_layout(model),
        buffers=frozenset(name for name, _ in model.named_buffers()),
        budget=budget,
        has_residual=first is not None,
        alphas=(1.0, {}) if first is None else (first.alpha, first.layer_alphas),
        format=ResidualFormat() if first is None else first.residual_format,
        calibrates=any(m.requires_calibration_data for m in modifiers) or any(srd.needs_inputs for srd in own),
        sensitivity=any(srd.sensitivity_method != "off" for srd in own),
        candidates=() if first is None else first.candidate_formats,
        gguf=next((srd.gguf for srd in own if srd.gguf is not None), None),
    )


def packed_layout(module: Any) -> Layout:
    """The stored tensors of a module with quantization parameters, as compressed-tensors packs them, by suffix."""
    weights = module.quantization_scheme.weights
    out_features, in_features = module.weight.shape
    layout: Layout = {}
    for suffix, tensor in direct_tensors(module).items():
        if suffix in ("weight", "bias"):
            continue
        if suffix == "weight_zero_point":
            if not weights.symmetric:
                # eight to a word, along the rows
                layout[suffix] = (torch.int32, (_words(out_features, weights.num_bits), tensor.shape[1]))
            continue
        layout[suffix] = (tensor.dtype, tuple(tensor.shape))
    layout["weight_packed"] = (torch.int32, (out_features, _words(in_features, weights.num_bits)))
    layout["weight_shape"] = (torch.int64, (2,))
    return layout


def saved_layout(model: nn.Module) -> Layout:
    """Every tensor that `save_pretrained` writes; one that is tied to another is written once.

    Args:
        model: with quantization parameters; on any device, the meta device too.
    """
    return {tensor: place for _, _, layout in saved_by_module(model) for tensor, place in layout.items()}


def saved_by_module(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    """Every module that has tensors, with its name and those of its tensors that are saved.

    Of a tied tensor the module that comes first has it, so that another one may have none left.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        tensors = direct_tensors(module)
        if not tensors:
            continue
        prefix = f"{name}." if name else ""
        packed = is_packed(module)
        layout: Layout = {}
        if packed:
            layout |= {prefix + suffix: place for suffix, place in packed_layout(module).items()}
        for suffix, tensor in tensors.items():
            if id(tensor) not in seen and (suffix == "bias" or not packed):
                seen.add(id(tensor))
                layout[prefix + suffix] = (tensor.dtype, tuple(tensor.shape))
        yield name, module, layout


def is_packed(module: nn.Module) -> bool:
    """Whether a module's weight is saved quantized."""
    return getattr(module, "quantization_scheme", None) is not None


def direct_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and the buffers that are saved."""
    buffers = {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    own = {**module._parameters, **buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _skipped(model: nn.Module, quantizers: list[Any]) -> dict[str, str]:
    """Why each Linear and Embedding that has no scheme has none."""
    from compressed_tensors.utils import is_match

    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or is_packed(module):
            continue
        if module is head:
            skipped[name] = HEAD
        elif any(is_match(name, module, pattern) for quantizer in quantizers for pattern in quantizer.ignore):
            skipped[name] = IGNORED
        else:
            skipped[name] = EMBEDDING if isinstance(module, nn.Embedding) else UNTARGETED
    return skipped


def _words(count: int, bits: int) -> int:
    return math.ceil(count * bits / 32)
