"""What a family of models is to the GGUF format: its tensors, their names, shapes and order of rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srd_modifier._extras import require
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.gguf.families.rope import add_rope, check_rope
from srd_modifier.gguf.families.settings import head_size, text_settings
from srd_modifier.gguf.mixture import ModelShape

if TYPE_CHECKING:
    from srd_modifier.gguf.weights import ModelWeights

Index = tuple[int | slice, ...]

# where the text model is, by what its tensors' names begin with, and the head that belongs to it
_PREFIXES = {
    "model.": "lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
}
_COUNTS = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_COUNTS_IF_GIVEN = ("num_experts", "moe_intermediate_size", "sliding_window")
_BUFFERS = ("rotary_emb.inv_freq",)  # computed, but stored by old versions of Transformers


@dataclass(frozen=True, eq=False)
class Piece:
    """One Hugging Face matrix or vector, as it goes into a GGUF tensor.

    Attributes:
        source: name of the Hugging Face tensor.
        module: the module whose input this weight multiplies, `model.embed_tokens` for the embedding; None for norms
            and whatever else is not multiplied with an input.
        rows: int64 `[out]`: GGUF row `i` is Hugging Face row `rows[i]`; None keeps their order.
        index: which part of the source this is, as an index into it: an expert, or the rows of one projection where
            two share a tensor. Empty is all of it.
        offset: added to every entry.
    """

    source: str
    module: str | None = None
    rows: Tensor | None = None
    index: Index = ()
    offset: float = 0.0

    def read(self, weights: "ModelWeights") -> Tensor:
        """The entries in GGUF order: `[out, in]` or `[n]`, in the source's dtype, or float32 with an offset."""
        tensor = weights.tensor(self.source)[self.index]
        if self.rows is not None:
            # by numpy: torch's threads would keep spinning for a while, where ggml's are to work
            stored = tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()
            tensor = torch.from_numpy(stored[self.rows.numpy()]).view(tensor.dtype).reshape(tensor.shape)
        return tensor.float() + self.offset if self.offset else tensor

    def to_hugging_face(self, tensor: Tensor) -> Tensor:
        """What stands in the source, given what stands in the GGUF tensor: the inverse of `read`."""
        if self.offset:
            tensor = tensor - self.offset
        if self.rows is None:
            return tensor
        restored = torch.empty_like(tensor)
        restored[self.rows] = tensor
        return restored


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: as in the file, `blk.0.attn_q.weight`.
        shape: in torch's order, `[out, in]`, `[experts, out, in]` or `[n]`.
        pieces: what it is made of: one, or one for each expert.
        values: float32 of this shape, for a tensor that is computed from config.json and has no pieces.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    values: Tensor | None = None

    def parts(self, weights: "ModelWeights") -> Iterator[Tensor]:
        """The pieces in GGUF order, read one after the other."""
        if self.values is not None:
            yield self.values
        for piece in self.pieces:
            yield piece.read(weights)

    def read(self, weights: "ModelWeights") -> Tensor:
        """The whole tensor, in the dtype of its sources."""
        parts = list(self.parts(weights))
        return parts[0] if len(self.shape) < 3 else torch.stack(parts)


@dataclass(frozen=True)
class Part:
    """A tensor that a model of the family has, in every decoder layer or once.

    Attributes:
        source: its Hugging Face name, within the layer for a layer's tensors: `self_attn.q_proj.weight`.
        shape: names of its sizes, see `Family.sizes`.
        target: its GGUF name within the block, where `gguf`'s tensor-name map does not give it.
        offset: added to every entry.
        rotated: whether the rows are reordered for a RoPE that turns neighbouring rows instead of the two halves.
        expected: whether a model with these settings has it in this layer.
    """

    source: str
    shape: tuple[str, ...]
    target: str | None = None
    offset: float = 0.0
    rotated: bool = False
    expected: Callable[[Any, int], bool] = lambda settings, layer: True


def projection(
    name: str, shape: tuple[str, str], *, bias: bool | str = False, rotated: bool = False, **options: Any
) -> tuple[Part, ...]:
    """A linear layer: its weight, and its bias, which may depend on a flag of config.json with this name."""
    weight = Part(f"{name}.weight", shape, rotated=rotated, **options)
    if not bias:
        return (weight,)

    def has_bias(settings: Any, layer: int) -> bool:
        present = weight.expected(settings, layer)
        return present and (bias is True or bool(getattr(settings, str(bias), False)))

    return weight, Part(f"{name}.bias", shape[:1], rotated=rotated, expected=has_bias)


def norm(name: str, size: str = "hidden", **options: Any) -> tuple[Part, ...]:
    """A norm with a weight and no bias."""
    return (Part(f"{name}.weight", (size,), **options),)


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture in one decoder layer, each with a gate, an up and a down projection.

    On disk each expert has tensors of its own (`experts.3.gate_proj.weight`) or all share two: `experts.gate_up_proj`
    `[experts, 2 * intermediate, hidden]` and `experts.down_proj` `[experts, hidden, intermediate]`.

    Attributes:
        module: the module of the experts within the layer, `mlp.experts`.
        fused: whether llama.cpp reads gate and up as one tensor; that is how they are written if they share one.
        expected: whether a model with these settings has experts in this layer.
    """

    module: str
    fused: bool = False
    expected: Callable[[Any, int], bool] = lambda settings, layer: True


def common_sizes(settings: Any, layer: int) -> dict[str, int]:
    """Sizes by the name that the shapes of a `Part` use, for models whose layers are all alike."""
    head = head_size(settings)
    return {
        "vocabulary": settings.vocab_size,
        "hidden": settings.hidden_size,
        "head": head,
        "queries": settings.num_attention_heads * head,
        "keys": settings.num_key_value_heads * head,
        "intermediate": settings.intermediate_size,
    }


@dataclass(frozen=True)
class Family:
    """Models that llama.cpp computes with the same graph.

    Attributes:
        model_types: `model_type` of the text model in config.json.
        architecture: llama.cpp's name for it.
        layer: the tensors of a decoder layer.
        outside: the tensors outside the layers, but for the head.
        experts: the experts of a layer.
        activation: of the feed-forward layers.
        rope_types: types of RoPE that llama.cpp computes for this architecture.
        rope: `rope_parameters` of the layers with full attention.
        sizes: every size that the shapes name, in a layer.
        add_own: adds the hyper-parameters that only this architecture has.
        computed: tensors by GGUF name, float32, that config.json decides.
        check: the first thing in the settings that llama.cpp does not compute, as the rest of a sentence.
        windows: whether llama.cpp computes layers with a sliding window.
        unused: whether a tensor, named without the model's prefix, is stored but never used by the model.
    """

    model_types: tuple[str, ...]
    architecture: str
    layer: tuple[Part, ...]
    outside: tuple[Part, ...] = (Part("embed_tokens.weight", ("vocabulary", "hidden")), *norm("norm"))
    experts: Experts | None = None
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rope: Callable[[Any], Mapping[str, Any]] = lambda settings: settings.rope_parameters
    sizes: Callable[[Any, int], dict[str, int]] = common_sizes
    add_own: Callable[[Any, Any], None] = lambda writer, settings: None
    computed: Callable[[Any], dict[str, Tensor]] = lambda settings: {}
    check: Callable[[Any], str | None] = lambda settings: None
    windows: bool = False
    unused: Callable[[Any, str], bool] = lambda settings, name: False

    def settings(self, config: Mapping[str, Any], where: str = "config.json") -> Any:
        """The settings of the text model, checked.

        Raises:
            SRDError: config.json is malformed, or llama.cpp does not compute what it says; the message names it.
        """
        settings = text_settings(config, where)
        self._check_sizes(settings, where)
        activation = getattr(settings, "hidden_act", None) or getattr(settings, "hidden_activation", None)
        if activation != self.activation:
            raise SRDError(f"{where}: llama.cpp computes {self.architecture} with {self.activation}, not {activation}")
        if not isinstance(settings.rope_parameters, Mapping):
            raise SRDError(f"{where}: rope_parameters is {settings.rope_parameters!r}, expected an object")
        check_rope(self.rope(settings), self.rope_types, self.architecture, where)
        if self.windows:
            check_rope(settings.rope_parameters.get("sliding_attention"), ("default",), self.architecture, where)
        objection = self.check(settings)
        if objection is not None:
            raise SRDError(f"{where}: {objection}")
        return settings

    def _check_sizes(self, settings: Any, where: str) -> None:
        counts = {name: getattr(settings, name, None) for name in _COUNTS}
        counts |= {name: value for name in _COUNTS_IF_GIVEN if (value := getattr(settings, name, None)) is not None}
        if _all_positive(counts):
            # heads may differ between layers; where they do, the last has full attention
            for layer in (0, settings.num_hidden_layers - 1):
                sizes = self.sizes(settings, layer)
                counts |= {f"the size of {name} of layer {layer}": sizes[name] for name in ("head", "queries", "keys")}
        wrong = [name for name, value in counts.items() if not _all_positive({name: value})]
        if wrong:
            raise SRDError(f"{where}: {wrong[0]} is {counts[wrong[0]]!r}, expected a positive whole number")

    def add_hyperparameters(self, writer: Any, config: Mapping[str, Any]) -> None:
        """Add what llama.cpp must know of the model besides its tensors and its vocabulary.

        Args:
            writer: a `gguf.GGUFWriter` for this architecture.
            config: config.json.

        Raises:
            SRDError: config.json says something that llama.cpp does not compute.
        """
        settings = self.settings(config)
        sizes = [self.sizes(settings, layer) for layer in range(settings.num_hidden_layers)]
        # where layers differ in this, the last has full attention, and those with a window have keys of their own
        head = sizes[-1]["head"]
        writer.add_vocab_size(settings.vocab_size)
        writer.add_context_length(settings.max_position_embeddings)
        writer.add_embedding_length(settings.hidden_size)
        writer.add_block_count(settings.num_hidden_layers)
        writer.add_feed_forward_length(_one_or_all([size["intermediate"] for size in sizes]))
        writer.add_head_count(settings.num_attention_heads)
        writer.add_head_count_kv(_one_or_all([size["keys"] // size["head"] for size in sizes]))
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
        writer.add_rope_dimension_count(head)
        add_rope(writer, self.rope(settings))
        self.add_own(writer, settings)

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What llama.cpp computes otherwise than Transformers, a sentence each."""
        settings = self.settings(config)
        window = getattr(settings, "sliding_window", None)
        slides = "sliding_attention" in (getattr(settings, "layer_types", None) or ["sliding_attention"])
        if self.windows or not window or not slides or window >= settings.max_position_embeddings:
            return ()
        return (
            f"the model attends to the last {window} tokens, llama.cpp computes {self.architecture} with attention to "
            f"all; up to {window} tokens that is the same",
        )

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """What the rules for the tensors' types ask about a model."""
        settings = self.settings(config)
        sizes = self.sizes(settings, 0)
        return ModelShape(
            architecture=self.architecture,
            layers=settings.num_hidden_layers,
            experts=sizes.get("experts", 0),
            heads=sizes["queries"] // sizes["head"],
            kv_heads=sizes["keys"] // sizes["head"],
        )

    def tensors(self, weights: "ModelWeights") -> list[GGUFTensor]:
        """Every tensor of the file, in its order.

        Raises:
            SRDError: config.json says something that llama.cpp does not compute.
            CheckpointError: a tensor is missing, has another shape than config.json says, or is unknown.
        """
        return _Layout(self, weights).tensors()


class _Layout:
    """The tensors of one model, found by name and checked against its settings."""

    def __init__(self, family: Family, weights: "ModelWeights") -> None:
        require("gguf", extra="gguf")
        import gguf

        self.family = family
        self.weights = weights
        self.settings = family.settings(weights.config, str(weights.directory / "config.json"))
        self.name_map = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH[family.architecture.upper()], self.settings.num_hidden_layers
        )
        self.prefix = self._find_prefix()
        self.head = _PREFIXES[self.prefix]
        self.found: list[GGUFTensor] = []
        self.taken: set[str] = set()
        self.missing: list[str] = []

    def tensors(self) -> list[GGUFTensor]:
        for part in self.family.outside:
            if part.expected(self.settings, 0):
                self._add_part(part, 0, within="")
        for name, values in self.family.computed(self.settings).items():
            self.found.append(GGUFTensor(name, tuple(values.shape), values=values))
        experts = self.family.experts
        for layer in range(self.settings.num_hidden_layers):
            for part in self.family.layer:
                if part.expected(self.settings, layer):
                    self._add_part(part, layer, within=f"layers.{layer}.")
            if experts is not None and experts.expected(self.settings, layer):
                self._add_experts(experts, layer)
        if not self._is_tied():
            self._add_head()
        if self.missing:
            count = len(self.missing)
            rest = f" and {count - 1} more tensors are missing" if count > 1 else " is missing"
            raise CheckpointError(f"{self.weights.directory}: {self.missing[0]}{rest}")
        self._refuse_unknown()
        return self.found

    def _find_prefix(self) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in self.weights:
                return prefix
        raise CheckpointError(
            f"{self.weights.directory}: there is no {next(iter(_PREFIXES))}embed_tokens.weight, so this is not a "
            "model that writes text"
        )

    def _add_part(self, part: Part, layer: int, *, within: str) -> None:
        sizes = self.family.sizes(self.settings, layer)
        shape = tuple(sizes[size] for size in part.shape)
        source = f"{self.prefix}{within}{part.source}"
        if not self._take(source, shape):
            return
        name = f"blk.{layer}.{part.target}"
        if part.target is None:
            mapped, _, kind = f"model.{within}{part.source}".rpartition(".")
            name = f"{self._mapped(mapped)}.{kind}"
        module = source.removesuffix(".weight") if len(shape) == 2 else None
        rows = _neighbours(shape[0], sizes["head"]) if part.rotated else None
        self.found.append(GGUFTensor(name, shape, (Piece(source, module, rows, offset=part.offset),)))

    def _is_tied(self) -> bool:
        """Whether the embedding is also the head; not if a head of its own is stored, as Transformers reads it."""
        if not self.settings.tie_word_embeddings or self.head not in self.weights:
            return bool(self.settings.tie_word_embeddings)
        embedding, head = (self.weights.tensor(name) for name in (f"{self.prefix}embed_tokens.weight", self.head))
        return torch.equal(embedding, head)

    def _add_head(self) -> None:
        shape = (self.settings.vocab_size, self.settings.hidden_size)
        if self._take(self.head, shape):
            piece = Piece(self.head, self.head.removesuffix(".weight"))
            self.found.append(GGUFTensor(f"{self._mapped('lm_head')}.weight", shape, (piece,)))

    def _add_experts(self, experts: Experts, layer: int) -> None:
        sizes = self.family.sizes(self.settings, layer)
        count, inner, hidden = sizes["experts"], sizes["expert"], sizes["hidden"]
        module = f"{self.prefix}layers.{layer}.{experts.module}"
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        if f"{module}.gate_up_proj" not in self.weights:
            for kind, shape in shapes.items():
                sources = [f"{module}.{expert}.{kind}_proj.weight" for expert in range(count)]
                if all([self._take(source, shape) for source in sources]):  # a list: every missing one is named
                    pieces = tuple(Piece(source, source.removesuffix(".weight")) for source in sources)
                    self.found.append(GGUFTensor(f"blk.{layer}.ffn_{kind}_exps.weight", (count, *shape), pieces))
            return
        gate_up, down = f"{module}.gate_up_proj", f"{module}.down_proj"
        if not (self._take(gate_up, (count, 2 * inner, hidden)) & self._take(down, (count, hidden, inner))):
            return
        rows: dict[str, tuple[str, tuple[slice, ...]]] = {
            "gate": (gate_up, (slice(inner),)),
            "up": (gate_up, (slice(inner, None),)),
            "down": (down, ()),
        }
        if experts.fused:
            # gate and up have the same input, so either name finds its importance
            rows = {"gate_up": (gate_up, ()), "down": (down, ())}
            shapes["gate_up"] = (2 * inner, hidden)
        for kind, (whole, index) in rows.items():
            shared = "gate_proj" if kind == "gate_up" else f"{kind}_proj"
            pieces = tuple(
                Piece(whole, f"{module}.{expert}.{shared}", index=(expert, *index)) for expert in range(count)
            )
            self.found.append(GGUFTensor(f"blk.{layer}.ffn_{kind}_exps.weight", (count, *shapes[kind]), pieces))

    def _take(self, source: str, shape: tuple[int, ...]) -> bool:
        """Whether the model has this tensor, in this shape."""
        if source not in self.weights:
            self.missing.append(source)
            return False
        if self.weights.shape(source) != shape:
            raise CheckpointError(
                f"{self.weights.path_of(source)}: {source} is {list(self.weights.shape(source))}, config.json makes it "
                f"{list(shape)}"
            )
        self.taken.add(source)
        return True

    def _mapped(self, module: str) -> str:
        name = self.name_map.get_name(module)
        if name is None:
            raise ValueError(f"gguf has no name for {module} of {self.family.architecture}")
        return name

    def _refuse_unknown(self) -> None:
        def known(name: str) -> bool:
            # beside a text model that is a part of one, there are towers for images and sound
            foreign = self.prefix != "model." and not name.startswith(self.prefix)
            unused = self.family.unused(self.settings, name.removeprefix(self.prefix))
            return name in self.taken or foreign or unused or name == self.head or name.endswith(_BUFFERS)

        unknown = [name for name in self.weights.names if not known(name)]
        if unknown:
            others = f" and {len(unknown) - 1} more tensors are" if len(unknown) > 1 else " is"
            raise CheckpointError(
                f"{self.weights.path_of(unknown[0])}: {unknown[0]}{others} not part of a {self.family.architecture} "
                "model as llama.cpp knows it"
            )


def _all_positive(counts: Mapping[str, Any]) -> bool:
    return all(type(value) is int and value > 0 for value in counts.values())


def _one_or_all(values: list[int]) -> int | list[int]:
    """A hyper-parameter that has a value for each layer, unless they are all the same."""
    return values[0] if len(set(values)) == 1 else values


def _neighbours(rows: int, head: int) -> Tensor:
    """The order of rows in which the two halves of each head alternate, int64 `[rows]`.

    Hugging Face rotates entry `j` of a head with entry `j + head / 2`, ggml's older RoPE entry `2 j` with `2 j + 1`.
    """
    return torch.arange(rows).view(-1, 2, head // 2).transpose(1, 2).reshape(-1)
