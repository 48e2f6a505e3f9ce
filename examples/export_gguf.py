"""Write a calibrated Q4_K_M for llama.cpp, compare it with ggml's own, and let llama.cpp write a few words with it.

    python examples/export_gguf.py [MODEL] [TEXT] [--output DIR]

With no arguments it takes the small model and the text of this folder, and needs neither a GPU, a network nor a
compiler. The file loads in any llama.cpp:

    llama-cli -m out/gguf/tiny-llama-Q4_K_M.gguf -p "The river"

and in llama-cpp-python:

    from llama_cpp import Llama

    model = Llama("out/gguf/tiny-llama-Q4_K_M.gguf")
    print(model("The river", max_tokens=16)["choices"][0]["text"])
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.gguf.calibration.text import Calibration
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "tiny-llama"), help="model directory or name")
    parser.add_argument("text", nargs="?", type=Path, default=HERE / "text" / "demo.txt", help="UTF-8 text to score")
    parser.add_argument("--output", type=Path, default=Path("out/gguf"), help="directory for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    # calibrated on what the model writes itself, so that the text below is new to it
    calibration = Calibration("self", num_samples=16, max_seq_length=256)
    importance = options.output / "imatrix.gguf"
    calibrated = export_gguf(
        options.model,
        options.output,
        file_type=FileType.Q4_K_M,
        calibration=calibration,
        imatrix_output=importance,
        overwrite=True,
    )
    plain = export_gguf(options.model, options.output / "ggml.gguf", imatrix=importance, overwrite=True)
    for name, summary in (("ggml, with importance", plain), ("calibrated", calibrated)):
        report = evaluate_text(
            str(summary.path), options.text, reference=options.model, ctx=512, stride=512, max_tokens=4096
        )
        assert report.divergence is not None
        print(f"{name:22} {summary.bytes:,} bytes, divergence {report.divergence.kld_mean:.2e} nats per token")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with LlamaCpp(calibrated.path) as llama:
        prompt = llama.tokenize("The river")
        print(f"llama.cpp: {tokenizer.decode([*prompt, *llama.complete(prompt, 16)])}")


if __name__ == "__main__":
    main()
