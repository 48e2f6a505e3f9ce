"""Second moments of the inputs of Linear modules: ggml's importance, and what a low-rank correction is weighed by."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.base import Setting
from srd_modifier.selection.depth import layer_of


def mean_squares(setting: Setting) -> dict[str, Tensor]:
    """Mean of `x_i^2` over all calibration tokens in the original model, float32 `[in]` by module.

    Of the decoder layers, and of an output head with a weight of its own: `llama-imatrix` leaves that out unless told
    otherwise, but gains by it.
    """
    return {name: mean.float() for name, mean in _means(setting, lambda x: x.square().sum(0)).items()}


def second_moments(setting: Setting) -> dict[str, Tensor]:
    """Mean of `x x^T` likewise, float64 `[in, in]` by module: all in memory, which small models can afford."""
    return _means(setting, lambda x: x.T @ x)


@torch.no_grad()
def _means(setting: Setting, summed: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean over tokens of what `summed` makes of inputs float64 `[tokens, in]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        more = summed(arguments[0].flatten(0, -2).double())
        sums[name] = sums[name] + more if name in sums else more

    head = None if model.config.tie_word_embeddings else model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (layer_of(name) is not None or module is head):
            module.register_forward_pre_hook(partial(add, name))
    for sample in setting.samples:
        model(input_ids=torch.tensor([sample]), use_cache=False)
    tokens = sum(map(len, setting.samples))
    return {name: total / tokens for name, total in sums.items()}
