"""The experts of a mixture during calibration: what they are shown, and what the router sends them.

llm-compressor shows every token to every expert while it calibrates, so that rarely used ones see data too. Their sums
over inputs are then those of all tokens, but only the tokens that the router sends to an expert bring its errors into
the output. A trained expert answers louder to these: the inputs of its `down_proj` are larger than for all tokens.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")

# where llm-compressor 0.14 keeps the switch that oneshot's `moe_calibrate_all_experts` sets
_CONTEXT, _SWITCH = "llmcompressor.modeling.moe.context", "_CALIBRATE_ALL_EXPERTS"


def is_expert(name: str) -> bool:
    """Whether a module belongs to an expert that the router chooses; a shared expert is not one of them."""
    return _EXPERT.search(name) is not None


def experts_among(modules: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those of the modules that belong to an expert."""
    return {name: module for name, module in modules.items() if is_expert(name)}


@contextmanager
def routed_tokens_only() -> Iterator[None]:
    """For the duration every expert sees the tokens that the router sends it, as when the model is used."""
    context: Any = sys.modules.get(_CONTEXT)  # whoever has not imported it has not switched it on
    shown = getattr(context, _SWITCH, False)
    try:
        if shown:
            setattr(context, _SWITCH, False)
        yield
    finally:
        if shown:
            setattr(context, _SWITCH, True)


@torch.no_grad()
def input_gains(run: Callable[[], object], modules: Mapping[str, nn.Linear]) -> dict[str, float]:
    """How much larger the inputs of experts are when only routed tokens are shown: the ratio of mean squares.

    Args:
        run: the model's forward over the calibration batches.
        modules: any; experts are picked out. Without any the model does not run.

    Returns:
        By module, those that get no token left out. All 1 if calibration shows routed tokens only.
    """
    experts = experts_among(modules)
    if not experts:
        return {}
    shown = _mean_squares(run, experts)
    with routed_tokens_only():
        routed = _mean_squares(run, experts)
    return {name: size / shown[name] for name, size in routed.items() if shown.get(name, 0.0) > 0.0}


def _mean_squares(run: Callable[[], object], modules: Mapping[str, nn.Linear]) -> dict[str, float]:
    """The mean squared norm of the inputs of every module that had some."""
    sums: dict[str, tuple[float, int]] = {}

    def add(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2)
        squares, count = sums.get(name, (0.0, 0))
        sums[name] = squares + float(rows.float().square().sum(dtype=torch.float64)), count + len(rows)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(add, name)).remove)
        run()
    return {name: squares / count for name, (squares, count) in sums.items() if count}
