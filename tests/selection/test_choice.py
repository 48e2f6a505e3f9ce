from typing import Any

import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.selection.budget import Budget
from srd_modifier.selection.choice import budget_of, check_choice, choose

LINEARS = [
    f"model.layers.{layer}.{module}"
    for layer in range(8)
    for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
MODEL = ["model.embed_tokens", *LINEARS, "model.norm", "lm_head"]


def of_layers(*layers: int) -> list[str]:
    return [name for name in LINEARS if int(name.split(".")[2]) in layers]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", LINEARS),
        ({"depth": [0.40, 0.77]}, of_layers(4, 5, 6)),
        ({"depth": (0.5, 0.75)}, of_layers(4, 5)),
        ({"depth": [0, 1]}, LINEARS),
        ({"chunks": ["reasoning"]}, of_layers(4, 5, 6)),
        ({"chunks": ["governance", "early"]}, of_layers(0, 1, 7)),
        ({"chunks": ["early", "factual", "reasoning", "governance"]}, LINEARS),
        ({"targets": ["model.layers.3.mlp.up_proj"]}, ["model.layers.3.mlp.up_proj"]),
        ({"targets": ["re:.*down_proj"]}, [name for name in LINEARS if name.endswith("down_proj")]),
        (
            {"targets": [r"re:model\.layers\.7\.", "model.layers.0.mlp.up_proj"]},
            ["model.layers.0.mlp.up_proj", *of_layers(7)],
        ),
        ({"targets": ["re:.*up_proj", "re:.*mlp"]}, [name for name in LINEARS if "mlp" in name]),
    ],
    ids=str,
)
def test_each_kind_of_choice(choice: Any, expected: list[str]) -> None:
    assert check_choice(choice) is choice
    assert choose(LINEARS, choice, model_names=MODEL) == expected


def test_all_takes_modules_outside_the_layers_and_ranges_do_not() -> None:
    names = [*LINEARS, "lm_head"]
    assert choose(names, "all", model_names=MODEL) == names
    assert choose(names, {"depth": [0.0, 1.0]}, model_names=MODEL) == LINEARS


def test_the_order_of_the_names_is_kept() -> None:
    backwards = LINEARS[::-1]
    assert choose(backwards, {"chunks": ["reasoning", "early"]}, model_names=MODEL) == of_layers(0, 1, 4, 5, 6)[::-1]


def test_depth_counts_the_layers_of_the_model_not_of_the_names() -> None:
    # only layers 0 to 3 are quantized: still layers of an 8-layer model
    assert choose(of_layers(0, 1, 2, 3), {"depth": [0.25, 0.5]}, model_names=MODEL) == of_layers(2, 3)


def test_a_mixture_of_experts_takes_all_experts_of_a_layer() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(8) for expert in range(16)]
    chosen = choose(names, {"chunks": ["reasoning"]}, model_names=names)
    assert chosen == [name for name in names if name.split(".")[2] in "456"]


def test_the_input_is_not_handed_out() -> None:
    chosen = choose(LINEARS, "all", model_names=MODEL)
    assert chosen == LINEARS
    assert chosen is not LINEARS


@pytest.mark.parametrize(
    ("choice", "budget"),
    [
        ({"budget": "13MB"}, Budget(bytes=13_000_000)),
        ({"budget": 4096}, Budget(bytes=4096)),
        ({"budget": "5.5bpw"}, Budget(bits_per_weight=5.5)),
        ({"max_divergence": 1e-3}, Budget(max_divergence=0.001)),
        ({"max_divergence": "1e-3"}, Budget(max_divergence=0.001)),
    ],
    ids=str,
)
def test_a_budget_takes_all_until_it_is_spent(choice: Any, budget: Budget) -> None:
    assert check_choice(choice) is choice
    assert budget_of(choice) == budget
    names = [*LINEARS, "lm_head"]
    assert choose(names, choice, model_names=MODEL) == names
    assert choose(names, choice, model_names=MODEL) is not names


@pytest.mark.parametrize("choice", ["all", {"depth": [0.0, 0.5]}, {"chunks": ["early"]}, {"targets": ["lm_head"]}])
def test_other_choices_have_no_budget(choice: Any) -> None:
    assert budget_of(choice) is None


def test_all_kinds_are_in_the_message() -> None:
    message = (
        "correct is 'everything', expected 'all' or one of {depth: ...}, {chunks: ...}, {targets: ...}, "
        "{budget: ...}, {max_divergence: ...}"
    )
    with pytest.raises(ConfigError) as raised:
        check_choice("everything")
    assert str(raised.value) == message


BAD_CHOICES: list[tuple[Any, str]] = [
    ("everything", r"correct is 'everything', expected 'all' or one of \{depth: \.\.\.\}, \{chunks: \.\.\.\}"),
    ("", "correct is ''"),
    (None, "correct is None"),
    ([], r"correct is \[\]"),
    ([0.4, 0.77], r"correct is \[0\.4, 0\.77\]"),
    ({}, r"correct is \{\}"),
    ({"layers": [1]}, r"correct is \{'layers': \[1\]\}"),
    ({3: [1]}, r"correct is \{3: \[1\]\}"),
    ({"depth": [0.0, 0.5], "chunks": ["early"]}, "correct is .*expected 'all' or one of"),
    ({"chunks": "early"}, "correct.chunks is 'early', expected a list"),
    ({"chunks": {"early"}}, r"correct.chunks is \{'early'\}, expected a list"),
    ({"chunks": []}, r"correct.chunks is \[\], expected a list"),
    ({"chunks": None}, "correct.chunks is None, expected a list"),
    ({"chunks": ["late"]}, "chunk 'late' is unknown, expected some of"),
    ({"chunks": [["early"]]}, r"chunk \['early'\] is unknown"),
    ({"targets": "re:.*"}, r"correct.targets is 're:\.\*', expected a list"),
    ({"targets": []}, r"correct.targets is \[\], expected a list"),
    ({"targets": [1]}, r"correct.targets is \[1\], expected module names and 're:' patterns"),
    ({"depth": 0.5}, r"correct.depth is 0\.5, expected a list"),
    ({"depth": [0.5]}, r"correct.depth is \[0\.5\], expected \[start, end\] with 0 <= start < end <= 1"),
    ({"depth": [0.1, 0.2, 0.3]}, "correct.depth is"),
    ({"depth": [0.5, 0.5]}, "correct.depth is"),
    ({"depth": [0.7, 0.4]}, "correct.depth is"),
    ({"depth": [-0.1, 0.4]}, "correct.depth is"),
    ({"depth": [0.4, 1.1]}, "correct.depth is"),
    ({"depth": [0.4, float("nan")]}, "correct.depth is"),
    ({"depth": [40, 77]}, "correct.depth is"),
    ({"depth": ["0.4", "0.77"]}, "correct.depth is"),
    ({"depth": [False, True]}, "correct.depth is"),
    ({"budget": "13 apples"}, "correct.budget is '13 apples', expected a size such as 13MB or 12.5MiB"),
    ({"budget": 0}, "correct.budget is 0, expected"),
    ({"budget": [13]}, r"correct.budget is \[13\], expected"),
    ({"budget": "13MB", "chunks": ["early"]}, "correct is .*expected 'all' or one of"),
    ({"max_divergence": "13MB"}, "correct.max_divergence is '13MB', expected a number above 0 such as 1e-3"),
    ({"max_divergence": None}, "correct.max_divergence is None, expected"),
]


@pytest.mark.parametrize(("choice", "message"), BAD_CHOICES, ids=lambda part: str(part)[:40])
def test_a_bad_choice_says_what_is_accepted(choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_choice(choice)


def test_a_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"correct.targets: 're:\.\*gate_proj' matches no quantized module"):
        choose(LINEARS, {"targets": ["re:.*up_proj", "re:.*gate_proj"]}, model_names=MODEL)


def test_a_target_that_is_not_a_regular_expression() -> None:
    with pytest.raises(ConfigError, match=r"the pattern 're:\[' is not a regular expression"):
        choose(LINEARS, {"targets": ["re:["]}, model_names=MODEL)


def test_a_range_between_two_layers_takes_nothing() -> None:
    with pytest.raises(ConfigError, match=r"correct.depth \[0\.51, 0\.52\] takes none .* in 8 decoder layers"):
        choose(LINEARS, {"depth": [0.51, 0.52]}, model_names=MODEL)


def test_a_chunk_whose_layers_are_not_quantized() -> None:
    with pytest.raises(ConfigError, match=r"correct.chunks \['governance'\] takes none of the quantized modules"):
        choose(of_layers(0, 1), {"chunks": ["governance"]}, model_names=MODEL)


def test_depth_in_a_model_without_layers() -> None:
    with pytest.raises(ConfigError, match="takes none of the quantized modules in 0 decoder layers"):
        choose(["fc1", "fc2"], {"depth": [0.0, 1.0]}, model_names=["fc1", "fc2"])


def test_a_taller_vision_tower_does_not_move_the_decoder_layers() -> None:
    vision = [f"model.visual.blocks.{layer}.attn.qkv" for layer in range(32)]
    assert choose(LINEARS, {"chunks": ["reasoning"]}, model_names=[*vision, *MODEL]) == of_layers(4, 5, 6)
