import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rtn import write_checkpoint
from small_checkpoint import edit_json
from small_models import write_model

from srd_modifier.met import Policy, build_met, encode_met, estimate_met, read_met
from srd_modifier.residual import ResidualFormat

MEASURE = "srd_modifier.transformers.measure"


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama as W4A16 with a residual."""
    return write_checkpoint(tiny_llama, tmp_path_factory.mktemp("met-cli") / "model")


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text("AUDIT: [governance, early]\nPLAIN: []\n")
    return path


def rows(text: str) -> dict[str, list[str]]:
    split = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {name: values for name, *values in split}


def test_the_installed_command_writes_the_policy_and_shows_it(srd_process, model, tmp_path):
    done = srd_process("met", model, "--output", tmp_path / "met.json", "--storage-speed", "500MB/s")
    assert (done.status, done.stderr) == (0, "")
    met = read_met(tmp_path / "met.json")
    assert met == build_met(model, storage_speed=500e6)
    files, found = met["files"], rows(done.stdout)
    assert done.stdout.startswith("LlamaForCausalLM, 8 layers: measured")
    assert "from a storage of 500 MB/s" in done.stdout
    assert f"wrote {tmp_path / 'met.json'}" in done.stdout
    chunk = met["chunks"]["reasoning"]
    assert found["reasoning"] == ["40% - 77%", "4 - 6", f"{chunk['base_bytes']:,}", f"{chunk['residual_bytes']:,}"]
    assert found["pinned"] == ["", "outside", f"{met['pinned']['bytes']:,}", "0"]
    assert found["all"] == ["", "8", f"{files['base_bytes']:,}", f"{files['residual_bytes']:,}"]
    budget = met["budgets"]["REFUSE"]
    assert found["REFUSE"] == [
        "early, governance",
        f"{budget['memory_bytes']:,}",
        f"{budget['residual_bytes']:,}",
        f"{budget['load_seconds'] * 1000:.2f} ms",
        f"{budget['hydrate_seconds'] * 1000:.2f} ms",
    ]
    assert found["DECEIVE"][0] == "all"
    assert (
        f"{files['header_bytes']:,} bytes of headers and indexes, {files['total_bytes']:,} bytes on disk" in done.stdout
    )


def test_json_is_what_is_written(srd, model, tmp_path):
    done = srd("met", model, "--json", "--output", tmp_path / "met.json")
    assert done.status == 0
    assert done.stdout.encode() == (tmp_path / "met.json").read_bytes() == encode_met(build_met(model))
    assert srd("met", model, "--json").stdout == done.stdout


def test_the_policy_can_lie_in_the_checkpoint(srd, model, custom, tmp_path):
    copy = write_checkpoint(Path(__file__).parents[2] / "examples" / "tiny-llama", tmp_path / "model")
    for _ in range(2):  # it is not one of the files that count
        arguments = ("met", copy, "--policy", custom, "--output", copy / "met.json", "--overwrite")
        assert srd(*arguments).status == 0
        met = read_met(copy / "met.json")
        assert met["hydration"] == {"AUDIT": ["early", "governance"], "PLAIN": []}
        assert met["files"] == build_met(model)["files"]


def test_a_plain_model_says_that_it_has_no_residual(srd, tiny_llama, tmp_path):
    done = srd("met", tiny_llama, "--output", tmp_path / "met.json")
    assert "there is no residual, so every intent takes the same" in done.stdout


def test_a_gguf_file(srd, tiny_llama, tmp_path):
    pytest.importorskip("gguf")
    from srd_modifier.gguf.export import export_gguf

    export_gguf(tiny_llama, tmp_path / "model.gguf")
    done = srd("met", tmp_path / "model.gguf", "--output", tmp_path / "met.json")
    assert done.stdout.startswith("llama, 8 layers: measured")
    assert "a GGUF file has no residual" in done.stdout
    assert read_met(tmp_path / "met.json") == build_met(tmp_path / "model.gguf")


def test_a_mixture_shows_its_experts(srd, tmp_path):
    model = write_model("qwen3moe", tmp_path / "mixture", dtype="float32")
    done = srd("met", model, "--output", tmp_path / "met.json")
    met = read_met(tmp_path / "met.json")
    assert done.stdout.startswith("Qwen3MoeForCausalLM, 4 layers, 2 of 6 experts to a token: measured")
    assert rows(done.stdout)["factual"][-1] == f"{met['chunks']['factual']['expert_base_bytes']:,}"
    assert rows(done.stdout)["HARM"][-1] == f"{met['budgets']['HARM']['active_bytes_per_token']:,}"


def test_an_estimate_is_called_one(srd, tiny_llama, tmp_path):
    output = tmp_path / "met.json"
    options = ("--group-size", 64, "--residual-bits", 4, "--residual-group-size", 32)
    done = srd("met", "--estimate", tiny_llama / "config.json", "--output", output, *options)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.count("ESTIMATE") == 2
    assert "8 layers: ESTIMATE from a config, W4A16 in groups of 64, 4-bit residual in groups of 32" in " ".join(
        done.stdout.split()
    )
    assert "measured" not in done.stdout
    fmt = ResidualFormat(bits=4, group_size=32)
    assert read_met(output) == estimate_met(tiny_llama, group_size=64, residual=fmt)


def test_an_estimate_without_a_residual_and_with_weights_left_out(srd, tiny_llama, tmp_path):
    config = tmp_path / "config.json"
    config.write_bytes((tiny_llama / "config.json").read_bytes())
    edit_json(config, lambda values: values.update(intermediate_size=520))
    done = srd("met", "--estimate", config, "--residual-bits", 0, "--output", tmp_path / "met.json")
    text = " ".join(done.stdout.split())
    assert "W4A16 in groups of 128, no residual" in text
    assert "the group does not divide the columns of 8 weights, which stay as they are" in text
    assert read_met(tmp_path / "met.json")["files"]["residual_bytes"] == 0


def test_an_existing_output_is_replaced_only_if_asked(srd, model, tmp_path):
    output = tmp_path / "met.json"
    output.write_text("mine")
    done = srd("met", model, "--output", output)
    assert done.sentence == f"{output} already exists; choose another name or pass --overwrite"
    assert output.read_text() == "mine"
    assert srd("met", model, "--output", output, "--overwrite").status == 0
    assert read_met(output)["measured"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--storage-speed", "fast"], "storage speed is 'fast', expected bytes per second such as 2GB/s"),
        (["MODEL", "--policy", "none.yaml"], "none.yaml: there is no such policy"),
        (["nothing/at/all"], "nothing/at/all: there is no such directory"),
        (["none.gguf"], "none.gguf: there is no such directory or GGUF file"),
        (["--estimate", "none.json"], "none.json is missing"),
        (["--estimate", "MODEL", "--group-size", "0"], "group size is 0, expected a number of columns"),
        (["--estimate", "MODEL", "--residual-bits", "7"], "bits is 7, expected one of"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, srd, model, tmp_path):
    pytest.importorskip("gguf")
    given = [model if argument == "MODEL" else argument for argument in arguments]
    done = srd("met", *given, "--output", tmp_path / "met.json")
    assert message in done.sentence
    assert not (tmp_path / "met.json").exists()


def test_a_policy_that_is_none_is_one_sentence(srd, model, custom, tmp_path):
    custom.write_text("AUDIT: [late]\n")
    done = srd("met", model, "--policy", custom, "--output", tmp_path / "met.json")
    assert done.sentence.startswith(f"{custom}: intent AUDIT: chunk 'late' is unknown, expected some of ['early', ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "F.json"], "give either a checkpoint or GGUF file, or --estimate a config"),
        (["DIR", "--estimate", "config.json", "--output", "F.json"], "give either a checkpoint or GGUF file, or"),
        (["DIR"], "give --output a file, or --json or --measure to print only"),
        (["--estimate", "config.json", "--measure"], "--measure loads a checkpoint: give its directory instead of"),
        (["DIR", "--intent", "INFORM", "--output", "F.json"], "--intent chooses what --measure does"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, srd):
    done = srd("met", *arguments)
    assert done.status == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@dataclass(frozen=True)
class Measured:
    """What a measurement gives, with figures that are easy to find again."""

    intent: str
    chunks: tuple[str, ...]
    seconds: float
    residual_bytes: int
    resident_bytes_before: int
    resident_bytes_peak: int | None
    resident_bytes_after: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Policy, torch.dtype]]:
    """How the measurement was called; it is replaced by one that measures nothing."""
    found: list[tuple[Path, Policy, torch.dtype]] = []

    def measure_hydration(directory: Path, policy: Policy, *, dtype: torch.dtype) -> list[Measured]:
        found.append((directory, policy, dtype))
        return [
            Measured(intent, chunks, 0.0125, 1000, 20_000_000, None, 30_000_000)
            for intent, chunks in policy.intents.items()
        ]

    module: Any = ModuleType(MEASURE)
    module.measure_hydration = measure_hydration
    monkeypatch.setitem(sys.modules, MEASURE, module)
    return found


def test_what_was_measured_is_shown(srd, model, calls):
    done = srd("met", model, "--measure")
    assert done.status == 0
    assert calls == [(model, Policy.default(), torch.bfloat16)]
    assert "measured while hydrating, in bfloat16" in done.stdout
    assert rows(done.stdout)["CLARIFY"] == ["early, governance", "1,000", "12.50 ms", "20.0", "-", "30.0"]
    assert "wrote" not in done.stdout


def test_only_the_intents_asked_for_are_measured(srd, model, custom, calls, tmp_path):
    output = tmp_path / "met.json"
    arguments = ("met", model, "--measure", "--policy", custom, "--dtype", "float32", "--output", output, "--json")
    done = srd(*arguments, "--intent", "PLAIN")
    assert calls == [(model, Policy({"PLAIN": ()}), torch.float32)]
    printed = json.loads(done.stdout)
    assert [one["intent"] for one in printed["hydration"]] == ["PLAIN"]
    # the file keeps the whole policy
    assert printed["met"] == read_met(output) == build_met(model, policy=Policy.from_yaml(custom))


def test_the_checkpoints_own_policy_is_measured(srd, tiny_llama, calls, tmp_path):
    model = write_checkpoint(tiny_llama, tmp_path / "model")
    own = Policy({"AUDIT": ("early",)})
    (model / "met.json").write_bytes(encode_met(build_met(model, policy=own)))
    assert srd("met", model, "--measure").status == 0
    assert [policy for _, policy, _ in calls] == [own]


def test_an_unknown_intent_is_one_sentence(srd, model, calls):
    done = srd("met", model, "--measure", "--intent", "SHRUG")
    assert done.sentence.startswith("intent 'SHRUG' is unknown, expected one of INFORM, CLARIFY")
    assert calls == []


def test_a_gguf_file_has_nothing_to_measure(srd, calls, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    done = srd("met", tmp_path / "model.gguf", "--measure")
    assert "is a GGUF file, which has no residual to hydrate; --measure takes an SRD checkpoint" in done.sentence


def test_memory_and_time_are_really_measured(srd: Callable[..., Any], model: Path):
    pytest.importorskip(MEASURE)
    done = srd("met", model, "--measure", "--json")
    assert done.status == 0
    printed = json.loads(done.stdout)
    assert [one["intent"] for one in printed["hydration"]] == list(Policy.default().intents)
    for one in printed["hydration"]:
        assert one["residual_bytes"] == printed["met"]["budgets"][one["intent"]]["residual_bytes"]
        assert one["seconds"] > 0
        assert one["resident_bytes_after"] > 0
