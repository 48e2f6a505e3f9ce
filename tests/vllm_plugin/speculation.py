"""An engine that speculates, in a process of its own: `python speculation.py REQUEST.json` answers in RESULT.json.

REQUEST has `arguments` of `vllm.LLM`, `prompts` (lists of token ids) and `tokens`; RESULT has the greedy continuations
(`generated`) and vLLM's own counters of speculation (`counters`).
"""

import json
import sys
import warnings
from pathlib import Path

PREFIX = "vllm:spec_decode_num_"


def main(request: Path) -> None:
    """Run the engine that the request describes."""
    warnings.simplefilter("ignore")
    from vllm import LLM, SamplingParams

    values = json.loads(request.read_text())
    engine = LLM(**values["arguments"], disable_log_stats=False)
    prompts = [{"prompt_token_ids": ids} for ids in values["prompts"]]
    parameters = SamplingParams(temperature=0, max_tokens=values["tokens"], ignore_eos=True)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    counters = {
        metric.name.removeprefix(PREFIX): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith(PREFIX) and hasattr(metric, "value")
    }
    result = {"generated": [list(output.outputs[0].token_ids) for output in outputs], "counters": counters}
    request.with_name("RESULT.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
