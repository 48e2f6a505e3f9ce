"""Corrected models in Transformers.

quantizer     the hook: plain `from_pretrained(DIR)` gives the corrected model
correction    the residual of a loaded model: the dial, hydrate and release, in place
weights       where a checkpoint's module lives in a model
source        the directory of a checkpoint, the sidecar fetched from the hub if need be
load          load_corrected
"""

from srd_modifier.transformers.correction import hydrate, release, set_alpha
from srd_modifier.transformers.load import load_corrected

__all__ = ["hydrate", "load_corrected", "release", "set_alpha"]
