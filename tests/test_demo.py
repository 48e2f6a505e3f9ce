from pathlib import Path

import pytest

from srd_modifier import demo
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.cli import _app
from srd_modifier.demo import DemoRow, conclusion, run_demo
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.report import Report
from srd_modifier.evaluation.scores import Divergence, Perplexity
from srd_modifier.evaluation.windows import Convention, window_rule


def row(name: str, kld: float, size: int) -> DemoRow:
    report = Report(
        model=name,
        reference="original",
        text_path="text.txt",
        text_sha256="ab" * 32,
        rule=window_rule(Convention.SLIDING),
        perplexity=Perplexity(tokens=1000, ppl=7.5, ppl_stderr=0.25),
        divergence=Divergence(kld, kld, kld / 2, 4 * kld, 0.95),
        size=CheckpointSize(bytes_on_disk=size, bits_per_weight=4.5, quantized_weights=640, total_weights=800),
        dtype="float32",
        alpha=None,
        chunks=None,
        seconds=1.5,
        versions={},
    )
    return DemoRow(name, report)


def rows(w4: float = 4e-3, selective: float = 1e-3, full: float = 2e-7) -> list[DemoRow]:
    return [row("bf16", 0.0, 4000), row("W4", w4, 1000), row("selective", selective, 1500), row("all", full, 2900)]


def test_the_conclusion_comes_from_the_figures():
    assert conclusion(rows()) == (
        "W4 moves the model 4.0e-03 nats per token away from bf16; the residual of the layers at 40-77 % of the depth "
        "takes back 75% of that, the full one all but 2e-07 nats at 2.9 times the bytes of W4, and the same directory "
        "loads as plain W4 without the plugin."
    )


def test_the_conclusion_does_not_flatter():
    """A residual that makes the model worse is said to take back less than nothing."""
    assert "takes back -50% of that" in conclusion(rows(selective=6e-3))


@pytest.mark.parametrize("missing", ["model", "text", "recipes"])
def test_what_is_missing_is_named(tmp_path, tiny_llama, monkeypatch, missing):
    paths = {"model": tiny_llama, "text": demo.TEXT}
    if missing == "recipes":
        monkeypatch.setattr(demo, "_REPOSITORY", tmp_path)  # an installation without the repository
    else:
        paths[missing] = tmp_path / missing
    with pytest.raises(SRDError, match=rf"{tmp_path / missing} is missing: the demo runs in a clone of the repository"):
        run_demo(**paths, output=tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()


def test_the_defaults_are_in_the_repository():
    assert (demo.MODEL / "config.json").is_file()
    assert demo.TEXT.is_file()


def test_two_bases_are_never_compared(tmp_path, tiny_llama, monkeypatch, finished_checkpoint):
    def quantize(model: str, recipe: Path, directory: Path, **options: object) -> None:
        directory.parent.mkdir(exist_ok=True)
        source = finished_checkpoint if recipe.stem == "srd_gptq" else tiny_llama
        directory.symlink_to(source)

    monkeypatch.setattr(demo, "quantize", quantize)
    with pytest.raises(SRDError, match="the two recipes gave different W4 weights"):
        run_demo(tiny_llama, demo.TEXT, tmp_path / "out", say=print)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, str]:
    """The output of `srd demo`, on a small part of the samples and of the text, and its folder."""
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    text.write_text(demo.TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_SAMPLES", 4)
        patch.setattr(demo, "_SAMPLE_LENGTH", 64)
        patch.setattr("srd_modifier.cli._quiet.quiet_libraries", lambda *, bars: None)
        patch.setenv("COLUMNS", "200")
        arguments = ["demo", "--model", str(tiny_llama), "--text", str(text), "--output", str(folder / "out")]
        done = CliRunner().invoke(_app(), arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return folder, done.stdout


@pytest.mark.slow
def test_the_table_has_four_models_in_their_order(shown):
    _, output = shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [name for name, *_ in cells] == ["bf16", "W4", "W4+D8, 40-77 %", "W4+D8, all"]
    sizes, bits, _, kld, top1 = ([line[column] for line in cells] for column in range(1, 6))
    bf16, w4, selective, full = (int(size.replace(",", "")) for size in sizes)
    assert w4 < selective < full < bf16
    assert float(bits[0]) == 16
    assert float(bits[1]) < float(bits[2]) < float(bits[3]) < 13
    divergences = [float(value) for value in kld]
    assert divergences[0] == 0
    assert divergences[1] > divergences[2] > 100 * divergences[3] > 0
    assert top1[0] == "100.00%"


@pytest.mark.slow
def test_the_steps_and_the_conclusion_are_said(shown):
    folder, output = shown
    steps = [
        "recipes/srd_selective.yaml",
        "recipes/srd_gptq.yaml",
        "scoring bf16",
        "scoring W4+D8, all",
        "W4 moves the",
    ]
    places = [output.index(step) for step in steps]
    assert places == sorted(places)
    assert f"srd inspect {folder / 'out' / 'full'} --verify" in output


@pytest.mark.slow
def test_the_checkpoints_are_whole_and_share_their_base(shown):
    folder, _ = shown
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["full", "selective"]
    sidecars = [Sidecar.open(folder / "out" / name) for name in ("selective", "full")]
    for sidecar in sidecars:
        sidecar.verify()
    assert [len(sidecar.entries) for sidecar in sidecars] == [21, 56]
    assert len({BaseCheckpoint(sidecar.directory).digest() for sidecar in sidecars}) == 1
