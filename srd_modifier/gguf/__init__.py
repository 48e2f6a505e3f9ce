"""GGUF files: weights in llama.cpp's own formats (docs/gguf.md).

export       from a model directory to a file, in one call
plan         what a file will hold; ggml's own rounding; writing it
weights      the dense weights of a model or checkpoint, tensor by tensor
families     what llama.cpp calls the tensors of a model, and what else it must know of it
vocabulary   the tokenizer, confirmed by llama.cpp itself
mixture      the type of each tensor by llama.cpp's rules
importance   imatrix files, in and out
metadata     what a file says of itself
ggml         ggml's block types: quantize with ggml itself, check, and read back
blocks       the same blocks taken apart and put together
calibration  codes, scales and types chosen by what they do to the model's output
adapter      what a file lost, as a LoRA adapter
writer       the file, tensor by tensor
reader       the file, read back
llamacpp     llama.cpp in this process, to tokenize and to generate
"""
