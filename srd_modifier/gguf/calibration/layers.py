"""A model read from disk one decoder layer at a time, and watched while it computes.

Only the layer at hand has its weights in memory; everything else of the model stays empty. What the layers are called
with besides the hidden states (positions, masks, embeddings per layer) does not depend on the layers before them, so
that one pass through the embedding with stand-ins for the layers gives it for all of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from srd_modifier._extras import require
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.families.settings import text_settings
from srd_modifier.gguf.weights import ModelWeights

_BATCH_TOKENS = 4096

_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")

_EMBEDDING = "token_embd.weight"
_IN_MEMORY = "model."


class Place(NamedTuple):
    """A matrix in memory: the parameter's name, and the expert where it holds one matrix for each."""

    parameter: str
    expert: int | None = None


class Occupant(NamedTuple):
    """A piece of a GGUF tensor: its number there, and which part of its parameter in memory it is."""

    tensor: GGUFTensor
    number: int
    part: tuple[Any, ...]


class Call(NamedTuple):
    """What a layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output for hidden states `[samples, length, hidden]`."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class Entrance(NamedTuple):
    """Some samples as they enter the first layer.

    Attributes:
        ids: token ids `[samples, length]`.
        hidden: `[samples, length, hidden]`.
        calls: of every layer.
    """

    ids: Tensor
    hidden: Tensor
    calls: list[Call]


class LayeredModel:
    """A model whose layers get their weights when they are needed.

    Args:
        weights: of the model.
        tensors: of its GGUF file.
        device: where layers and hidden states are.

    Raises:
        MissingExtraError: accelerate is not installed.
    """

    def __init__(self, weights: ModelWeights, tensors: Sequence[GGUFTensor], device: torch.device | str) -> None:
        self.weights = weights
        self.device = torch.device(device)
        self.settings = text_settings(weights.config, str(weights.directory / "config.json"))
        self._model = _empty_model(self.settings)
        self._decoder = self._model.get_decoder()
        self._prefix = _prefix(tensors)
        self._cap: float | None = getattr(self.settings, "final_logit_softcapping", None)
        self.places = self._find_places(tensors)

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._decoder.layers)

    def path(self, layer: int) -> str:
        """What the names of a layer's parameters begin with."""
        return f"{_IN_MEMORY}layers.{layer}"

    def enter(
        self, samples: Sequence[Sequence[int]], replace: Callable[[nn.Module], None] | None = None
    ) -> list[Entrance]:
        """Run samples through everything that comes before the first layer.

        Args:
            samples: token ids; those of one length go together, so that nothing is padded.
            replace: changes the decoder's weights before.

        Raises:
            SRDError: there are no samples, or one has a token that the model does not know.
        """
        recorded: list[Call] = []
        layers, norm = self._decoder.layers, self._decoder.norm
        self._decoder.layers = nn.ModuleList(_Recorder(layer, recorded) for layer in layers)
        self._decoder.norm = nn.Identity()
        try:
            self._load(self._decoder, _IN_MEMORY.removesuffix("."))
            self._check_tokens(samples)
            if replace is not None:
                replace(self._decoder)
            entrances = []
            for ids in _batches(samples):
                recorded.clear()
                ids = ids.to(self.device)
                hidden = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
                entrances.append(Entrance(ids, hidden, list(recorded)))
            return entrances
        finally:
            self.unload(self._decoder)
            self._decoder.layers, self._decoder.norm = layers, norm
            self.weights.release()

    def load_layer(self, number: int) -> nn.Module:
        """A decoder layer with its weights, float32; give it back with `unload`."""
        layer = self._decoder.layers[number]
        self._load(layer, self.path(number))
        self.weights.release()
        return layer

    def unload(self, layer: nn.Module) -> None:
        """Free a layer's weights; what is computed from the settings stays."""
        for name, parameter in list(layer.named_parameters()):
            _set_parameter(layer, name, parameter.to("meta"))

    def load_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        self._load(self._decoder.norm, f"{_IN_MEMORY}norm")
        return self._decoder.norm

    def read_head(self) -> Tensor:
        """The matrix that gives the logits, float32 `[vocabulary, hidden]`."""
        (occupant,) = self.places[self.head]
        return self._stored(occupant.tensor.pieces[0].source).to(self.device)

    @property
    def head(self) -> Place:
        """Where the matrix is that gives the logits: the embedding, unless there is a head of its own."""
        own = [place for place in self.places if place.parameter.endswith("lm_head.weight")]
        return own[0] if own else self.embedding

    @property
    def embedding(self) -> Place:
        """Where the embedding of the tokens is."""
        return Place(f"{_IN_MEMORY}embed_tokens.weight")

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies with what it looks up in the embedding."""
        return float(getattr(self._decoder.embed_tokens, "embed_scale", 1.0))

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits `[..., vocabulary]` of normed hidden states."""
        logits = functional.linear(hidden, head)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """By how much logits change with the product with the head, which a cap may come after."""
        return 1.0 if self._cap is None else 1 - (logits / self._cap).square()

    def places_in(self, path: str) -> dict[Place, list[Occupant]]:
        """The matrices below a module."""
        return {place: own for place, own in self.places.items() if place.parameter.startswith(f"{path}.")}

    def watch(self, path: str, module: nn.Module, seen: Callable[[Place, Tensor, Tensor | None], None]) -> "Watch":
        """A context in which `seen` is called for every product with a matrix of a module, see `Watch`."""
        names = {place.parameter for place in self.places_in(path)}
        parameters = {
            id(parameter): (f"{path}.{name}", parameter)
            for name, parameter in module.named_parameters()
            if f"{path}.{name}" in names
        }
        return Watch(parameters, seen)

    def _find_places(self, tensors: Sequence[GGUFTensor]) -> dict[Place, list[Occupant]]:
        parameters = dict(self._model.named_parameters())
        places: dict[Place, list[Occupant]] = {}
        for tensor in tensors:
            for number, piece in enumerate(tensor.pieces):
                if piece.module is None:
                    continue
                name, index = _in_memory(self._memory_name(piece.source), piece.index, parameters)
                expert = index[0] if name in parameters and parameters[name].dim() == 3 else None
                places.setdefault(Place(name, expert), []).append(Occupant(tensor, number, index))
        return places

    def _memory_name(self, source: str) -> str:
        return f"{_IN_MEMORY}{source.removeprefix(self._prefix)}" if source.startswith(self._prefix) else source

    def _disk_name(self, name: str) -> str:
        return f"{self._prefix}{name.removeprefix(_IN_MEMORY)}" if name.startswith(_IN_MEMORY) else name

    def _load(self, module: nn.Module, path: str) -> None:
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, self._read(f"{path}.{name}", parameter).to(self.device))
        stored = module.state_dict().keys()  # not the buffers that are computed from the settings
        for name, buffer in module.named_buffers():
            disk_name = self._disk_name(f"{path}.{name}")
            if name in stored and disk_name in self.weights:
                buffer.copy_(self.weights.tensor(disk_name))
        module.to(self.device)

    def _read(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter, from the tensor of its name or from those of its experts."""
        disk_name = self._disk_name(name)
        if disk_name in self.weights:
            return self._stored(disk_name)
        values = torch.empty(parameter.shape)
        filled = 0
        for place, occupants in self.places.items():
            for tensor, number, index in occupants if place.parameter == name else ():
                piece = tensor.pieces[number]
                part = self._stored(piece.source)[piece.index]
                values[index] = part
                filled += part.numel()
        if filled != values.numel():
            raise SRDError(f"{self.weights.directory}: {disk_name} is missing")
        return values

    def _stored(self, name: str) -> Tensor:
        """A tensor of the disk in float32, which may be written to."""
        values = self.weights.tensor(name).to(torch.float32, copy=True)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.weights.path_of(name)}: {name} has entries that are NaN or infinite")
        return values

    def _check_tokens(self, samples: Sequence[Sequence[int]]) -> None:
        if not samples or not all(samples):
            raise SRDError("there are no samples to calibrate on, or empty ones")
        rows, largest = self.settings.vocab_size, max(max(sample) for sample in samples)
        if largest >= rows:
            raise SRDError(
                f"{self.weights.directory}: the tokenizer gives token id {largest}, but the model has only {rows} "
                "embeddings"
            )


class Watch(TorchFunctionMode):
    """Reports every product with one of some parameters, or with an expert's slice of one.

    Both a Linear and the experts that Transformers keeps in one parameter compute theirs with
    `torch.nn.functional.linear`; a slice is known by the parameter that it is a view of.

    Args:
        parameters: name and parameter by the parameter's `id`.
        seen: called with the place, the inputs `[..., in]` before the product and None, and after it with the inputs
            and the outputs `[..., out]`.
    """

    def __init__(
        self,
        parameters: Mapping[int, tuple[str, nn.Parameter]],
        seen: Callable[[Place, Tensor, Tensor | None], None],
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every function of torch."""
        kwargs = kwargs or {}
        if func is not functional.linear:
            return func(*args, **kwargs)
        inputs, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        whole = weight if weight._base is None else weight._base
        if id(whole) not in self._parameters:
            return func(*args, **kwargs)
        name, parameter = self._parameters[id(whole)]
        expert = None
        if parameter.dim() == 3:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter[0].numel()
        place = Place(name, expert)
        self._seen(place, inputs, None)
        outputs = func(*args, **kwargs)
        self._seen(place, inputs, outputs)
        return outputs


class _Recorder(nn.Module):
    """Stands for a decoder layer and keeps what it is called with."""

    def __init__(self, layer: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no submodule whose weights would be loaded
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        # models ask their layers for settings such as attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the arguments."""
        self._calls.append(Call(args, kwargs))
        return hidden_states


def _set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(module.get_submodule(owner), own_name, nn.Parameter(values, requires_grad=False))


def _empty_model(settings: Any) -> Any:
    """The text model without weights, but with whatever is computed from its settings."""
    require("accelerate", extra="gguf")
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    settings._experts_implementation = "eager"  # one product for each expert, which can be watched
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def _prefix(tensors: Iterable[GGUFTensor]) -> str:
    """What the names of the text model's tensors begin with on disk, where it is `model.` in memory."""
    embedding = next(tensor for tensor in tensors if tensor.name == _EMBEDDING)
    return embedding.pieces[0].source.removesuffix("embed_tokens.weight")


def _in_memory(name: str, index: tuple[Any, ...], parameters: Mapping[str, Tensor]) -> tuple[str, tuple[Any, ...]]:
    """Where a tensor of the disk is in memory: experts that have tensors of their own there share two here."""
    found = _EXPERT.fullmatch(name)
    if found is None or name in parameters:
        return name, index
    module, expert = found["module"], int(found["expert"])
    if found["part"] == "down":
        return f"{module}.down_proj", (expert,)
    half = parameters[f"{module}.gate_up_proj"].shape[1] // 2
    return f"{module}.gate_up_proj", (expert, slice(half) if found["part"] == "gate" else slice(half, None))


def _batches(samples: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    by_length: dict[int, list[list[int]]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(list(sample))
    for length, members in by_length.items():
        count = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(members), count):
            yield torch.tensor(members[start : start + count])
