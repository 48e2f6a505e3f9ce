from pathlib import Path

import pytest
from comparisons import kld, make_model, make_results, ppl
from huggingface_hub import ModelCard
from small_checkpoint import write_checkpoint

from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.results import write_results


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", tmp_path / "scratch")


@pytest.fixture
def results(small: Path, tmp_path: Path) -> Path:
    own = make_model("own", 5, ppl(10.5), kld(1e-3), digest=model_digest(small), model=str(small))
    write_results(make_results(own, make_model("peer", 6, ppl(11.0))), tmp_path / "results.json")
    return tmp_path / "results.json"


def test_a_card_of_sizes_is_written(srd, small):
    done = srd("card", small)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == f"wrote {small / 'README.md'}: sizes only, nothing measured was given\n"
    assert ModelCard.load(small / "README.md").data.tags == ["srd", "compressed-tensors", "w4a16"]


def test_every_option_reaches_the_card(srd, small, results, tmp_path):
    options = ["--base-model", "org/base", "--quantized-by", "me", "--repo-id", "me/small", "--license", "mit"]
    done = srd("card", small, "--results", results, *options, "--output", tmp_path / "card.md")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'card.md'}: measured on it own; others in the same run: 2\n"
    data = ModelCard.load(tmp_path / "card.md").data
    assert (data.base_model, data["quantized_by"], data.model_name, data.license) == ("org/base", "me", "small", "mit")
    assert data.eval_results[0].metric_value == 10.5
    assert not (small / "README.md").exists()


def test_an_existing_card_is_refused_and_replaced_when_asked(srd, small):
    (small / "README.md").write_text("mine")
    assert srd("card", small).sentence == (
        f"{small / 'README.md'} already exists; choose another file with --output or pass --overwrite"
    )
    assert srd("card", small, "--overwrite").status == 0
    assert (small / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("name", ["nowhere.json", "text.json", "empty.json"])
def test_results_that_cannot_be_read_are_a_sentence(srd, small, tmp_path, name):
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "empty.json").write_text("{}")
    assert str(tmp_path / name) in srd("card", small, "--results", tmp_path / name).sentence


def test_results_of_another_model_are_a_sentence(srd, small, results):
    (small / "tokenizer.json").write_text('{"another": 1}\n')
    assert srd("card", small, "--results", results).sentence == (
        f"{results}: no row was measured on {small} as it is now; measure with srd compare REFERENCE {small}"
    )


def test_a_name_that_the_hub_does_not_take_is_a_sentence(srd, small):
    assert srd("card", small, "--base-model", "../model").sentence == (
        "--base-model is '../model', expected a hub id such as organization/model"
    )


def test_the_installed_command_writes_a_card(srd_process, small):
    done = srd_process("card", small)
    assert (done.status, done.stderr) == (0, "")
    assert (small / "README.md").is_file()
