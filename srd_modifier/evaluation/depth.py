"""Where in the depth of a model its divergence arises.

Both models are read out after every decoder layer: the final norm and the head, applied to what that layer gives (the
logit lens, nostalgebraist 2020). The divergence between the two readings grows from layer to layer, and after the
last one it is the divergence of the models themselves.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srd_modifier.evaluation.load import LoadedModel

_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")
_SLICE_VALUES = 2**22


@dataclass(frozen=True)
class Depths:
    """What a model's layers gave for some tokens.

    Attributes:
        states: of each layer, [tokens, hidden], on the model's device.
        read_out: from states to logits [tokens, vocabulary].
    """

    states: list[Tensor]
    read_out: Callable[[Tensor], Tensor]


def record_depths(loaded: LoadedModel, inputs: Tensor) -> Depths | None:
    """What each decoder layer gives, `None` for a model whose layers, norm or head are not where they are expected.

    Args:
        loaded: The model.
        inputs: Token ids, int64 [windows, length].
    """
    model = loaded.model
    parts = _find_parts(model)
    if parts is None:
        return None
    layers, norm, head = parts
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            found[number] = state.flatten(0, 1).detach()

        return hook

    hooks = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            accepted = inspect.signature(model.forward).parameters
            for_one_token = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
            model(input_ids=inputs.to(model.device), use_cache=False, **for_one_token)
    finally:
        for hook in hooks:
            hook.remove()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def read_out(states: Tensor) -> Tensor:
        logits = head(norm(states))
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return Depths([found[number] for number in range(len(layers))], read_out)


@torch.no_grad()
def depth_divergence(reference: Depths, model: Depths) -> tuple[float, ...] | None:
    """Mean KL(reference || model) in nats per token after each layer, `None` if they have not as many layers."""
    if len(reference.states) != len(model.states):
        return None
    return tuple(
        _divergence(theirs, reference.read_out, ours, model.read_out)
        for theirs, ours in zip(reference.states, model.states, strict=True)
    )


def _divergence(
    theirs: Tensor, read_theirs: Callable[[Tensor], Tensor], ours: Tensor, read_ours: Callable[[Tensor], Tensor]
) -> float:
    total, rows = 0.0, max(1, _SLICE_VALUES // read_ours(ours[:1]).shape[-1])
    for first in range(0, len(theirs), rows):
        expected = read_theirs(theirs[first : first + rows]).double().log_softmax(-1)
        found = read_ours(ours[first : first + rows]).double().log_softmax(-1).to(expected.device)
        total += float((expected.exp() * (expected - found)).sum())
    return total / len(theirs)


def _find_parts(model: nn.Module) -> tuple[nn.ModuleList, nn.Module, nn.Module] | None:
    """The decoder layers, the norm after them, and the head."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    for owner in model.modules():
        for layers in owner.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == count:
                norm = next((getattr(owner, name) for name in _NORMS if hasattr(owner, name)), None)
                return None if norm is None or head is None else (layers, norm, head)
    return None
