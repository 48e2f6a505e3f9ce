import pytest

from srd_modifier.errors import CheckpointError, MissingExtraError
from srd_modifier.met import build_met

gguf = pytest.importorskip("gguf")

from srd_modifier.gguf.export import export_gguf  # noqa: E402 - after it is known that gguf is there
from srd_modifier.gguf.mixture import FileType  # noqa: E402


def tensor_bytes(path) -> dict[str, int]:
    """Bytes of every tensor of a file, as gguf reads it."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def dense(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "dense.gguf"
    export_gguf(tiny_llama, path, file_type=FileType.Q4_K_M)
    return path


def test_a_gguf_file_is_measured_and_has_no_residual(dense):
    met = build_met(dense)
    found = tensor_bytes(dense)
    split = ["early"] * 2 + ["factual"] * 2 + ["reasoning"] * 3 + ["governance"]
    expected = dict.fromkeys(split, 0)
    for name, size in found.items():
        if name.startswith("blk."):
            expected[split[int(name.split(".")[1])]] += size
    assert met["measured"] is True
    assert met["source"] == {"kind": "gguf", "files": {"dense.gguf": dense.stat().st_size}, "assumed": None}
    assert met["model"] == {"architecture": "llama", "layers": 8, "experts": None}
    assert {name: chunk["base_bytes"] for name, chunk in met["chunks"].items()} == expected
    assert met["pinned"]["tensors"] == ["output_norm.weight", "token_embd.weight"]
    assert met["pinned"]["bytes"] == sum(size for name, size in found.items() if not name.startswith("blk."))
    assert met["files"]["residual_bytes"] == 0
    assert met["files"]["total_bytes"] == dense.stat().st_size
    assert met["files"]["header_bytes"] == dense.stat().st_size - sum(found.values()) > 0
    assert {(budget["memory_bytes"], budget["residual_bytes"]) for budget in met["budgets"].values()} == {
        (sum(found.values()), 0)
    }


def test_a_mixture_in_a_gguf_file(mixture_with_tokenizer, tmp_path):
    path = tmp_path / "mixture.gguf"
    export_gguf(mixture_with_tokenizer, path, file_type=FileType.BF16)
    met = build_met(path)
    assert met["model"]["experts"] == {"count": 4, "active": 2, "active_fraction": 0.5}
    experts = sum(size for name, size in tensor_bytes(path).items() if "_exps." in name)
    assert experts == 2 * 4 * 3 * 64 * 64 * 2  # layers, experts, matrices of bfloat16
    assert sum(chunk["expert_base_bytes"] for chunk in met["chunks"].values()) == experts
    assert met["layers"] == ["early", "reasoning"]
    for budget in met["budgets"].values():
        assert budget["active_bytes_per_token"] == budget["memory_bytes"] - experts // 2


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a whole GGUF file"):
        build_met(path)


def test_the_extra_is_named_where_gguf_is_missing(dense, monkeypatch):
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gguf is not installed; .*srd-modifier\[gguf\]"):
        build_met(dense)
