import json
import random
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.mixture import FileType, ModelShape, allowed, fall_back, read_override, tensor_types

# what llama.cpp's quantizer chose; the file says how it was made
GOLDEN = json.loads((Path(__file__).parent / "golden_mixtures.json").read_text(encoding="utf-8"))

DENSE = ModelShape("llama", layers=8, experts=0, heads=4, kv_heads=4)
TENSORS = {
    "token_embd.weight": (512, 256),
    "output_norm.weight": (256,),
    "output.weight": (512, 256),
    **{f"blk.{layer}.attn_v.weight": (256, 256) for layer in range(8)},
    **{f"blk.{layer}.ffn_down.weight": (256, 512) for layer in range(8)},
}


def expanded(model: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A value per tensor from one per name with a `*` for the layer, which may be a list over the layers."""
    full = {}
    for name, value in values.items():
        for layer in range(model["layers"] if "*" in name else 1):
            tensor = name.replace("*", str(layer))
            if tensor not in model["absent"]:
                full[tensor] = value[layer] if isinstance(value, list) else value
    return full


def case_name(case: dict[str, Any]) -> str:
    remarks = ["imatrix"] * case["weighted"] + [pattern for pattern, _ in case["overrides"]]
    return " ".join([case["model"], case["file_type"], *remarks])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=case_name)
def test_types_are_those_that_llama_cpp_chose(case: dict[str, Any]) -> None:
    model = GOLDEN["models"][case["model"]]
    tensors = expanded(model, {name: tuple(shape) for name, shape in model["tensors"].items()})
    shape = ModelShape(*(model[key] for key in ("architecture", "layers", "experts", "heads", "kv_heads")))
    overrides = [(pattern, GGMLType(name)) for pattern, name in case["overrides"]]
    found = tensor_types(tensors, FileType(case["file_type"]), shape, overrides, weighted=case["weighted"])
    assert found == expanded(model, case["types"])


def test_the_golden_types_cover_every_file_type_and_every_type_of_the_rules() -> None:
    assert {case["file_type"] for case in GOLDEN["cases"]} == set(FileType.__members__)
    types = {
        entry
        for case in GOLDEN["cases"]
        for value in case["types"].values()
        for entry in (value if isinstance(value, list) else [value])
    }
    assert types - {""} == set(GGMLType.__members__)


def test_the_order_of_the_file_does_not_matter() -> None:
    names = list(TENSORS)
    random.Random(0).shuffle(names)
    shuffled = tensor_types({name: TENSORS[name] for name in names}, FileType.Q4_K_M, DENSE)
    assert list(shuffled) == names
    assert shuffled == tensor_types(TENSORS, FileType.Q4_K_M, DENSE)


def test_ten_layers_are_counted_and_not_sorted_as_words() -> None:
    tensors = {f"blk.{layer}.attn_v.weight": (256, 256) for layer in range(16)}
    types = tensor_types(tensors, FileType.Q4_K_S, ModelShape("llama", 16, 0, 4, 4))
    assert [name for name, ggml_type in types.items() if ggml_type is GGMLType.Q5_K] == list(tensors)[:4]


@pytest.mark.parametrize(
    ("file_type", "number", "main_type"),
    [
        (FileType.F32, 0, GGMLType.F32),
        (FileType.F16, 1, GGMLType.F16),
        (FileType.Q4_0, 2, GGMLType.Q4_0),
        (FileType.Q8_0, 7, GGMLType.Q8_0),
        (FileType.Q4_K_S, 14, GGMLType.Q4_K),
        (FileType.Q4_K_M, 15, GGMLType.Q4_K),
        (FileType.Q5_K_M, 17, GGMLType.Q5_K),
        (FileType.Q6_K, 18, GGMLType.Q6_K),
        (FileType.BF16, 32, GGMLType.BF16),
    ],
)
def test_numbers_of_the_gguf_specification(file_type: FileType, number: int, main_type: GGMLType) -> None:
    assert file_type.number == number
    assert file_type.main_type is main_type


@pytest.mark.parametrize(
    ("ggml_type", "columns", "expected"),
    [
        (GGMLType.Q4_K, 512, GGMLType.Q4_K),
        (GGMLType.Q4_K, 576, GGMLType.Q5_0),
        (GGMLType.Q5_K, 576, GGMLType.Q5_1),
        (GGMLType.Q6_K, 576, GGMLType.Q8_0),
        (GGMLType.Q6_K, 80, GGMLType.F16),
        (GGMLType.Q8_0, 80, GGMLType.F16),
        (GGMLType.BF16, 7, GGMLType.BF16),
    ],
)
def test_fall_backs(ggml_type: GGMLType, columns: int, expected: GGMLType) -> None:
    assert fall_back(ggml_type, columns) is expected
    assert allowed(ggml_type, columns) is (ggml_type is expected)


# overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attn_v=q6_k", ("attn_v", GGMLType.Q6_K)),
        (r"blk\.0\.FFN_down=BF16", (r"blk\.0\.ffn_down", GGMLType.BF16)),
    ],
)
def test_an_override_reads_as_llama_quantize_reads_it(text: str, expected: tuple[str, GGMLType]) -> None:
    assert read_override(text) == expected


@pytest.mark.parametrize("text", ["attn_v", "=q6_k", "attn_v=", "attn_v=q7_k", "a=b=q6_k", ""])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not PATTERN=TYPE, as in attn_v=Q6_K, with a type among F32, .*Q6_K$"):
        read_override(text)


@pytest.mark.parametrize(
    ("file_type", "pattern", "message"),
    [
        (FileType.Q4_K_M, "attn_v(", r"the tensor name pattern 'attn_v\(' is no regular expression: "),
        (FileType.Q4_K_M, "attn_w", "the tensor name pattern 'attn_w' matches no tensor that is quantized"),
        (FileType.Q4_K_M, "output_norm", "the tensor name pattern 'output_norm' matches no tensor that is quantized"),
        (FileType.F16, "attn_v", "can be overridden in quantized files only; F16 stores every matrix alike"),
    ],
)
def test_an_override_without_effect_is_refused(file_type: FileType, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensor_types(TENSORS, file_type, DENSE, [(pattern, GGMLType.Q6_K)])
