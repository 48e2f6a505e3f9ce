"""Residuals dropped from a checkpoint: what is left, what it costs, and that it is whole."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from small_checkpoint import (
    BIG,
    CORRECTED,
    DAMAGES,
    DENSE,
    FIRST,
    INDEX,
    SECOND,
    SPARSE_MODULE,
    digests,
    edit_json,
    flip_bit,
    write_checkpoint,
)

from srd_modifier.checkpoint.config import IMPORTANCE, SENSITIVITY, read_srd_config
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity, read_sensitivity, sensitivity_file
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.trim import trim
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.selection.budget import Budget


@pytest.fixture
def source(sensitive: Path) -> Path:
    return sensitive


def bits_for(directory: Path, *modules: str) -> float:
    return measure(directory, corrected=modules).bits_per_weight


def damage_with(kept: tuple[str, ...]) -> float:
    return DAMAGES.predicted(dict.fromkeys(kept, 1.0))


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(DENSE,), (SPARSE_MODULE,), (DENSE, SPARSE_MODULE), (BIG,), (BIG, DENSE)], ids=str)
def test_bits_per_weight_are_those_of_measure(source: Path, tmp_path: Path, kept: tuple[str, ...]) -> None:
    """With exactly the bits that a choice takes, the best choice of as many bits is made, checked against all."""
    budget = bits_for(source, *kept)
    trimmed = trim(source, tmp_path / "out", Budget(bits_per_weight=budget))
    choices = [choice for size in range(3) for choice in combinations(CORRECTED, size)]
    best = min(damage_with(choice) for choice in choices if bits_for(source, *choice) <= budget)
    assert trimmed.divergence_after == pytest.approx(best)
    assert measure(tmp_path / "out").bits_per_weight <= budget
    assert trimmed.after == measure(tmp_path / "out")


def test_a_hair_less_does_not_fit(source: Path, tmp_path: Path) -> None:
    budget = math.nextafter(bits_for(source, BIG), 0)
    trimmed = trim(source, tmp_path / "out", Budget(bits_per_weight=budget))
    assert trimmed.kept == (DENSE, SPARSE_MODULE)


@pytest.mark.parametrize("spare", [0, 1, 500, 5_000, 20_000, 100_000, 250_000, 280_000])
def test_bytes_on_disk_are_never_exceeded(source: Path, tmp_path: Path, spare: int) -> None:
    budget = measure(source, corrected=[DENSE]).bytes_on_disk + 3_000 + spare
    trimmed = trim(source, tmp_path / "out", Budget(bytes=budget))
    assert trimmed.after.bytes_on_disk == measure(tmp_path / "out").bytes_on_disk <= budget
    assert DENSE in trimmed.kept or BIG in trimmed.kept


def test_the_share_of_the_header_is_not_far_above_the_truth(source: Path, tmp_path: Path) -> None:
    """What just fits is not dropped for a bound that is too careful."""
    kept = (DENSE, SPARSE_MODULE)
    size = trim(source, tmp_path / "first", Budget(bits_per_weight=bits_for(source, *kept))).after.bytes_on_disk
    trimmed = trim(source, tmp_path / "second", Budget(bytes=size + 150 * len(kept)))
    assert trimmed.kept == kept


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(9.4e-3, (DENSE, SPARSE_MODULE)), (1.1e-2, (SPARSE_MODULE,)), (3.6e-3, (BIG,)), (1.6e-3, (BIG, DENSE))],
)
def test_a_largest_divergence_with_the_fewest_bytes(
    source: Path, tmp_path: Path, limit: float, kept: tuple[str, ...]
) -> None:
    trimmed = trim(source, tmp_path / "out", Budget(max_divergence=limit))
    choices = [
        choice for size in range(1, 4) for choice in combinations(CORRECTED, size) if damage_with(choice) <= limit
    ]
    best = min(choices, key=lambda choice: measure(source, corrected=choice).bits_per_weight)
    assert trimmed.kept == best == kept
    assert trimmed.divergence_after == pytest.approx(damage_with(best))
    assert trimmed.divergence_after <= limit


def test_a_residual_that_does_harm_goes_first(tmp_path: Path) -> None:
    harmful = ModuleSensitivity(w4=1e-3, corrected=2e-3, mixed=0.0)
    sensitivity = replace(DAMAGES, modules={**DAMAGES.modules, DENSE: harmful})
    source = write_checkpoint(tmp_path / "source", tmp_path / "scratch", sensitivity=sensitivity)
    trimmed = trim(source, tmp_path / "out", Budget(max_divergence=5e-3))
    assert trimmed.kept == (BIG,)
    assert trim(source, tmp_path / "more", Budget(bits_per_weight=bits_for(source, *CORRECTED) - 1e-9)).kept == (
        BIG,
        SPARSE_MODULE,
    )


def test_modules_that_engines_fuse_go_together(checkpoint: Path, tmp_path: Path) -> None:
    """q, k and v are one matrix in an engine, and so are gate and up."""
    modules = list(Sidecar.open(checkpoint).entries)
    generator = torch.Generator().manual_seed(0)
    damages = torch.rand(len(modules), generator=generator).tolist()
    attach(
        checkpoint,
        {
            name: ModuleSensitivity(w4=w4, corrected=w4 / 100, mixed=0.0)
            for name, w4 in zip(modules, damages, strict=True)
        },
    )
    trimmed = trim(checkpoint, tmp_path / "out", Budget(bits_per_weight=8.0))
    assert trimmed.kept
    assert trimmed.dropped
    for layer in range(6):
        for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            assert len({f"model.layers.{layer}.{name}" in trimmed.kept for name in names}) == 1
    assert measure(tmp_path / "out").bits_per_weight <= 8.0
    Sidecar.open(tmp_path / "out").verify()


def attach(directory: Path, modules: dict[str, ModuleSensitivity]) -> None:
    config = read_srd_config(directory)
    assert config is not None
    digest = json.loads((directory / config.sidecar).read_text())["metadata"]["residual_digest"]
    values = sensitivity_file(
        Sensitivity(method="forward", tokens=1, modules=modules), base_digest=config.base_digest, residual_digest=digest
    )
    (directory / SENSITIVITY).write_text(json.dumps(values))


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture
def trimmed(source: Path, tmp_path: Path) -> Path:
    edit_json(source / "config.json", lambda config: config["srd_config"].update(alpha=0.5, layer_alphas={BIG: 0.25}))
    trim(source, tmp_path / "out", Budget(bits_per_weight=bits_for(source, DENSE, SPARSE_MODULE)))
    return tmp_path / "out"


def test_what_is_left_is_a_whole_checkpoint(source: Path, trimmed: Path) -> None:
    Sidecar.open(trimmed).verify()
    single = "srd/residual-00001-of-00001.safetensors"
    assert set(digests(trimmed)) == set(digests(source)) - {FIRST, SECOND} | {single}
    before, after = read_srd_config(source), read_srd_config(trimmed)
    assert before is not None
    assert after == replace(before, modules=(DENSE, SPARSE_MODULE))
    assert after.layer_alphas == {BIG: 0.25}


def test_nothing_is_encoded_again(source: Path, trimmed: Path) -> None:
    old, new = Sidecar.open(source), Sidecar.open(trimmed)
    for module in (DENSE, SPARSE_MODULE):
        assert new.entries[module] == old.entries[module]
        for suffix, tensor in old.encoded(module).tensors().items():
            assert torch.equal(new.encoded(module).tensors()[suffix], tensor)
        assert torch.equal(new.correct(module, 1.0), old.correct(module, 1.0))


def test_the_other_files_are_unchanged(source: Path, trimmed: Path) -> None:
    own = {"config.json", INDEX, SENSITIVITY}
    old, new = digests(source), digests(trimmed)
    assert {name: new[name] for name in old.keys() & new.keys() - own} == {
        name: old[name] for name in old.keys() & new.keys() - own
    }
    assert IMPORTANCE in new
    configs = [json.loads((path / "config.json").read_text()) for path in (source, trimmed)]
    for config in configs:
        config.pop("srd_config")
    assert configs[0] == configs[1]


def test_weights_are_linked_and_what_may_be_edited_is_copied(source: Path, trimmed: Path) -> None:
    assert (trimmed / "model.safetensors").samefile(source / "model.safetensors")
    assert not (trimmed / "tokenizer.json").samefile(source / "tokenizer.json")


def test_the_dropped_modules_lose_the_numbers_of_their_residual(trimmed: Path) -> None:
    found = read_sensitivity(trimmed)
    assert found is not None
    assert found.modules[BIG] == ModuleSensitivity(w4=8e-3, output=0.5)
    assert {name: found.modules[name] for name in DAMAGES.modules if name != BIG} == {
        name: module for name, module in DAMAGES.modules.items() if name != BIG
    }


def test_it_can_be_trimmed_again(trimmed: Path, tmp_path: Path) -> None:
    again = trim(trimmed, tmp_path / "again", Budget(bits_per_weight=bits_for(trimmed, DENSE)))
    assert (again.kept, again.dropped) == ((DENSE,), (SPARSE_MODULE,))
    assert again.divergence_before == pytest.approx(damage_with((DENSE, SPARSE_MODULE)))
    Sidecar.open(tmp_path / "again").verify()


@pytest.mark.parametrize(
    "budget",
    [
        lambda source: Budget(bytes=measure(source).bytes_on_disk),
        lambda source: Budget(bits_per_weight=measure(source).bits_per_weight),
        lambda source: Budget(max_divergence=damage_with(CORRECTED)),
    ],
    ids=["bytes", "bits", "divergence"],
)
def test_a_budget_for_everything_gives_a_copy(source: Path, tmp_path: Path, budget: Callable[[Path], Budget]) -> None:
    trimmed = trim(source, tmp_path / "out", budget(source))
    assert (trimmed.kept, trimmed.dropped) == (CORRECTED, ())
    assert trimmed.before == trimmed.after
    assert trimmed.divergence_before == trimmed.divergence_after
    assert digests(tmp_path / "out") == digests(source)


def test_a_byte_less_than_everything_drops_something(source: Path, tmp_path: Path) -> None:
    assert trim(source, tmp_path / "out", Budget(bytes=measure(source).bytes_on_disk - 1)).dropped


def test_chat_templates_come_along_and_other_folders_do_not(source: Path, tmp_path: Path) -> None:
    for name in ("additional_chat_templates", "runs"):
        (source / name).mkdir()
        (source / name / "tool.jinja").write_text("{{ messages }}")
    trim(source, tmp_path / "out", Budget(bits_per_weight=bits_for(source, DENSE)))
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "runs").exists()


def test_the_card_stays_behind(source: Path, tmp_path: Path) -> None:
    """Its figures are not the copy's."""
    (source / "README.md").write_text("perplexity 12.3")
    trim(source, tmp_path / "copy", Budget(bytes=10**9))
    assert not (tmp_path / "copy" / "README.md").exists()


def test_a_snapshot_of_links_becomes_files(source: Path, tmp_path: Path) -> None:
    """As the hub's cache has them; a hard link to a link would point into the cache."""
    snapshot = tmp_path / "snapshot"
    for path in [path for path in source.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for name, budget in (("part", bits_for(source, DENSE)), ("whole", 100.0)):
        trim(snapshot, tmp_path / name, Budget(bits_per_weight=budget))
        assert not any(path.is_symlink() for path in (tmp_path / name).rglob("*"))
        Sidecar.open(tmp_path / name).verify()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(error: type[Exception], source: Path, output: Path, budget: Budget) -> str:
    """The message; nothing may have been left behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error) as caught:
        trim(source, output, budget)
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


def test_without_a_sensitivity(small_template: Path, tmp_path: Path) -> None:
    assert refused(CheckpointError, small_template, tmp_path / "out", Budget(bytes=1)) == (
        f"{small_template / SENSITIVITY} is missing, so it is not known what each residual earns; quantize again with "
        "`sensitivity: gradient` in the SRDModifier recipe"
    )


def test_without_a_sidecar(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", lambda config: config.pop("srd_config"))
    assert "this is not an SRD checkpoint" in refused(CheckpointError, source, tmp_path / "out", Budget(bytes=1))


@pytest.mark.parametrize(
    "budget",
    [
        lambda source: Budget(bits_per_weight=bits_for(source)),
        lambda source: Budget(bytes=measure(source, corrected=()).bytes_on_disk),
        lambda source: Budget(max_divergence=1.0),
    ],
    ids=["bits", "bytes", "divergence"],
)
def test_when_nothing_would_be_left(source: Path, tmp_path: Path, budget: Callable[[Path], Budget]) -> None:
    wanted = budget(source)
    assert refused(ConfigError, source, tmp_path / "out", wanted) == (
        f"a budget of {wanted} leaves no residual in {source}; the plain W4 model is its base itself: "
        "use it with alpha 0"
    )


@pytest.mark.parametrize("budget", [Budget(bits_per_weight=4.0), Budget(bytes=100)], ids=str)
def test_a_budget_below_w4(source: Path, tmp_path: Path, budget: Budget) -> None:
    message = refused(ConfigError, source, tmp_path / "out", budget)
    assert message.startswith(f"a budget of {budget} is too small: {source} takes ")


def test_a_divergence_out_of_reach(source: Path, tmp_path: Path) -> None:
    message = refused(ConfigError, source, tmp_path / "out", Budget(max_divergence=1e-4))
    assert message.startswith(f"max_divergence 0.0001 is out of reach: {source} has a predicted ")


def test_an_existing_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    message = refused(CheckpointError, source, tmp_path / "out", Budget(bits_per_weight=6.0))
    assert message == f"{tmp_path / 'out'} already exists; choose another directory or pass --overwrite"


def test_a_checkpoint_can_replace_itself(source: Path) -> None:
    before = digests(source)
    trim(source, source, Budget(bits_per_weight=bits_for(source, DENSE)), overwrite=True)
    Sidecar.open(source).verify()
    assert set(Sidecar.open(source).entries) == {DENSE}
    assert digests(source)["model.safetensors"] == before["model.safetensors"]


def test_a_damaged_residual(source: Path, tmp_path: Path) -> None:
    flip_bit(source / SECOND, f"{DENSE}.weight_d8", 0.5)
    budget = Budget(bits_per_weight=bits_for(source, DENSE))
    assert f"{DENSE}.weight_d8 does not match its digest" in refused(CheckpointError, source, tmp_path / "out", budget)


def test_a_damaged_base_is_not_declared_sound(source: Path, tmp_path: Path) -> None:
    """One bit between the pages that the fingerprint samples."""
    flip_bit(source / "model.safetensors", f"{BIG}.weight_packed", 0.0458)
    Sidecar.open(source)
    budget = Budget(bits_per_weight=bits_for(source, DENSE))
    message = refused(CheckpointError, source, tmp_path / "out", budget)
    assert "the base weights do not match srd_config.base_digest" in message


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    budget = Budget(bits_per_weight=bits_for(source, DENSE))
    assert "cannot reserve" in refused(CheckpointError, source, tmp_path / "out", budget)
