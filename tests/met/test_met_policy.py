import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.met import INTENTS, Policy, build_met, encode_met, policy_of


def test_the_default_policy():
    policy = Policy.default()
    assert tuple(policy.intents) == INTENTS == ("INFORM", "CLARIFY", "REFUSE", "UNCERTAIN", "HARM", "DECEIVE")
    assert policy.chunks("INFORM") == ("early",)
    for intent in ("CLARIFY", "REFUSE", "UNCERTAIN"):
        assert policy.chunks(intent) == ("early", "governance")
    for intent in ("HARM", "DECEIVE"):
        assert policy.chunks(intent) == ("early", "factual", "reasoning", "governance")


def test_an_unknown_intent_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"intent 'inform' is unknown, expected one of INFORM, CLARIFY, .*DECEIVE$"):
        Policy.default().chunks("inform")


def test_a_mapping_is_put_into_depth_order():
    policy = Policy.from_mapping({"TRIAGE": ["reasoning", "early"], "PLAIN": []}, "here")
    assert policy.intents == {"TRIAGE": ("early", "reasoning"), "PLAIN": ()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "here has no intents, expected a list of chunks for each intent"),
        (["early"], "here has no intents, expected a list of chunks for each intent"),
        ({"": ["early"]}, "here: intent '' is not a name; put quotes around it"),
        ({False: ["early"]}, "here: intent False is not a name; put quotes around it"),
        ({"A": "early"}, r"here: intent A is 'early', expected a list out of \['early', 'factual', "),
        ({"A": [1]}, r"here: intent A is \[1\], expected a list out of"),
        ({"A": None}, "here: intent A is None, expected a list out of"),
        ({"A": ["late"]}, "here: intent A: chunk 'late' is unknown, expected some of"),
        ({"A": ["early", "early"]}, "here: intent A lists a chunk twice"),
    ],
)
def test_what_is_no_policy_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Policy.from_mapping(values, "here")


def test_a_custom_policy_is_read_from_yaml(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("# ours\nINFORM: [early, factual]\nAUDIT:\n  - governance\n  - early\n")
    assert Policy.from_yaml(path).intents == {"INFORM": ("early", "factual"), "AUDIT": ("early", "governance")}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ConfigError, r"p\.yaml has no intents"),
        ("- early\n", ConfigError, r"p\.yaml has no intents"),
        ("INFORM: [early\n", CheckpointError, r"p\.yaml is not YAML: "),
        ("? [a, b]\n: [early]\n", CheckpointError, r"p\.yaml is not YAML: "),
        ("A: !!python/object:os.system [early]\n", CheckpointError, r"p\.yaml is not YAML: could not determine"),
        ("NO: [early]\n", ConfigError, r"p\.yaml: intent False is not a name; put quotes around it"),
        ("A: [early]\nB: [early]\nA: []\n", ConfigError, r"p\.yaml: intent A is there twice"),
        ("A: [late]\n", ConfigError, r"p\.yaml: intent A: chunk 'late' is unknown"),
    ],
)
def test_yaml_that_is_no_policy_is_refused_in_one_sentence(text, error, message, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        Policy.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_policy_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"p\.yaml: there is no such policy"):
        Policy.from_yaml(tmp_path / "p.yaml")
    with pytest.raises(CheckpointError, match=f"cannot read {tmp_path}"):
        Policy.from_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match=r"cannot read .*bytes\.yaml"):
        Policy.from_yaml(tmp_path / "bytes.yaml")


def test_a_checkpoint_without_a_policy_has_the_default(tiny_llama):
    assert policy_of(tiny_llama) == Policy.default()


def test_a_checkpoint_brings_its_own_policy(tiny_llama, tmp_path):
    own = Policy({"AUDIT": ("early", "governance"), "PLAIN": ()})
    (tmp_path / "met.json").write_bytes(encode_met(build_met(tiny_llama, policy=own)))
    assert policy_of(tmp_path) == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda met: met["hydration"].update(INFORM=["late"]), r"met\.json: hydration\.INFORM\[0\] is \"late\", expec"),
        (
            lambda met: met.update(version=2),
            r"met\.json: version is 2, this srd-modifier reads 1; upgrade srd-modifier",
        ),
        (lambda met: met["budgets"].pop("INFORM"), r"met\.json: set of intents in budgets is \['CLARIFY', "),
    ],
)
def test_a_damaged_policy_of_a_checkpoint_is_never_taken(
    change: Callable[[dict[str, Any]], Any], message: str, tiny_llama: Path, tmp_path: Path
):
    met = build_met(tiny_llama)
    change(met)
    (tmp_path / "met.json").write_text(json.dumps(met))
    with pytest.raises(CheckpointError, match=message):
        policy_of(tmp_path)


def test_a_policy_of_a_checkpoint_that_is_not_json_is_never_taken(tmp_path):
    (tmp_path / "met.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*met\.json"):
        policy_of(tmp_path)
