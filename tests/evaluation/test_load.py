import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from srd_modifier.checkpoint.config import SRDConfig
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.evaluation.load import load, resolve_device
from srd_modifier.residual import ResidualFormat

MODULES = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(2))


@pytest.fixture
def residual_directory(make_directory, edit_config):
    """A directory whose config.json promises a residual; what is beside it is not read here."""
    directory = make_directory("corrected")
    config = SRDConfig(modules=MODULES, format=ResidualFormat(), base_digest="0", base_fingerprint="0", alpha=0.5)
    edit_config(directory, srd_config=config.to_dict())
    return directory


@pytest.fixture
def load_corrected_calls(make_model, monkeypatch):
    calls = []

    def load_corrected(path, **options):
        calls.append({"path": path, **options})
        return make_model(vocab_size=4096)

    monkeypatch.setitem(sys.modules, "srd_modifier.transformers", SimpleNamespace(load_corrected=load_corrected))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_directory_loads_in_the_dtype_asked_for(make_model, make_directory, dtype):
    directory = make_directory()
    loaded = load(str(directory), dtype=dtype)
    expected = make_model(vocab_size=4096).state_dict()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.tokenizer("the").input_ids
    assert (loaded.name, loaded.path) == (str(directory), directory)
    assert (loaded.alpha, loaded.chunks, loaded.corrected) == (None, None, None)
    assert (loaded.max_positions, loaded.vocabulary_size) == (64, 4096)


def test_a_compressed_directory_computes_with_its_dequantized_weights(make_model, compressed):
    dense = make_model(vocab_size=4096)
    dense.get_submodule(compressed.module).weight.data = compressed.dequantized
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        found = load(str(compressed.directory)).model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_a_residual_is_loaded_with_the_settings_given(residual_directory, load_corrected_calls):
    loaded = load(str(residual_directory), alpha=0.25, chunks=["governance", "early"], dtype=torch.bfloat16)
    assert load_corrected_calls == [
        {"path": residual_directory, "alpha": 0.25, "chunks": ["governance", "early"], "dtype": torch.bfloat16}
    ]
    assert (loaded.alpha, loaded.chunks) == (0.25, ("governance", "early"))
    # Of two layers, the first is at depth 0 (early) and the second at depth 0.5 (reasoning).
    assert loaded.corrected == {MODULES[0]}


def test_a_residual_keeps_its_own_alpha_by_default(residual_directory, load_corrected_calls):
    loaded = load(str(residual_directory))
    assert load_corrected_calls[0]["alpha"] is None
    assert (loaded.alpha, loaded.chunks, loaded.corrected) == (0.5, None, set(MODULES))


def test_nothing_counts_as_corrected_at_alpha_zero(residual_directory, load_corrected_calls):
    assert load(str(residual_directory), alpha=0.0).corrected == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"chunks": ["middle"]}, "chunk 'middle' is unknown"),
    ],
    ids=["alpha", "chunk"],
)
def test_bad_residual_options_are_refused_before_loading(residual_directory, load_corrected_calls, options, message):
    with pytest.raises(SRDError, match=message):
        load(str(residual_directory), **options)
    assert load_corrected_calls == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"alpha": 0.0}, "alpha"), ({"chunks": []}, "chunks"), ({"alpha": 1.0, "chunks": ["early"]}, "alpha and chunks")],
    ids=["alpha", "chunks", "both"],
)
def test_residual_options_need_a_residual(make_directory, options, named):
    with pytest.raises(SRDError, match=rf"no residual \(config.json has no srd_config\), so {named} cannot be applied"):
        load(str(make_directory()), **options)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(SRDError, match=r"nowhere: there is no such directory$"):
        load(str(tmp_path / "nowhere"))


def test_a_name_the_hub_does_not_have_is_refused(monkeypatch):
    def cached_file(name, file, **where):
        raise OSError("not found")

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    with pytest.raises(SRDError, match="nobody/nothing: there is no such directory, and no such model could be"):
        load("nobody/nothing")


def test_a_hub_id_reads_its_snapshot(make_directory, monkeypatch):
    snapshot = make_directory("snapshot")
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda name, file, **_: str(snapshot / file))
    assert find_model("somebody/model") == snapshot


def test_a_hub_id_with_a_residual_is_fetched_whole(residual_directory, make_directory, monkeypatch):
    whole = make_directory("whole")
    asked: list[dict[str, object]] = []

    def cached_file(name: str, file: str, **where: object) -> str:
        asked.append(where)
        return str(residual_directory / file)

    def snapshot_download(name: str, *, allow_patterns: list[str], **where: object) -> str:
        asked.append(where)
        return str(whole)

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("somebody/corrected", revision="v1", cache_directory="models") == whole
    assert asked == [{"revision": "v1", "cache_dir": "models"}] * 2


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(SRDError, match=r"the directory has no config\.json, so it is not a model"):
        load(str(tmp_path))


def test_a_config_that_is_not_json_is_refused(make_directory):
    directory = make_directory()
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load(str(directory))


def test_another_file_is_refused(prose):
    with pytest.raises(SRDError, match="is a file, expected a model directory or a hub id"):
        load(str(prose))


def test_a_missing_tokenizer_is_refused(make_directory):
    directory = make_directory()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(SRDError, match="no tokenizer could be loaded"):
        load(str(directory))


def test_missing_weight_files_are_refused(make_directory):
    directory = make_directory()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the model cannot be loaded: .*no file named"):
        load(str(directory))


def test_a_truncated_weight_file_is_refused(make_directory):
    path = make_directory() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        load(str(path.parent))


def test_a_missing_weight_is_refused_instead_of_made_up(make_directory):
    path = make_directory() / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing .*: model\.layers\.0\.mlp\.up_proj\.weight$"):
        load(str(path.parent))


def test_a_weight_of_another_shape_is_refused_instead_of_made_up(make_directory):
    path = make_directory() / "model.safetensors"
    weights = load_file(path) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4)}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights .* wrong shape: model\.layers\.0\.mlp\.up_proj\.weight$"):
        load(str(path.parent))


def test_many_missing_weights_are_counted_and_not_all_listed(make_directory):
    path = make_directory() / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if ".mlp." not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"6 weights are missing .*down_proj\.weight, .*, \.\.\.$"):
        load(str(path.parent))


def test_an_unknown_architecture_is_refused(make_directory, edit_config):
    directory = make_directory()
    edit_config(directory, model_type="nonesuch")
    with pytest.raises(CheckpointError, match=r"the model cannot be loaded: .*`nonesuch`"):
        load(str(directory))


def test_auto_takes_the_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SRDError, match="finds no CUDA device"):
        resolve_device("cuda")
