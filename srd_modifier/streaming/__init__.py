"""Quantization without data for models of any size: one decoder layer in memory at a time, and resumable.

run        all of it in one call
suitable   which recipes and models this takes
originals  the weights of the model directory, brought in layer by layer
layers     the steps: what is quantized, encoded and copied together
record     what is noted of a step that is done, for `--resume`
pipeline   the life cycle of llm-compressor's `oneshot`, driven layer by layer
"""
