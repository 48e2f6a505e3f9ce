"""What a trained model is written as: every export takes a model that is finished, and appears whole or not at all.

dense  an ordinary Transformers directory
w4a16  a compressed-tensors W4A16 checkpoint, for grids of int4 in groups
srd    the same with a residual that leads back to the original weights
gguf   a GGUF file, on the blocks of the training's start or converted anew
"""
