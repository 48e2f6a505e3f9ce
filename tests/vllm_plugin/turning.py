"""A vLLM engine whose dial is turned, in a process of its own: `python turning.py REQUEST.json`.

REQUEST has

    arguments   of `vllm.LLM`
    prompts     lists of token ids
    turns       arguments of `srd_modifier.vllm.dial.set_alpha`; besides, `spoil` is a file whose last byte is changed
                before

and RESULT.json beside it a list, for the start and for every turn, with

    error       what the turn raised, or null
    refused     what the engine raised when it was asked then, or null; it is the last entry if so
    logprobs    of each prompt's tokens after the first
    next        log-probability of the token that follows each prompt, from an engine that may reuse its cache
    cached      how many tokens of the prompts it then took from its cache
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def answer(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """What the engine says now; asked for prompt log-probabilities, vLLM does not look into its cache."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in prompts]
    common = {"temperature": 0, "max_tokens": 1}
    following = engine.generate(asked, SamplingParams(logprobs=0, **common), use_tqdm=False)
    read = engine.generate(asked, SamplingParams(prompt_logprobs=0, **common), use_tqdm=False)
    return {
        "refused": None,
        "next": [next(iter(output.outputs[0].logprobs[0].values())).logprob for output in following],
        "cached": sum(output.num_cached_tokens for output in following),
        "logprobs": [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(read, prompts, strict=True)
        ],
    }


def spoil(path: Path) -> None:
    """Change the last byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def main(request: Path) -> None:
    """Run the engine that the request describes."""
    warnings.simplefilter("ignore")
    from vllm import LLM

    from srd_modifier.vllm.dial import set_alpha

    values = json.loads(request.read_text())
    engine = LLM(**values["arguments"])
    results = [{"error": None, **answer(engine, values["prompts"])}]
    for turn in values["turns"]:
        spoiled = turn.pop("spoil", None)
        if spoiled is not None:
            spoil(Path(spoiled))
        error = None
        try:
            set_alpha(engine, **turn)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        try:
            results.append({"error": error, **answer(engine, values["prompts"])})
        except Exception as raised:
            results.append({"error": error, "refused": f"{type(raised).__name__}: {raised}"})
            break
    request.with_name("RESULT.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
