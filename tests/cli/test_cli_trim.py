import json

import pytest

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import measure


def rows(text: str) -> dict[str, list[str]]:
    split = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {name: values for name, *values in split}


def test_the_installed_command_drops_residuals_and_says_what_is_left(srd_process, sensitive, tmp_path):
    output = tmp_path / "out"
    done = srd_process("trim", sensitive, "--budget", "8.0bpw", "--output", output)
    assert (done.status, done.stderr) == (0, "")
    sidecar, before, after = Sidecar.open(output), measure(sensitive), measure(output)
    sidecar.verify()
    assert 7.0 < after.bits_per_weight <= 8.0
    found = rows(done.stdout)
    assert found["modules with a residual"] == ["42", f"{len(sidecar.entries)}"]
    assert found["bytes on disk"] == [f"{before.bytes_on_disk:,}", f"{after.bytes_on_disk:,}"]
    assert found["bits per weight"] == [f"{before.bits_per_weight:.3f}", f"{after.bits_per_weight:.3f}"]
    was, now = map(float, found["predicted KLD, nats"])
    assert was == pytest.approx(9.03e-4)
    assert was < now < 9.03e-2
    assert "copy" not in done.stdout


@pytest.mark.parametrize("unit", ["bytes", "kB"])
def test_a_budget_in_bytes(srd, sensitive, tmp_path, unit):
    size = (measure(sensitive).bytes_on_disk + measure(sensitive, corrected=()).bytes_on_disk) // 2 // 1000 * 1000
    budget = f"{size // 1000}kB" if unit == "kB" else str(size)
    assert srd("trim", sensitive, "--budget", budget, "--output", tmp_path / "out").status == 0
    assert size - 30_000 < measure(tmp_path / "out").bytes_on_disk <= size


def test_a_largest_divergence(srd, sensitive, tmp_path):
    done = srd("trim", sensitive, "--max-divergence", "1e-2", "--output", tmp_path / "out")
    assert done.status == 0
    assert 8e-3 < float(rows(done.stdout)["predicted KLD, nats"][1]) <= 1e-2


def test_a_budget_for_everything_is_said_to_be_one(srd, sensitive, tmp_path):
    done = srd("trim", sensitive, "--budget", "1GB", "--output", tmp_path / "out")
    assert done.status == 0
    assert done.stdout.splitlines()[0] == (
        f"{sensitive} is within 1 GB with all its residuals: {tmp_path / 'out'} is a copy of it"
    )
    assert measure(tmp_path / "out") == measure(sensitive)


def test_an_existing_output_is_replaced_only_if_asked(srd, sensitive, tmp_path):
    arguments = ["trim", sensitive, "--budget", "8bpw", "--output", tmp_path / "out"]
    assert srd(*arguments).status == 0
    sentence = srd(*arguments).sentence
    assert sentence == f"{tmp_path / 'out'} already exists; choose another directory or pass --overwrite"
    assert srd(*arguments, "--overwrite").status == 0


@pytest.mark.parametrize("options", [[], ["--budget", "5bpw", "--max-divergence", "1e-3"]], ids=["none", "both"])
def test_it_takes_one_limit(srd, sensitive, tmp_path, options):
    sentence = srd("trim", sensitive, "--output", tmp_path / "out", *options).sentence
    assert sentence == "srd trim takes either --budget or --max-divergence"


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--budget", "5.5"], "--budget is '5.5', expected a size such as"),
        (["--budget", "much"], "--budget is 'much', expected a size such as"),
        (["--max-divergence", "0"], "--max-divergence is '0', expected a number above 0"),
    ],
    ids=" ".join,
)
def test_a_limit_that_is_none(srd, sensitive, tmp_path, options, start):
    assert srd("trim", sensitive, "--output", tmp_path / "out", *options).sentence.startswith(start)


def test_a_budget_that_leaves_nothing(srd, sensitive, tmp_path):
    sentence = srd("trim", sensitive, "--max-divergence", "1", "--output", tmp_path / "out").sentence
    assert sentence.endswith("the plain W4 model is its base itself: use it with alpha 0")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_sensitivity(srd, finished_checkpoint, tmp_path):
    sentence = srd("trim", finished_checkpoint, "--budget", "8bpw", "--output", tmp_path / "out").sentence
    assert "quantize again with `sensitivity: gradient` in the SRDModifier recipe" in sentence


def test_a_sensitivity_of_another_checkpoint(srd, sensitive, tmp_path):
    path = sensitive / "srd" / "sensitivity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"residual_digest": "sha256:0"}))
    sentence = srd("trim", sensitive, "--budget", "8bpw", "--output", tmp_path / "out").sentence
    assert f"{path} belongs to another checkpoint (residual_digest differs)" in sentence


def test_an_output_is_needed(srd, sensitive):
    assert srd("trim", sensitive, "--budget", "8bpw").status == 2
