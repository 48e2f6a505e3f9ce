"""Which modules are corrected.

patterns    module names and `re:` patterns, as compressed-tensors reads them
depth       a module's decoder layer, its depth in the model, and the four chunks of depth
choice      the `correct:` setting of a recipe, applied to the names of a model
"""
