import json
import struct
from pathlib import Path

import pytest

from srd_modifier.checkpoint.sensitivity import read_sensitivity
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.summary import summarize
from srd_modifier.checkpoint.trim import trim
from srd_modifier.selection.budget import Budget

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


# --- sensitivity -----------------------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.count("│") == 6]


def test_modules_are_listed_by_their_damage(srd, sensitive):
    done = srd("inspect", sensitive, "--sensitivity")
    assert (done.status, done.stderr) == (0, "")
    sensitivity, sidecar = read_sensitivity(sensitive), Sidecar.open(sensitive)
    *rows, total = cells(done.stdout)
    expected = []
    for name, module in sorted(sensitivity.modules.items(), key=lambda item: item[1].w4, reverse=True):
        size = sidecar.entries[name].bytes()
        removed = (module.w4 - module.corrected) / size
        expected.append([name, f"{module.w4:.3e}", f"{module.corrected:.3e}", f"{size:,}", f"{removed:.3e}"])
    assert rows == expected
    # 1 + 2 + ... + 42
    bytes_ = summarize(sensitive).residual_bytes
    assert total == ["all", "9.030e-02", "9.030e-04", f"{bytes_:,}", f"{9.030e-2 * 0.99 / bytes_:.3e}"]
    assert "by gradient on 4,096 tokens" in done.stdout


def test_a_module_without_a_residual_has_no_corrected_damage(srd, sensitive, tmp_path):
    trim(sensitive, tmp_path / "trimmed", Budget(bits_per_weight=6.0))
    dropped = [row for row in cells(srd("inspect", tmp_path / "trimmed", "--sensitivity").stdout) if row[2] == "-"]
    assert dropped
    assert all(row[2:] == ["-", "-", "-"] for row in dropped)
    assert {row[0] for row in dropped}.isdisjoint(Sidecar.open(tmp_path / "trimmed").entries)


def test_json_includes_the_sensitivity(srd, sensitive):
    found = strict_json(srd("inspect", sensitive, "--sensitivity", "--json").stdout)["sensitivity"]
    assert found["predicted_kld_w4"] == pytest.approx(9.03e-2)
    assert found["predicted_kld"] == pytest.approx(9.03e-4)
    assert (found["method"], found["tokens"], len(found["modules"])) == ("gradient", 4096, 42)
    name, module = next(iter(Sidecar.open(sensitive).entries.items()))
    assert found["modules"][name] == {"w4": 1e-4, "corrected": 1e-6, "mixed": 0.0, "residual_bytes": module.bytes()}
    assert "sensitivity" not in strict_json(srd("inspect", sensitive, "--json").stdout)


@pytest.mark.parametrize(("name", "start"), [("map.svg", b"<?xml"), ("map.png", b"\x89PNG")])
def test_a_heat_map_is_drawn(srd, sensitive, tmp_path, name, start):
    done = srd("inspect", sensitive, "--sensitivity", "--plot", tmp_path / name)
    assert (done.status, done.stderr) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(start)
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / name}"


@pytest.mark.parametrize("options", [["--sensitivity"], ["--sensitivity", "--json"], ["--plot", "x.svg"]], ids=" ".join)
def test_without_a_sensitivity_it_is_a_sentence(srd, finished_checkpoint, options):
    assert srd("inspect", finished_checkpoint, *options).sentence == (
        f"{finished_checkpoint / 'srd' / 'sensitivity.json'} is missing, so nothing is predicted; "
        "quantize with `sensitivity: gradient` in the SRDModifier recipe"
    )


def test_a_plot_of_another_format_is_a_sentence(srd, sensitive, tmp_path):
    assert srd("inspect", sensitive, "--plot", tmp_path / "map.pdf").sentence == (
        f"{tmp_path / 'map.pdf'}: cannot be drawn, expected a file name that ends in .svg or .png"
    )


def test_a_sensitivity_of_another_checkpoint_is_a_sentence(srd, sensitive):
    path = sensitive / "srd" / "sensitivity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_digest": "sha256:0"}))
    assert "belongs to another checkpoint (base_digest differs)" in srd("inspect", sensitive, "--sensitivity").sentence
