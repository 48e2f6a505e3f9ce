"""GGUF tensors chosen by what they do to the model's output on a calibration text.

layers        a model read from disk one decoder layer at a time
sensitivity   what errors in its outputs cost
visit         each of its matrices with their inputs, while one after the other is replaced
search        codes, scales and mins of a matrix
budget        the type of each tensor, within a number of bytes
encode        all of it together: the bytes of a whole model
"""
