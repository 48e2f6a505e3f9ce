"""A GGUF file as a Transformers model, made of the file's own metadata and tensors.

Nothing here is shared with the export. Transformers reads GGUF files too, but passes over what it does not know, such
as the scaling of RoPE, biases and the width of heads, and is then another model without a word. Here a key of the
architecture or a tensor that is not understood is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srd_modifier.errors import CheckpointError
from srd_modifier.evaluation.gguf_families import FAMILIES, ROPE_FACTORS, Family, Keys
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.reader import GGUFFile


def build_model(file: GGUFFile, dtype: torch.dtype) -> Any:
    """The Transformers model that computes what llama.cpp computes with this file.

    Args:
        file: The file.
        dtype: What the weights are converted to, from float32.

    Raises:
        CheckpointError: The architecture is not one of those known here, or a key or a tensor is missing, is not
            understood, or has the wrong shape.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family = FAMILIES.get(file.architecture)
    if family is None:
        raise CheckpointError(
            f"{file.path}: a model of the architecture {file.architecture!r} cannot be scored from its GGUF file, "
            f"only one of {', '.join(sorted(FAMILIES))}"
        )
    keys = Keys(file)
    fields = family.fields(keys)
    keys.check_all_read()
    weights = dict(_weights(file, family, fields, dtype))
    try:
        config = AutoConfig.for_model(family.model_type, **fields)
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file.path}: its metadata and tensors do not make a model: {reason}") from error
    # Transformers fills what is missing with random numbers, leaves out what it has no place for, and only warns
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise CheckpointError(
            f"{file.path}: {len(wrong)} weights are missing, have the wrong shape or do not belong to a "
            f"{family.model_type} model: {', '.join(wrong[:5])}" + (", ..." if len(wrong) > 5 else "")
        )
    if ROPE_FACTORS in file.tensors:
        _divide_frequencies(model, family, file)
    return model


def _weights(
    file: GGUFFile, family: Family, fields: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in a Transformers checkpoint, experts one by one."""
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        target = family.name(name)
        if target is None:
            raise CheckpointError(
                f"{file.path}: the tensor {name} has no place in a Transformers model of the architecture "
                f"{file.architecture!r}"
            )
        weight = file.tensor(name)
        if family.interleaved and ".attn_q." in name:
            weight = _halves_together(weight, fields["num_attention_heads"])
        elif family.interleaved and ".attn_k." in name:
            weight = _halves_together(weight, fields["num_key_value_heads"])
        elif name.endswith("_norm.weight"):
            weight -= family.norm_offset
        weight = weight.to(dtype)
        if "*" not in target:
            yield target, weight
        else:
            for number, expert in enumerate(weight):
                yield target.replace("*", str(number)), expert


def _halves_together(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of rows, in which the two halves that RoPE turns together alternate."""
    if weight.shape[0] % (2 * heads):
        return weight  # of the wrong shape, which the model will say
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _divide_frequencies(model: Any, family: Family, file: GGUFFile) -> None:
    """Apply the factors that slow RoPE down, as in Llama 3, or stop it, as in Gemma 4."""
    factors = file.tensor(ROPE_FACTORS)
    frequencies = None if family.frequencies is None else getattr(model.model.rotary_emb, family.frequencies)
    if frequencies is None or frequencies.shape != factors.shape:
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} does not fit RoPE of a {family.model_type} model")
    frequencies.div_(factors)


class LlamaCppTokenizer:
    """llama.cpp's own tokenizer, called as Transformers' are; llama.cpp is started when it is first asked."""

    def __init__(self, file: GGUFFile) -> None:
        self._path = file.path
        self._llama: LlamaCpp | None = None
        self.bos_token_id: int | None = file.metadata.get("tokenizer.ggml.bos_token_id")
        self.eos_token_id: int | None = file.metadata.get("tokenizer.ggml.eos_token_id")

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        """The ids of the text's tokens.

        Args:
            text: Any text; a megabyte takes about a second.
            add_special_tokens: With the special tokens that the file says belong to every text.
            verbose: Not used.

        Raises:
            SRDError: llama.cpp refuses the file or the text.
        """
        return {"input_ids": self._open().tokenize(text, add_special=add_special_tokens)}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens.

        Args:
            tokens: Their ids.
            skip_special_tokens: Leave BOS and EOS out.
        """
        special = (self.bos_token_id, self.eos_token_id) if skip_special_tokens else ()
        return self._open().detokenize([token for token in tokens if token not in special])

    def close(self) -> None:
        """End llama.cpp; it is started again if it is asked again."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def _open(self) -> LlamaCpp:
        if self._llama is None:
            self._llama = LlamaCpp(self._path)
        return self._llama
