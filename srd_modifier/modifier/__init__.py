"""The SRDModifier of llm-compressor recipes.

base        SRDModifier, the life cycle and nothing else
plan        which modules are corrected, and every reason to refuse before calibration
events      looking over the shoulder of the quantizer that follows in the recipe
capture     original weights to residuals, one layer at a time
inputs      what calibration shows of the modules' inputs
bases       a module's quantized weight, taken off it and put back
calibrated  one module's base, residual and damage under them
candidates  the residuals that a budget chooses from, waiting on disk
allocation  a budget spent on them
finished    what a calibration has finished, on the disk, so that a killed one can be resumed
passes      calibration forwards that a resumed one need not make
companion   the GGUF file that a recipe asks for beside its checkpoint
saving      the sidecar that `save_pretrained` writes with the model
"""

from llmcompressor.modifiers.factory import ModifierFactory

from srd_modifier.modifier.base import SRDModifier

# here and not in the post-import hook alone: that one runs too early when this package is the first to import
# llm-compressor
ModifierFactory.register("SRDModifier", SRDModifier)

__all__ = ["SRDModifier"]
