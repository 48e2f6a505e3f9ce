"""A packed model made dense: W4 plus residual where there is one, W4 elsewhere."""

from typing import Any

import torch
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.offload import OffloadCache, from_accelerate
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict
from torch import nn

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.transformers.weights import find_module, find_stack, find_weight, store_weight

_BASE_STATE = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@torch.no_grad()
def make_dense(model: nn.Module, sidecar: Sidecar, alphas: dict[str, float]) -> bool:
    """Give every packed module its dense weight, in place, and take the quantization off it.

    Args:
        model: as Transformers leaves it after reading the weights.
        sidecar: of the same checkpoint.
        alphas: alpha of every corrected module.

    Returns:
        True if nothing quantized is left in the model.
    """
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        from_accelerate(model)  # weights that accelerate has offloaded can be replaced only after this
    _correct(model, sidecar, alphas)
    return _dequantize_others(model)


def _correct(model: nn.Module, sidecar: Sidecar, alphas: dict[str, float]) -> None:
    """Give every corrected module its dense weight, computed on its own device, in its own dtype."""
    _correct_stacks(model, sidecar, alphas)
    for name, alpha in alphas.items():
        module = find_module(model, name)
        if module is None:
            find_weight(model, name)  # a stacked expert, or an error
            continue
        state = get_direct_state_dict(module)
        scale = state["weight_scale"]
        weight = sidecar.correct(name, alpha, scale.dtype, scale.device)
        _make_plain_linear(module, {**_without_base(state), "weight": weight})


def _correct_stacks(model: nn.Module, sidecar: Sidecar, alphas: dict[str, float]) -> None:
    """Correct experts, of which Transformers has made slices of a dense parameter already.

    It gives the parameter the dtype of the scales, whatever dtype was asked for; then all of its experts are computed
    again, because what they had was rounded.
    """
    dtype: Any = getattr(model.config, "dtype", None) or model.dtype
    stacks: dict[tuple[nn.Module, str], list[str]] = {}
    for name in sidecar.base.quantized_modules:
        stack = find_stack(model, name)
        if stack is not None:
            stacks.setdefault(stack, []).append(name)
    for (module, parameter), names in stacks.items():
        whole = getattr(module, parameter)
        rounded = whole.dtype != dtype
        if rounded:
            module.register_parameter(parameter, nn.Parameter(whole.to(dtype), requires_grad=whole.requires_grad))
        for name in names if rounded else alphas.keys() & names:
            store_weight(model, name, sidecar.correct(name, alphas.get(name, 0.0), dtype, whole.device))


def _dequantize_others(model: nn.Module) -> bool:
    """Make the packed modules without a residual dense too; True if nothing quantized is left."""
    plain = True
    for module in [module for module in model.modules() if is_module_quantized(module)]:
        scheme: Any = module.quantization_scheme
        decompress_module(module)
        if scheme.input_activations is None and scheme.output_activations is None and isinstance(module, nn.Linear):
            _make_plain_linear(module, _without_base(get_direct_state_dict(module)))
        else:
            plain = False  # quantized activations go on being emulated
    return plain


def _make_plain_linear(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    replace_direct_state_dict(module, state)
    module.requires_grad_(True)  # as the parameters of any dense model that Transformers loads
    for attribute in ("quantization_scheme", "quantization_status", "quantization_enabled"):
        if attribute in vars(module):
            delattr(module, attribute)
    if "forward" in vars(module) and not isinstance(module._parameters, OffloadCache):
        # the emulation of quantized inference; an offloaded module's forward also moves its weights
        del module.forward


def _without_base(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in _BASE_STATE}
