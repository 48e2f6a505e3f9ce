"""Perplexity and divergence of causal language models, measured on the same tokens.

The parts, in their order of use: `load` turns a name, a directory or a GGUF file (through `gguf` and `gguf_families`)
into a model, `text` a file into tokens, `windows` a token stream into scoring windows, `scores` windows into one number
per token, `report` all of it into the result that is printed and written. `evaluate.evaluate_text` does the whole.
"""
