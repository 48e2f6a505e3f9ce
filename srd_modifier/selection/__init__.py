"""Which modules are corrected, and how much is spent on each.

patterns     module names and `re:` patterns, as compressed-tensors reads them
depth        a module's decoder layer, its depth in the model, and the four chunks of depth
choice       the `correct:` setting of a recipe, applied to the names of a model
sensitivity  how much the model's predictions feel an error in each module
budget       a limit of bytes or of damage, and the best way to spend it: a knapsack
fusion       the modules that vLLM fuses into one, which get the same format
"""
