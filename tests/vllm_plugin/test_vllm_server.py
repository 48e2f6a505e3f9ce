"""vLLM's OpenAI-compatible server, over HTTP on this machine, started and stopped by `examples/serve_vllm.py`."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
import torch
from rtn import write_checkpoint
from torch import Tensor
from transformers import AutoTokenizer
from vllm_environment import environment

from srd_modifier import load_corrected

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (EXAMPLES / "text" / "demo.txt").read_text(encoding="utf-8")
PROMPTS = [text[:400] for text in TEXT.split("\n\n") if len(text) > 400][:8]
TOLERANCE = 2e-2  # mean |difference of log-probabilities| between bfloat16 in vLLM and float32 in Transformers
NEAR_TIE = 0.1


class Running(NamedTuple):
    """A server."""

    address: str
    log: Any

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request, None if it is empty."""
        data = json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as response:
            content = response.read()
        return json.loads(content) if content else None

    def complete(self, prompt: Any, **settings: Any) -> list[dict]:
        """Greedy completions."""
        model = self.models()[0]["id"]
        return self.post("/v1/completions", model=model, prompt=prompt, temperature=0, **settings)["choices"]

    def models(self) -> list[dict]:
        """What is served."""
        with urlopen(f"{self.address}/v1/models", timeout=120) as response:
            return json.load(response)["data"]

    def logprobs(self) -> Tensor:
        """Of the tokens of PROMPTS, as the server sees them."""
        choices = self.complete(PROMPTS, max_tokens=1, prompt_logprobs=0)
        return torch.tensor(
            [next(iter(place.values()))["logprob"] for choice in choices for place in choice["prompt_logprobs"][1:]]
        )


class Reference:
    """The same checkpoint in Transformers, in float32."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prompts = [AutoTokenizer.from_pretrained(directory)(prompt)["input_ids"] for prompt in PROMPTS]

    def distributions(self, ids: list[int], alpha: float) -> Tensor:
        """Log-probabilities of what follows each token."""
        model = load_corrected(self.directory, alpha=alpha, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def logprobs(self, alpha: float) -> Tensor:
        """Of the tokens of PROMPTS."""
        model = load_corrected(self.directory, alpha=alpha, dtype=torch.float32)
        found = []
        for ids in map(torch.tensor, self.prompts):
            with torch.no_grad():
                found.append(model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0])
        return torch.cat(found)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_vllm", EXAMPLES / "serve_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """What server processes inherit; the last lets the dial be turned by requests."""
    settings = environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    del settings["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server has its engine in another process
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_llama, tmp_path_factory.mktemp("served") / "tiny-srd")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def served(example: ModuleType, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The checkpoint, corrected in full, in a server whose dial can be turned."""
    settings = ["--hf-overrides", '{"srd_config": {"compute": "merge"}}', "--max-model-len", "512"]
    settings += ["--worker-extension-cls", "srd_modifier.vllm.dial.Dial"]
    command = example.serve_command(str(checkpoint), settings)
    path = tmp_path_factory.mktemp("server") / "LOG"
    with path.open("a+b") as log, example.server(command, log) as address:
        yield Running(address, log)


def distance(served: Tensor, reference: Tensor) -> float:
    return float((served - reference).abs().mean())


def test_it_serves_the_directory(served: Running, checkpoint: Path) -> None:
    (model,) = served.models()
    assert model["id"] == str(checkpoint)
    assert model["max_model_len"] == 512


def test_the_log_says_once_what_is_corrected(served: Running, example: ModuleType) -> None:
    (line,) = [line for line in example.read(served.log).splitlines() if "srd-modifier: " in line]
    assert "merge 32 layers, 56 modules of the checkpoint, alpha 1, " in line


def test_prompts_have_the_probabilities_of_the_corrected_model(served: Running, reference: Reference) -> None:
    found = served.logprobs()
    assert distance(found, reference.logprobs(1.0)) <= TOLERANCE
    # which says something only if plain W4 would not do
    assert distance(found, reference.logprobs(0.0)) > 2 * TOLERANCE


def test_echoed_probabilities_are_the_same(served: Running) -> None:
    (choice,) = served.complete(PROMPTS[0], max_tokens=1, echo=True, logprobs=0, prompt_logprobs=0)
    own = [next(iter(place.values()))["logprob"] for place in choice["prompt_logprobs"][1:]]
    assert choice["logprobs"]["token_logprobs"][1 : len(own) + 1] == pytest.approx(own, abs=1e-6)


def test_continuations_are_the_reference_s_own(served: Running, reference: Reference) -> None:
    """At each place the reference's best token, or one as good: after one of those they may go different ways."""
    for prompt, ids in zip(PROMPTS[:2], reference.prompts, strict=False):
        (choice,) = served.complete(prompt, max_tokens=24, logprobs=0, return_token_ids=True)
        assert choice["prompt_token_ids"] == ids
        generated = torch.tensor(choice["token_ids"])
        assert len(generated) == 24
        expected = reference.distributions([*ids, *generated.tolist()], 1.0)[len(ids) - 1 : -1]
        own = expected.gather(1, generated[:, None])[:, 0]
        assert float((expected.max(1).values - own).max()) < NEAR_TIE
        assert distance(torch.tensor(choice["logprobs"]["token_logprobs"]), own) <= TOLERANCE


def test_the_example_asks_it(served: Running, example: ModuleType, reference: Reference) -> None:
    text, nats = example.ask(served.address, PROMPTS[0], PROMPTS)
    assert text == served.complete(PROMPTS[0], max_tokens=16)[0]["text"]
    assert nats == pytest.approx(float(-reference.logprobs(1.0).mean()), abs=TOLERANCE)


def test_the_dial_can_be_turned_over_http(served: Running, reference: Reference) -> None:
    """By the requests that docs/vllm.md names; what was cached of a prompt is not used again."""
    before = served.complete(PROMPTS[0], max_tokens=1, logprobs=0)[0]["logprobs"]["token_logprobs"]
    for alpha in (0.0, 1.0):
        settings = {"alpha": alpha, "compute": "merge"}
        assert served.post("/collective_rpc", method="set_srd_config", args=[settings]) == {"results": [None]}
        served.post("/reset_prefix_cache")
        found = served.logprobs()
        assert distance(found, reference.logprobs(alpha)) <= TOLERANCE
        assert distance(found, reference.logprobs(1.0 - alpha)) > 2 * TOLERANCE
        after = served.complete(PROMPTS[0], max_tokens=1, logprobs=0)[0]["logprobs"]["token_logprobs"]
        assert (after == before) == (alpha == 1.0)


def test_a_wrong_setting_of_the_dial_is_answered_with_a_sentence(served: Running, reference: Reference) -> None:
    (error,) = served.post("/collective_rpc", method="set_srd_config", args=[{"alpha": 2, "compute": "merge"}])[
        "results"
    ]
    assert "alpha is 2, expected a number from 0 to 1" in error
    assert distance(served.logprobs(), reference.logprobs(1.0)) <= TOLERANCE


def test_the_example_serves_plain_w4(
    example: ModuleType,
    checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(PROMPTS), encoding="utf-8")
    name, settings = list(example.SERVINGS.items())[-1]
    monkeypatch.setattr(example, "SERVINGS", {name: settings})
    monkeypatch.setattr("sys.argv", ["serve_vllm.py", str(checkpoint), str(text)])
    example.main()
    command, answer = capsys.readouterr().out.strip().splitlines()  # and no line of the plugin
    assert command.startswith("$ ")
    assert command.endswith("--quantization compressed-tensors")
    assert answer.startswith("plain W4: ")
    nats = float(answer.removeprefix("plain W4: ").partition(" ")[0])
    corrected, plain = (float(-reference.logprobs(alpha).mean()) for alpha in (1.0, 0.0))
    assert abs(nats - plain) < abs(nats - corrected)


def test_a_damaged_residual_stops_the_server_with_a_sentence(
    example: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    next((damaged / "srd").glob("*.safetensors")).unlink()
    with (tmp_path / "LOG").open("a+b") as log, pytest.raises(SystemExit, match="the server did not start") as stop:  # noqa: SIM117
        with example.server(example.serve_command(str(damaged), []), log):
            pass
    assert "CheckpointError" in str(stop.value)
    assert str(damaged) in str(stop.value)
