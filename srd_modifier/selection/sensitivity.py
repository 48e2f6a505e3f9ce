"""How much the model's output distribution feels a change in one module's output.

An error `E` in the weight of a Linear moves the model's predictions by a mean divergence per token of about

    damage = 1/2 * sum_r (E H E^T)_rr * g_r

with `H = E[x x^T]` of the module's inputs and `g_r = E[(dL/dy_r)^2]` of its outputs `y`, where `L` is the negative
log-likelihood of labels that are sampled from the model itself: the Fisher information in the factored form of K-FAC
(Martens & Grosse 2015, arXiv:1503.05671). Inputs are collected elsewhere; this file measures `g`.

The factored form takes positions as independent. For random errors on tiny-llama it is within 25 % for nearly all
`q_proj`, `o_proj` and feed-forward modules, but says too little of `v_proj`, whose errors have a part that is the same
at all positions, which no averaging by attention removes (down to 0.45 of what is measured), and mostly too much of
`k_proj`, as attention ignores what all keys have in common (up to 2.1 times).

gradient    one backward pass per batch gives `g` of every module and row; needs memory for the activations of one
            decoder layer at a time, but none for the gradients of weights
forward     for models that cannot be differentiated, or not in the memory at hand: some noise on one module's output
            at a time, and the divergence that it causes; gives one number per module, the mean of `g` over its rows,
            from fewer tokens and two forward passes per module (four in 16 bits)
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from srd_modifier.distributed import Ranks, in_order
from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.selection.depth import layer_of
from srd_modifier.selection.routing import input_gains, routed_tokens_only

METHODS = ("auto", "gradient", "forward")

# Forward passes for every module are dear, and a mean over all rows of a module settles sooner than each row does.
_FORWARD_TOKENS = 1024

# Noise as fractions of the output's root mean square: a larger one, and a smaller one whose divergence is subtracted.
# On tiny-llama the divergence is quadratic up to 0.1 within 8 % for every module, and up to 0.2 within 20 % for all but
# a few. In 16 bits any noise, however small, also shakes the rounding of all that follows: at 0.02 that alone was 7
# times (for some modules 200 times) the divergence asked for. It is nearly the same for both noises, and goes with the
# difference; ranks of modules then agree with the gradient method's to 0.99, against 0.91 for noise of 0.1 alone.
_NOISE = (0.1, 0.0)
_NOISE_16_BITS = (0.2, 0.05)

# Values in one slice of rows of the logits: 16 MiB in float64, a handful of rows of a large vocabulary.
_SLICE_VALUES = 2**21

# float16 ends at 6e-8 and at 65504: the loss is scaled up against the one, and down again where it meets the other.
_HALF_SCALE = 2.0**7
_HALF_SCALE_STEP = 2.0**3
_HALF_SCALE_LEAST = 2.0**-8

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OutputSensitivity:
    """The mean squared gradient of the modules' outputs.

    Attributes:
        values: `g` of every module, float32 `[out_features]` on the CPU, by name. Zeros where no token came by.
        tokens: Positions it was measured on.
        method: "gradient", or "forward" where all rows of a module share one value.
    """

    values: dict[str, Tensor]
    tokens: int
    method: str


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Mapping[str, nn.Linear],
    *,
    tokens: int = 8192,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> OutputSensitivity:
    """Measure `g` of some modules: squared gradients summed over all positions, divided by the number of labels.

    Each position that is not padding gets one label, the last of a row included: labels are sampled, so that no
    next token is needed. The loss is the sum over these, and what later labels say about an earlier position
    counts there. In a mixture of experts the division is by all labels, not by those routed to an expert, so that
    `g` of an expert has its share of the tokens in it. The model runs as it is used, each expert on the tokens that
    the router sends it. Where calibration shows every token to every expert (`routing`), `g` is multiplied by how
    much larger the inputs are of those that are routed, so that `damage` above holds with `H` the mean over what
    calibration shows.

    Args:
        model: A Transformers causal language model, on its device. It is left as it was found.
        batches: Keyword arguments of its forward: `input_ids` `[rows, length]`, `attention_mask` likewise where
            there is padding. Memory grows with the size of one batch.
        modules: The modules by name, as they hang in the model.
        tokens: Positions to take. Rows are taken whole, so that it may be exceeded by less than one row (by one
            batch, where a tensor in it does not have rows).
        seed: Of labels and noise; drawn on the CPU, so that the device makes no difference.
        method: gradient, forward, or auto: gradient, and forward if memory does not suffice or an operation of the
            model has no derivative.
        progress: Called at the start and after every batch ("forward": every module) with (done, all). Begins anew
            when the method changes.
        ranks: The processes among which the batches were divided, each of which has the whole model. They divide the
            work, and all get what one process alone would have found.

    Raises:
        ConfigError: `method` is unknown or `tokens` is below 1.
        SRDError: there are no batches, one has no `input_ids`, all is padding, or the model gives NaN or infinity.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {list(METHODS)}")
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1, got {tokens}")
    report = progress or _ignore_progress
    ranks = ranks or Ranks()
    taken = _take(_of_all_ranks(batches, tokens, ranks), tokens)  # kept, as an iterator could not be read twice
    with _frozen(model), ExitStack() as routed:
        gains: dict[str, float] = {}
        with ranks.together():
            gains = input_gains(partial(_run, model, taken), modules)
        routed.enter_context(routed_tokens_only())
        if method != "forward":
            reason = ""
            sums: dict[str, Tensor] = {}
            with ranks.together():
                try:
                    sums = _by_gradient(model, taken, modules, seed, report, ranks)
                except RuntimeError as error:
                    if method == "gradient" or not _cannot_differentiate(error):
                        raise
                    reason = str(error).strip().split("\n", 1)[0] or "no reason given"
            # outside of `except`, whose traceback would hold on to the activations
            reason = next(filter(None, ranks.gather(reason)), "")
            if not reason:
                return _scaled(_of_sums(_added(sums, modules, ranks), taken, modules), gains)
            _log.warning("no gradients of the model (%s); measuring with noise, one number per module", reason)
        fewer = _take([batch.inputs for batch in taken], min(tokens, _FORWARD_TOKENS))
        mine = {name: module for i, (name, module) in enumerate(modules.items()) if i % ranks.size == ranks.rank}
        values: dict[str, Tensor] = {}
        with ranks.together():
            values = _by_noise(model, fewer, mine, seed, report)
        values = ranks.merge(values)
        positions = sum(batch.positions for batch in fewer)
        return _scaled(OutputSensitivity({name: values[name] for name in modules}, positions, "forward"), gains)


def _scaled(found: OutputSensitivity, gains: Mapping[str, float]) -> OutputSensitivity:
    return replace(found, values={name: value * gains.get(name, 1.0) for name, value in found.values.items()})


def _ignore_progress(done: int, total: int) -> None:
    """What a caller without a progress bar gets."""


def _cannot_differentiate(error: RuntimeError) -> bool:
    """Whether the forward method may still work."""
    if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
        return True
    message = str(error).lower()
    missing = ("not implemented", "not supported", "no autograd formula")
    no_backward = ("derivative" in message or "backward" in message) and any(words in message for words in missing)
    return no_backward or "can't allocate memory" in message  # the CPU's allocator has no error class of its own


# --- batches


@dataclass(frozen=True)
class _Batch:
    """What the model is called with, and which positions count: bool `[rows, length]` on the CPU."""

    inputs: Mapping[str, Any]
    counted: Tensor

    @property
    def positions(self) -> int:
        return int(self.counted.sum())


def _take(batches: Iterable[Mapping[str, Any]], tokens: int) -> list[_Batch]:
    """The first batches that hold `tokens` positions, the last one cut to the rows that are needed."""
    taken, seen = _first_positions(batches, tokens)
    if not taken:
        what = "their attention_mask leaves no position" if seen else "there are none"
        raise SRDError(f"sensitivity needs batches of tokens: {what}")
    return taken


def _first_positions(batches: Iterable[Mapping[str, Any]], tokens: int) -> tuple[list[_Batch], int]:
    """What `_take` takes, which may be nothing, and how many batches it looked at."""
    taken: list[_Batch] = []
    left, seen = tokens, 0
    for inputs in batches:
        seen += 1
        if inputs.get("input_ids") is None:
            raise SRDError(f"batch {seen} to measure sensitivity on has no input_ids, only {sorted(inputs)}")
        batch = _first_rows(_batch(inputs), left)
        if batch.positions:
            taken.append(batch)
        left -= batch.positions
        if left <= 0:
            break
    return taken, seen


def _of_all_ranks(batches: Iterable[Mapping[str, Any]], tokens: int, ranks: Ranks) -> Iterable[Mapping[str, Any]]:
    """What `_take` needs of the batches of all processes, in the order that one process alone has them in."""
    if ranks.size == 1:
        return batches
    mine: list[_Batch] = []
    with ranks.together():
        mine, _ = _first_positions(batches, tokens)
    everything = in_order(ranks.gather(mine), lambda batch: batch.counted.shape[1])
    return [batch.inputs for batch in everything]


def _batch(inputs: Mapping[str, Any]) -> _Batch:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counted = torch.ones(ids.shape, dtype=torch.bool)
    if mask is not None and mask.shape == ids.shape:
        counted = mask.bool().cpu()
    # with labels the model would compute a loss of its own
    return _Batch({name: value for name, value in inputs.items() if name != "labels"}, counted)


def _first_rows(batch: _Batch, tokens: int) -> _Batch:
    """The fewest rows with at least `tokens` positions, or the whole batch."""
    rows = int((batch.counted.sum(dim=1).cumsum(dim=0) < tokens).sum()) + 1
    tensors = [value for value in batch.inputs.values() if isinstance(value, Tensor)]
    if rows >= len(batch.counted) or any(tensor.shape[:1] != batch.counted.shape[:1] for tensor in tensors):
        return batch
    cut = {name: value[:rows] if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return _Batch(cut, batch.counted[:rows])


# --- the model


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of weights, for the duration."""
    training = {module: module.training for module in model.modules()}
    with disable_onloading():  # the flag belongs to the weight that is kept, not to a copy on the device
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Let every decoder layer keep its inputs only, and run again when its gradients are due."""
    layers = [module for name, module in model.named_modules() if _is_layer(name)]
    # offloading has its own `forward` on the instance, others have the class's
    own = {layer: vars(layer).get("forward") for layer in layers}
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(_checkpoint, layer.forward)
        yield
    finally:
        for layer, forward in own.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _is_layer(name: str) -> bool:
    """Whether the name is a decoder layer's own, not that of a module inside one."""
    return layer_of(name) is not None and layer_of(name.rpartition(".")[0]) is None


def _checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Stopping early would save next to nothing, as frozen weights leave little to save after the last product, and
    # leaves by an exception, past the hooks with which offloading libraries clean up.
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _hooked(modules: Mapping[str, nn.Linear], hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `hook(name, output)` whenever a module has run; what it returns, if anything, replaces the output."""

    def adapted(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return hook(name, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(adapted, name)).remove)
        yield


def _logits(model: Any, batch: _Batch) -> Tensor:
    """Logits of all positions, in the model's dtype: `[rows, length, vocabulary]`."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits
    if logits.shape[:2] != batch.counted.shape:
        raise SRDError(
            f"sensitivity needs logits of every token: the model gives {list(logits.shape[:2])} "
            f"for input_ids of {list(batch.counted.shape)}"
        )
    return logits


def _run(model: nn.Module, batches: Iterable[_Batch]) -> None:
    for batch in batches:
        _logits(model, batch)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    with disable_onloading():
        return {parameter.dtype for parameter in model.parameters()}


def _slices(positions: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _SLICE_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, positions, step))


# --- with gradients


@torch.enable_grad()
def _by_gradient(
    model: nn.Module,
    batches: Sequence[_Batch],
    modules: Mapping[str, nn.Linear],
    seed: int,
    report: Progress,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Squared gradients summed over this process's share of the batches: float64 `[out_features]`."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.float16 in _dtypes(model)
    scale = _HALF_SCALE if half else 1.0
    totals: dict[str, Tensor] = {}
    report(0, len(batches))
    with _checkpointed_layers(model):
        for done, batch in enumerate(batches, 1):
            uniforms = torch.rand(batch.positions, generator=generator, dtype=torch.float64)
            if (done - 1) % ranks.size != ranks.rank:
                continue  # another process's, whose labels are drawn all the same
            sums = _squared_gradients(model, batch, modules, uniforms, scale)
            while not _finite(sums) and half and scale > _HALF_SCALE_LEAST:
                scale /= _HALF_SCALE_STEP
                sums = _squared_gradients(model, batch, modules, uniforms, scale)
            if not _finite(sums):
                raise SRDError("the model's gradients are NaN or infinite; load it in bfloat16 or float32")
            for name, squares in sums.items():
                # float64, in which the order of the batches makes no difference
                squares = squares.cpu()
                totals[name] = totals[name].add_(squares) if name in totals else squares.double()
            report(done, len(batches))
    return totals


def _added(sums: Mapping[str, Tensor], modules: Mapping[str, nn.Linear], ranks: Ranks) -> dict[str, Tensor]:
    """The sums of all processes, of the modules that any of them saw."""
    seen = ranks.merge(dict.fromkeys(sums, True))
    added = {
        name: sums[name] if name in sums else torch.zeros(module.out_features, dtype=torch.float64)
        for name, module in modules.items()
        if name in seen
    }
    for values in added.values():
        ranks.sum(values)
    return added


def _of_sums(
    sums: Mapping[str, Tensor], batches: Sequence[_Batch], modules: Mapping[str, nn.Linear]
) -> OutputSensitivity:
    tokens = sum(batch.positions for batch in batches)
    values = {
        name: (sums[name] / tokens).float() if name in sums else torch.zeros(module.out_features)
        for name, module in modules.items()
    }
    return OutputSensitivity(values, tokens, "gradient")


def _squared_gradients(
    model: nn.Module, batch: _Batch, modules: Mapping[str, nn.Linear], uniforms: Tensor, scale: float
) -> dict[str, Tensor]:
    """Squared output gradients of the modules that ran, summed over one batch: float32 `[out_features]`."""
    sums: dict[str, Tensor] = {}
    reached: set[str] = set()

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.flatten(0, -2).float().square().sum(dim=0) / scale**2
        sums[name] = sums[name] + squares if name in sums else squares

    def watch(name: str, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # the model itself cuts the gradient here
            return None
        reached.add(name)
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # the graph begins here: nothing before is asked for
        if output.is_leaf or output._is_view():
            # The model may write into its output. A leaf forbids that, and a view (of a module with a bias) would
            # get a new place in the graph, where the hook is not.
            output = output.clone()
        # Runs once: when a layer runs again in the backward pass, the graph it then makes is never walked.
        output.register_hook(partial(add, name))
        return output

    # hooked until the backward pass is over: a layer that runs again must make the same graph
    with _hooked(modules, watch):
        logits = _logits(model, batch)
        if logits.requires_grad:
            logits.backward(_loss_gradient(logits.detach(), batch.counted, uniforms, scale))
        elif reached:
            raise RuntimeError("no gradient reaches the modules: a derivative in the model is not implemented")
    return sums


def _loss_gradient(logits: Tensor, counted: Tensor, uniforms: Tensor, scale: float) -> Tensor:
    """Gradient of the summed cross-entropy of sampled labels by the logits: softmax minus one at the label.

    In closed form and by slices, so that only one copy of the logits is made, in their own dtype.

    Args:
        logits: `[rows, length, vocabulary]`.
        counted: Positions that get a label, bool `[rows, length]`.
        uniforms: Where in `[0, 1)` each label is drawn, float64 `[positions]` on the CPU.
        scale: Factor of the loss.
    """
    gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    source, target = logits.flatten(0, 1), gradient.view(-1, logits.shape[-1])
    positions = counted.flatten().nonzero().squeeze(1).to(logits.device)
    for part in _slices(len(positions), logits.shape[-1]):
        probabilities = source[positions[part]].float().softmax(dim=-1)
        labels = _sample(probabilities, uniforms[part].to(logits.device))
        probabilities[torch.arange(len(labels), device=logits.device), labels] -= 1.0
        target[positions[part]] = (probabilities * scale).to(logits.dtype)
    return gradient


def _sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One label per row: the first whose cumulative probability exceeds a uniform number.

    Args:
        probabilities: float32 `[positions, vocabulary]`.
        uniforms: float64 `[positions]`.
    """
    # float32 would lose the tail of a large vocabulary in the sum
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    points = uniforms * cumulative[:, -1]
    labels = torch.searchsorted(cumulative, points[:, None], right=True).squeeze(1)
    return labels.clamp_(max=probabilities.shape[-1] - 1)


def _finite(sums: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(squares).all()) for squares in sums.values())


# --- with noise


@torch.no_grad()
def _by_noise(
    model: nn.Module, batches: Sequence[_Batch], modules: Mapping[str, nn.Linear], seed: int, report: Progress
) -> dict[str, Tensor]:
    """Noise of variance `s^2` on all outputs costs `1/2 s^2 sum_r g_r`, which gives the mean of `g` over rows.

    What this gives up: which rows matter (all get the mean, so that damage is mispredicted where errors and
    gradients gather in the same rows), tokens, and time: modules are measured one after the other, each expert of
    a mixture by itself. A divergence below the noise floor counts as zero.
    """
    tokens = sum(batch.positions for batch in batches)
    sixteen_bits = bool(_dtypes(model) & {torch.float16, torch.bfloat16})
    high, low = _NOISE_16_BITS if sixteen_bits else _NOISE
    report(0, len(modules))
    clean, sizes = _clean_pass(model, batches, modules)
    values = {}
    for done, (name, module) in enumerate(modules.items(), 1):
        size = sizes.get(name, 0.0)
        mean = 0.0
        if size > 0.0:
            kl = _noise_divergence(model, batches, clean, {name: module}, high * size, seed)
            if low:
                kl -= _noise_divergence(model, batches, clean, {name: module}, low * size, seed)
            if not math.isfinite(kl):
                raise SRDError(f"{name}: the model gives NaN or infinite logits when its output is perturbed")
            mean = max(0.0, 2.0 * kl / tokens / ((high**2 - low**2) * size**2 * module.out_features))
        values[name] = torch.full((module.out_features,), mean)
        report(done, len(modules))
    return values


def _clean_pass(
    model: nn.Module, batches: Sequence[_Batch], modules: Mapping[str, nn.Linear]
) -> tuple[list[Tensor], dict[str, float]]:
    """Logits of the unperturbed model per batch, and the root mean square of each output that there was."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}

    def measure(name: str, output: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + float(output.float().square().sum())
        counts[name] = counts.get(name, 0) + output.numel()

    with _hooked(modules, measure):
        clean = [_counted_logits(model, batch) for batch in batches]
    if not all(bool(torch.isfinite(logits).all()) for logits in clean):
        raise SRDError("the model gives NaN or infinite logits; load it in bfloat16 or float32")
    return clean, {name: math.sqrt(squares[name] / count) for name, count in counts.items() if count}


def _noise_divergence(
    model: nn.Module,
    batches: Sequence[_Batch],
    clean: Sequence[Tensor],
    module: Mapping[str, nn.Linear],
    sigma: float,
    seed: int,
) -> float:
    """Divergence summed over positions: the mean of some noise and its opposite, so that odd terms cancel."""
    total = 0.0
    for step in (sigma, -sigma):
        # anew for each module and sign: the same noise, whichever modules are asked for
        generator = torch.Generator().manual_seed(seed)

        def perturb(name: str, output: Tensor, step: float = step, generator: Any = generator) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            return (output.float() + step * noise).to(output.dtype)

        with _hooked(module, perturb):
            for batch, reference in zip(batches, clean, strict=True):
                total += _divergence(reference, _counted_logits(model, batch))
    return total / 2


def _counted_logits(model: nn.Module, batch: _Batch) -> Tensor:
    """Logits of the positions that count, `[positions, vocabulary]`."""
    logits = _logits(model, batch)
    return logits[batch.counted.to(logits.device)]


def _divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || logits) summed over rows `[positions, vocabulary]`.

    In float64: the rounding of log-sums in float32 is as large as what a small module's noise causes.
    """
    total = 0.0
    for part in _slices(len(logits), logits.shape[-1]):
        expected = reference[part].double().log_softmax(dim=-1)
        found = logits[part].double().log_softmax(dim=-1)
        total += float((expected.exp() * (expected - found)).sum())
    return total
