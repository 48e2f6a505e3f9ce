from itertools import chain

import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.selection.depth import CHUNKS, check_chunks, chunk_of, count_layers, in_range, layer_of

LAYER_NAMES = [
    ("model.layers.11.self_attn.q_proj", 11),  # Llama, Qwen, Mistral, Gemma
    ("model.layers.11", 11),
    ("layers.0.mlp.up_proj", 0),
    ("transformer.h.7.attn.c_attn", 7),  # GPT-2, Falcon
    ("gpt_neox.layers.3.mlp.dense_h_to_4h", 3),
    ("transformer.blocks.5.ffn.up_proj", 5),  # MPT
    ("model.decoder.layers.4.fc1", 4),  # OPT
    ("model.language_model.layers.21.mlp.gate_proj", 21),
    ("language_model.model.layers.2.mlp.gate_proj", 2),
    ("backbone.layers.63.mixer.in_proj", 63),  # Mamba
    ("bert.encoder.layer.9.output.dense", 9),
    ("encoder.block.6.layer.0.SelfAttention.q", 6),  # T5 has layers inside its blocks
    ("decoder.block.6.layer.2.DenseReluDense.wo", 6),
    ("model.layers.11.mlp.experts.3.up_proj", 11),
    ("model.layers.11.mlp.shared_expert.up_proj", 11),
    ("model.layers.1.block_sparse_moe.experts.63.w1", 1),
    ("lm_head", None),
    ("model.embed_tokens", None),
    ("model.norm", None),
    ("model.layers", None),
    ("model.layers.norm", None),
    ("model.sublayers.3.fc", None),
    ("experts.3.up_proj", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "layer"), LAYER_NAMES, ids=lambda part: str(part))
def test_layer_of_the_names_of_many_architectures(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_count_layers() -> None:
    assert count_layers(["model.embed_tokens", "model.layers.0.q", "model.layers.9.mlp.experts.63.w1", "lm_head"]) == 10
    assert count_layers(["model.layers.0.q"]) == 1
    assert count_layers(["lm_head"]) == 0
    assert count_layers([]) == 0


def names_of(layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.up_proj" for layer in range(layers)]


def test_the_chunks_meet_and_cover_the_depth() -> None:
    ranges = list(CHUNKS.values())
    assert ranges[0][0] == 0.0
    assert ranges[-1][1] == 1.0
    assert [end for _, end in ranges[:-1]] == [start for start, _ in ranges[1:]]


@pytest.mark.parametrize("layers", range(1, 201))
def test_the_chunks_partition_every_model(layers: int) -> None:
    taken = {chunk: [n for n in names_of(layers) if chunk_of(n, layers) == chunk] for chunk in CHUNKS}
    assert [*chain.from_iterable(taken.values())] == names_of(layers)
    for name in names_of(layers):
        assert sum(in_range(name, layers, start, end) for start, end in CHUNKS.values()) == 1
    # in whole percents, with no floating point at all
    bounds = [0, 20, 40, 77, 100]
    for number, chunk in enumerate(CHUNKS):
        expected = [n for n in range(layers) if bounds[number] * layers <= 100 * n < bounds[number + 1] * layers]
        assert taken[chunk] == [names_of(layers)[n] for n in expected]


@pytest.mark.parametrize(
    ("layers", "chunk", "expected"),
    [
        (8, "early", [0, 1]),
        (8, "factual", [2, 3]),
        (8, "reasoning", [4, 5, 6]),
        (8, "governance", [7]),
        (40, "early", [*range(8)]),
        (40, "factual", [*range(8, 16)]),
        (40, "reasoning", [*range(16, 31)]),
        (40, "governance", [*range(31, 40)]),
        (1, "early", [0]),
        (1, "reasoning", []),
    ],
)
def test_chunks_by_hand(layers: int, chunk: str, expected: list[int]) -> None:
    assert [layer for layer, name in enumerate(names_of(layers)) if chunk_of(name, layers) == chunk] == expected


@pytest.mark.parametrize(
    ("bound", "layers", "layer"), [(0.55, 100, 55), (0.07, 100, 7), (0.28, 25, 7), (0.28, 175, 49)]
)
def test_a_product_a_hair_above_a_whole_layer_takes_that_layer(bound: float, layers: int, layer: int) -> None:
    assert bound * layers > layer
    name = f"model.layers.{layer}.mlp"
    assert in_range(name, layers, bound, 1.0)
    assert not in_range(name, layers, 0.0, bound)


def test_a_product_a_hair_below_a_whole_layer_starts_at_that_layer() -> None:
    assert 0.29 * 100 < 29
    assert not in_range("model.layers.28.mlp", 100, 0.29, 1.0)
    assert in_range("model.layers.29.mlp", 100, 0.29, 1.0)


def test_experts_share_the_depth_of_their_layer() -> None:
    names = [f"model.layers.5.mlp.experts.{expert}.up_proj" for expert in range(64)]
    assert {chunk_of(name, 8) for name in names} == {"reasoning"}


def test_outside_the_layers_there_is_no_depth() -> None:
    assert not in_range("lm_head", 8, 0.0, 1.0)
    assert chunk_of("lm_head", 8) is None


def test_check_chunks_orders_by_depth_and_drops_repeats() -> None:
    assert check_chunks(["governance", "early", "governance"]) == ("early", "governance")
    assert check_chunks("reasoning") == ("reasoning",)


@pytest.mark.parametrize("chunks", [["late"], ["early", "Reasoning"], "earl", [1]])
def test_an_unknown_chunk_is_named(chunks: list[str] | str) -> None:
    with pytest.raises(ConfigError, match=r"chunk .* is unknown, expected some of \['early', 'factual', 'reasoning'"):
        check_chunks(chunks)
