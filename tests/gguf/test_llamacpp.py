import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.gguf import llamacpp
from srd_modifier.gguf.llamacpp import LlamaCpp

SHARED = Path(__file__).parents[3] / "shared" / "models"
TOKENS = ["<bos>", "<eos>", *"abcdefgh", "ab"]
EOS = 1


def write_alphabet(path: Path, *, pre: str = "default") -> Path:
    """A model whose next token is the id after the last one, and after the last of all <eos>."""
    import gguf

    width = 32
    ids = np.arange(len(TOKENS))
    after = np.where(ids == len(TOKENS) - 1, EOS, ids + 1)
    embedding = np.eye(len(TOKENS), width, dtype=np.float32)
    output = np.zeros_like(embedding)
    output[after] = embedding
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if text.startswith("<") else normal for text in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(width, np.float32))
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{matrix}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_alphabet(tmp_path_factory.mktemp("llamacpp") / "alphabet.gguf")


def test_text_becomes_tokens(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        assert model.tokenize("abba") == [10, 3, 2]
        assert model.tokenize("") == []


def test_many_texts_are_tokenized_one_by_one(alphabet: Path) -> None:
    texts = ["abba", "", "a", "b", "c<eos>d", ""]
    with LlamaCpp(alphabet) as model:
        assert model.tokenize_all(texts) == [[10, 3, 2], [], [2], [3], [4, 1, 5], []]
        assert model.tokenize_all(texts) == [model.tokenize(text) for text in texts]
        assert model.tokenize_all([]) == []


def test_special_tokens_are_added_only_when_asked_for(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        assert model.tokenize("c", add_special=True) == [0, 4]


def test_special_tokens_in_the_text_are_parsed_unless_told_otherwise(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        assert model.tokenize("c<eos>d") == [4, 1, 5]
        assert 1 not in model.tokenize("c<eos>d", parse_special=False)


def test_the_likeliest_tokens_follow(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        assert model.complete([2], 4) == [3, 4, 5, 6]
        assert model.complete([9, 4], 3) == [5, 6, 7]
        assert model.complete([2], 4) == [3, 4, 5, 6]


def test_a_text_that_ends_is_not_continued(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        assert model.complete([8], 6) == [9, 10, 1]


def test_nothing_is_printed(alphabet: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCpp(alphabet) as model:
        model.complete(model.tokenize("abc"), 3)
    with pytest.raises(SRDError):
        LlamaCpp(__file__)
    assert capfd.readouterr() == ("", "")


def test_closing_frees_the_port(alphabet: Path) -> None:
    with LlamaCpp(alphabet) as model:
        address = urlsplit(model._server.listening_address)
        socket.create_connection((address.hostname, address.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.hostname, address.port))
    with pytest.raises(ValueError, match="is closed"):
        model.tokenize("a")


def test_closing_at_once_does_not_wait(alphabet: Path) -> None:
    # one in a few hundred used to wait for ever
    for _ in range(200):
        LlamaCpp(alphabet).close()


def test_two_files_are_open_at_once(alphabet: Path, tmp_path: Path) -> None:
    other = write_alphabet(tmp_path / "other.gguf")
    with LlamaCpp(alphabet) as first, LlamaCpp(other) as second:
        assert first.tokenize("ab") == second.tokenize("ab")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "must not be empty"), ([99], "invalid tokens"), ([2] * 40, "exceeds the available context")],
    ids=["empty", "unknown id", "too long"],
)
def test_a_prompt_that_cannot_be_is_refused(alphabet: Path, prompt: list[int], message: str) -> None:
    with LlamaCpp(alphabet) as model, pytest.raises(SRDError, match=f"alphabet.gguf: llama.cpp refuses .*{message}"):
        model.complete(prompt, 2)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SRDError, match=r"none\.gguf: there is no such file"):
        LlamaCpp(tmp_path / "none.gguf")


def test_an_adapter_that_is_not_there_is_named(alphabet: Path, tmp_path: Path) -> None:
    with pytest.raises(SRDError, match=r"lora\.gguf: there is no such file"):
        LlamaCpp(alphabet, lora=tmp_path / "lora.gguf")


def test_another_kind_of_file_is_refused_with_the_reason() -> None:
    with pytest.raises(SRDError, match=r"test_llamacpp\.py: llama.cpp refuses to load it: invalid magic"):
        LlamaCpp(__file__)


def test_a_truncated_file_is_refused_with_the_reason(alphabet: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(alphabet.read_bytes()[:-1000])
    with pytest.raises(SRDError, match=r"short\.gguf: llama.cpp refuses to load it: .*not within the file bounds"):
        LlamaCpp(short)


def test_an_unknown_pre_tokenizer_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = write_alphabet(tmp_path / "model.gguf", pre="nonsense")
    with pytest.raises(SRDError, match="unknown pre-tokenizer type: 'nonsense'"):
        LlamaCpp(path)


def test_a_file_that_is_no_adapter_is_refused_with_the_reason(alphabet: Path) -> None:
    with pytest.raises(SRDError, match=r"with the adapter .*general.type to be 'adapter'"):
        LlamaCpp(alphabet, lora=alphabet)


def test_a_missing_library_names_the_extra(alphabet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str, *, extra: str) -> None:
        raise MissingExtraError(f"{module} [{extra}]")

    monkeypatch.setattr(llamacpp, "require", require)
    with pytest.raises(MissingExtraError, match=r"xllamacpp \[gguf\]"):
        LlamaCpp(alphabet)


def test_a_trained_model_continues_a_story() -> None:
    path = SHARED / "stories260K" / "stories260Ktok512.gguf"
    if not path.is_file():
        pytest.skip(f"needs the trained model {path}")
    with LlamaCpp(path) as model:
        tokens = model.complete(model.tokenize("Once upon a time", add_special=True), 8)
        assert tokens == model.tokenize(", there was a little girl")[-len(tokens) :]
