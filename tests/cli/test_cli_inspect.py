import json
import struct
from pathlib import Path

import pytest

from srd_modifier.checkpoint.summary import summarize

RESIDUAL = "srd/residual-00001-of-00001.safetensors"


def strict_json(text: str) -> dict:
    """JSON as other languages read it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def flip_a_bit(path: Path, tensor: str) -> None:
    """In the middle of a tensor's bytes."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start, end = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + (start + end) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def plain(checkpoint):
    """The W4A16 model alone."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["srd_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def test_the_table_says_what_the_summary_says(srd, finished_checkpoint):
    done, summary = srd("inspect", finished_checkpoint), summarize(finished_checkpoint)
    assert (done.status, done.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        ["W4 modules", "42"],
        ["corrected", "42"],
        ["residual", "8-bit, groups of 32, nearest, bfloat16 scales: 42 modules"],
        ["alpha", "1"],
        ["early", f"14 of 14 modules, {summary.chunks['early'].bytes:,} bytes"],
        ["factual", f"7 of 7 modules, {summary.chunks['factual'].bytes:,} bytes"],
        ["reasoning", f"14 of 14 modules, {summary.chunks['reasoning'].bytes:,} bytes"],
        ["governance", f"7 of 7 modules, {summary.chunks['governance'].bytes:,} bytes"],
        ["calibrated", "no data"],
        ["base on disk", f"{summary.base_bytes:,} bytes"],
        ["residual on disk", f"{summary.residual_bytes:,} bytes"],
        ["bits per weight, W4", f"{summary.bits_per_weight_w4:.3f}"],
        ["bits per weight, with residual", f"{summary.bits_per_weight:.3f}"],
        ["base digest", summary.base_digest],
    ]


def test_a_narrow_terminal_does_not_cut_the_digest(srd, finished_checkpoint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cells = [
        line.split("│")[2].strip() for line in srd("inspect", finished_checkpoint).stdout.splitlines() if "│" in line
    ]
    assert summarize(finished_checkpoint).base_digest in "".join(cells)


def test_layer_alphas_are_shown(srd, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["srd_config"] |= {"alpha": 0.5, "layer_alphas": {"re:.*o_proj": 0.25}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    lines = srd("inspect", checkpoint).stdout.splitlines()
    assert any("alpha of re:.*o_proj" in line and "0.25" in line for line in lines)


def test_json_of_the_installed_command_is_json_and_nothing_else(srd_process, finished_checkpoint):
    done = srd_process("inspect", finished_checkpoint, "--json")
    assert (done.status, done.stderr) == (0, "")
    assert strict_json(done.stdout) == json.loads(json.dumps(summarize(finished_checkpoint).as_json()))


def test_json_says_that_it_was_verified(srd, finished_checkpoint):
    assert strict_json(srd("inspect", finished_checkpoint, "--verify", "--json").stdout)["verified"] is True
    assert "verified" not in strict_json(srd("inspect", finished_checkpoint, "--json").stdout)


def test_a_whole_checkpoint_is_verified(srd, finished_checkpoint):
    done = srd("inspect", finished_checkpoint, "--verify")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "verified: base and residual match their digests"


@pytest.mark.parametrize("options", [["--verify"], ["--verify", "--json"]], ids=["table", "json"])
@pytest.mark.parametrize("suffix", ["weight_d8", "weight_d8_scale"])
def test_a_flipped_bit_of_the_residual_is_found(srd, checkpoint, suffix, options):
    tensor = f"model.layers.3.mlp.up_proj.{suffix}"
    flip_a_bit(checkpoint / RESIDUAL, tensor)
    assert srd("inspect", checkpoint).status == 0, "only --verify reads every byte"
    assert srd("inspect", checkpoint, *options).sentence == (
        f"{checkpoint / RESIDUAL}: {tensor} does not match its digest; the file is damaged"
    )


def test_a_flipped_bit_of_the_base_is_found(srd, checkpoint):
    """Also where the fingerprint, which samples large tensors, would not see it."""
    flip_a_bit(checkpoint / "model.safetensors", "lm_head.weight")  # 512 KiB
    assert srd("inspect", checkpoint).status == 0
    assert srd("inspect", checkpoint, "--verify").sentence == (
        f"{checkpoint / 'model.safetensors'}: the base weights do not match srd_config.base_digest; "
        "they were changed after the residual was made"
    )


def test_the_installed_command_exits_with_one_for_a_flipped_bit(srd_process, checkpoint):
    flip_a_bit(checkpoint / RESIDUAL, "model.layers.0.self_attn.q_proj.weight_d8")
    assert "q_proj.weight_d8 does not match its digest" in srd_process("inspect", checkpoint, "--verify").sentence


def test_a_plain_w4_checkpoint_is_told_as_such(srd, plain):
    done = srd("inspect", plain)
    assert done.status == 0
    assert "none: a plain W4A16 checkpoint" in done.stdout
    assert "digest" not in done.stdout
    assert strict_json(srd("inspect", plain, "--json").stdout)["corrected_modules"] == 0


def test_a_plain_w4_checkpoint_cannot_be_verified(srd, plain):
    sentence = srd("inspect", plain, "--verify").sentence
    assert sentence == f"{plain / 'config.json'} has no srd_config: this is not an SRD checkpoint"


def test_a_dense_model_is_not_taken_for_w4(srd, tiny_llama):
    done = srd("inspect", tiny_llama)
    assert done.status == 0
    assert "W4A16" not in done.stdout
    assert "nan" not in done.stdout
    assert strict_json(srd("inspect", tiny_llama, "--json").stdout)["bits_per_weight"] is None


def test_a_damaged_sidecar_is_a_sentence_without_verify_too(srd, checkpoint):
    (checkpoint / RESIDUAL).unlink()
    assert RESIDUAL in srd("inspect", checkpoint).sentence


@pytest.mark.parametrize("name", ["nowhere", "file", "empty"])
def test_what_is_no_checkpoint_is_a_sentence(srd, tmp_path, name):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / name}/config.json" in srd("inspect", tmp_path / name).sentence
