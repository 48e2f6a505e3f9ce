"""Which modules a recipe corrects, and every reason to refuse it before calibration runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from loguru import logger
from torch import nn

from srd_modifier.distributed import Ranks
from srd_modifier.errors import ConfigError, RecipeError
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.choice import Choice, choose

_STRATEGIES = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class QuantizedModule:
    """A Linear that the recipe quantizes to W4A16."""

    name: str
    module: nn.Linear
    quantizer: Modifier


def find_quantizers(srd: Modifier, recipe: Sequence[Modifier], *, quantizes_itself: bool) -> list[Modifier]:
    """The modifiers whose rounding `srd` makes good: itself, or the quantizers after it.

    Raises:
        RecipeError: there is none, or one stands before `srd`, which would then see quantized weights and find
            nothing lost.
    """
    if quantizes_itself:
        return [srd]
    others = [
        modifier for modifier in recipe if isinstance(modifier, QuantizationMixin) and type(modifier) is not type(srd)
    ]
    position = recipe.index(srd)
    before = [modifier for modifier in others if recipe.index(modifier) < position]
    if before:
        raise RecipeError(
            f"SRDModifier stands after {type(before[0]).__name__} in the recipe and would see weights that are already "
            "quantized; put it before the quantizer (and after transforms such as AWQ or SmoothQuant)"
        )
    if not others:
        raise RecipeError(
            "SRDModifier has neither a scheme nor config_groups and no quantizer stands after it in the recipe; "
            "give it scheme: W4A16, or add for example a GPTQModifier"
        )
    return others


def quantized_modules(model: nn.Module, quantizers: Iterable[Modifier]) -> dict[str, QuantizedModule]:
    """Every Linear that the quantizers will quantize, by name, in the model's order.

    Raises:
        RecipeError: a scheme is not 4-bit integer weight-only, two quantizers take the same module, or the architecture
            would save one under another name.
    """
    found: dict[str, QuantizedModule] = {}
    skipped: list[str] = []
    for quantizer in quantizers:
        taken = {}
        for scheme in quantizer.resolved_config.config_groups.values():
            for name, module in match_named_modules(model, scheme.targets, quantizer.ignore):
                if not isinstance(module, nn.Linear | nn.Embedding):
                    continue  # patterns match containers too; upstream quantizes these two only
                taken[name] = module
                _check_scheme(name, module, scheme, quantizer)
        for name, module in taken.items():
            if name in found:
                first = type(found[name].quantizer).__name__
                raise RecipeError(f"{name} is quantized twice, by {first} and {type(quantizer).__name__}; keep one")
            if isinstance(module, nn.Linear) and module is not _output_embeddings(model):
                found[name] = QuantizedModule(name, module, quantizer)
            else:
                skipped.append(name)
    if skipped:
        logger.warning(
            f"SRD does not correct the embeddings or the output head, although they are quantized: {skipped}"
        )
    _check_saved_names(model, found)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def check_no_rival(model: nn.Module, srd: Modifier, quantized: Iterable[str], recipe: Iterable[Modifier]) -> None:
    """Raise RecipeError if `srd`, which quantizes these modules itself, is not the only one to quantize them."""
    names = set(quantized)
    for other in recipe:
        if not isinstance(other, QuantizationMixin) or type(other) is type(srd):
            continue
        for name, _ in match_named_modules(model, other.resolved_targets, other.ignore):
            if name in names:
                raise RecipeError(
                    f"{name} is quantized twice, by SRDModifier and {type(other).__name__}; keep one, or take scheme "
                    "and config_groups away from SRDModifier, which then corrects the other"
                )


def corrected_modules(
    model: nn.Module,
    quantized: Mapping[str, QuantizedModule],
    *,
    targets: Iterable[str],
    ignore: Iterable[str],
    correct: Choice,
) -> list[str]:
    """The quantized modules that get a residual.

    Raises:
        RecipeError: targets and ignore leave nothing.
        ConfigError: the `correct` setting takes nothing.
    """
    allowed = {name for name, _ in match_named_modules(model, targets, ignore)}
    names = [name for name in quantized if name in allowed]
    if not names:
        raise RecipeError(
            f"no module is left to correct: the recipe quantizes {len(quantized)} Linear modules, "
            f"SRDModifier's targets {list(targets)} and ignore {list(ignore)} leave none of them"
        )
    left_out = [name for name in quantized if name not in allowed]
    if left_out:
        logger.warning(
            f"SRD leaves {len(left_out)} quantized modules as plain W4 (targets, ignore): {shortened(left_out)}"
        )
    return choose(names, correct, model_names=[name for name, _ in model.named_modules()])


@torch.no_grad()
def check_weights(modules: Iterable[QuantizedModule]) -> None:
    """Raise RecipeError for the first weight with NaN or infinite entries."""
    for quantized in modules:
        # the extremes are NaN if any entry is: one pass, no mask the size of the weight
        extremes = torch.stack(torch.aminmax(quantized.module.weight))
        if not bool(torch.isfinite(extremes).all()):
            raise RecipeError(f"{quantized.name}.weight has NaN or infinite entries; the model cannot be quantized")


def check_scale(name: str, module: nn.Module) -> None:
    """Raise RecipeError if a module's scales are not finite, as they are not if its weight is not.

    Round-to-nearest has read the weight for its scales; reading it once more, before, would cost as much again.
    """
    scale = getattr(module, "weight_scale", None)
    if scale is not None and not bool(torch.isfinite(scale).all()):
        raise RecipeError(f"{name}.weight has NaN or infinite entries; the model cannot be quantized")


def check_feedback_base(quantized: Mapping[str, QuantizedModule]) -> None:
    """Raise RecipeError for a scheme that base_rounding: feedback does not know."""
    for name, entry in quantized.items():
        scheme = entry.quantizer.resolved_config.config_groups
        for group in scheme.values():
            if group.weights.actorder == ActivationOrdering.GROUP:
                raise RecipeError(
                    f"{name}: base_rounding: feedback keeps groups of neighbouring columns; take actorder: group away"
                )


def check_parts(loader: Any, ranks: Ranks) -> None:
    """Raise RecipeError if the processes would all calibrate on the same part of a data set.

    Where all processes have the same data set, llm-compressor 0.14.0.1 gives each a sampler over its part but a loader
    over the whole: all of them read the first part, and nobody the others.

    Args:
        loader: of the recipe's data, or None.
        ranks: the processes.
    """
    if ranks.size == 1 or loader is None:
        return
    whole: Any = getattr(loader, "dataset", None)
    part: Any = getattr(getattr(loader, "sampler", None), "data_source", whole)
    misread = part is not whole and len(part) < len(whole)
    if any(ranks.gather(misread)):
        raise RecipeError(
            f"this llm-compressor lets all {ranks.size} processes calibrate on the first part of the data set; give "
            "each its own: oneshot(dataset=srd_modifier.distributed.own_part(dataset), ...)"
        )


def check_budget(budget: Budget, model: nn.Module, quantized: Mapping[str, QuantizedModule]) -> None:
    """Raise ConfigError for a budget that the W4 model alone exceeds, as far as its scheme tells before it is made.

    Raises:
        ConfigError: with the smallest possible.
    """
    weights = sum(entry.module.weight.numel() for entry in quantized.values())
    w4_bytes = weights // 2
    if budget.bits_per_weight is not None and budget.bits_per_weight < 8 * w4_bytes / weights:
        raise ConfigError(f"budget {budget} is too small: the W4 codes alone take 4 bits per weight")
    if budget.bytes is not None:
        others = {id(parameter): parameter.nbytes for parameter in model.parameters()}
        for entry in quantized.values():
            others.pop(id(entry.module.weight), None)
        smallest = w4_bytes + sum(others.values())
        if budget.bytes < smallest:
            raise ConfigError(f"budget {budget} is too small: the W4 model alone takes more than {smallest:,} bytes")


def shortened(names: Sequence[str]) -> str:
    """The first few names and how many follow."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _check_scheme(name: str, module: nn.Module, scheme: QuantizationScheme, quantizer: Modifier) -> None:
    weights = scheme.weights
    in_features = getattr(module, "in_features", 0)
    if weights is None or weights.num_bits != 4 or weights.type != QuantizationType.INT:
        found = "no weight quantization" if weights is None else f"{weights.num_bits}-bit {weights.type} weights"
        problem = f"{found}, expected 4-bit int"
    elif scheme.input_activations is not None or scheme.output_activations is not None:
        problem = "quantized activations, expected weights only"
    elif weights.strategy not in _STRATEGIES:
        problem = f"{weights.strategy} scales, expected group or channel"
    elif weights.group_size and weights.group_size > 0 and in_features % weights.group_size:
        raise RecipeError(
            f"{name} has {in_features} input features, which groups of {weights.group_size} do not divide; "
            f"add it to the ignore list of {type(quantizer).__name__}, or choose another group_size"
        )
    else:
        return
    raise RecipeError(f"{type(quantizer).__name__} gives {name} {problem}; SRD corrects W4A16 (scheme: W4A16)")


def _check_saved_names(model: nn.Module, names: Iterable[str]) -> None:
    """Raise RecipeError for the first module that Transformers renames when it saves the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = getattr(model, "_weight_conversions", None)  # those that loading has used
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry.reverse_transform() for entry in reversed(conversions) if isinstance(entry, WeightRenaming)]
    for name in names:
        saved = rename_source_key(f"{name}.weight_packed", renamings, [], reverse=True)[0].removesuffix(
            ".weight_packed"
        )
        if saved != name:
            raise RecipeError(
                f"{type(model).__name__} saves {name} as {saved}, which residuals do not follow and Transformers may "
                "not read back; leave such modules out with ignore (docs/upstream.md)"
            )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings is not None else None
