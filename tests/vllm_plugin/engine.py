"""A vLLM engine in a process of its own: `python engine.py REQUEST.json` answers in RESULT.json beside it.

vLLM does not give back what an engine has taken, so every engine of the tests gets its own process. REQUEST has

    arguments   of `vllm.LLM`
    prompts     lists of token ids
    tokens      how many to generate greedily after each
    steps       optional, settings of `srd_modifier.vllm.dial.set_alpha`: after the first answer, the dial is turned to
                each of them and the prompts are answered again

and RESULT a list with, for every step, `logprobs` (of each prompt's tokens after the first) and `generated`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def answer(engine: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Log-probabilities of the prompts' own tokens, and greedy continuations."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return {
        "logprobs": [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, prompts, strict=True)
        ],
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
    }


def main(request: Path) -> None:
    """Run the engine that the request describes."""
    warnings.simplefilter("ignore")
    from vllm import LLM

    from srd_modifier.vllm.dial import EXTENSION, set_alpha

    values = json.loads(request.read_text())
    extension = {"worker_extension_cls": EXTENSION} if values.get("steps") else {}
    engine = LLM(**extension, **values["arguments"])
    results = [answer(engine, values["prompts"], values["tokens"])]
    for step in values.get("steps", []):
        set_alpha(engine, **step)
        results.append(answer(engine, values["prompts"], values["tokens"]))
    request.with_name("RESULT.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
