"""GGUF files: weights in llama.cpp's own formats.

ggml    ggml's block types: quantize with ggml itself, check, and read back
"""
