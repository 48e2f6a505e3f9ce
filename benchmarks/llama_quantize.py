"""llama.cpp's own quantizer, measured. Runs in an environment of its own: `pip install llama-cpp-python gguf`.

python -m benchmarks.llama_quantize SOURCE.gguf TARGET.gguf FILE_TYPE THREADS [IMATRIX.gguf]
"""

import ctypes
import sys
from pathlib import Path

from benchmarks.process import measure, print_cost


def main() -> None:
    import gguf
    import llama_cpp

    source, target, file_type, threads, *imatrix = sys.argv[1:]
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = gguf.LlamaFileType[f"MOSTLY_{file_type}"]
    parameters.nthread = int(threads)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(imatrix[0]).tensors} if imatrix else {}
    names = [name.removesuffix(".counts") for name in stored if name.endswith(".counts")]
    values = [(stored[f"{name}.in_sum2"] / stored[f"{name}.counts"]).ravel() for name in names]
    if names:
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [(n.encode(), v.ctypes.data_as(pointer), v.size) for n, v in zip(names, values, strict=True)]
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))

    def work() -> None:
        if llama_cpp.llama_model_quantize(bytes(Path(source)), bytes(Path(target)), ctypes.byref(parameters)):
            sys.exit(f"llama.cpp refused {source}")

    print_cost(measure(work))


if __name__ == "__main__":
    main()
