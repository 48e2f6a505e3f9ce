"""Corrected models in Transformers.

quantizer     the hook: plain `from_pretrained(DIR)` gives the corrected model
correction    the residual of a loaded model: the dial, hydrate and release, in place
locking       one consistent set of weights for every call, while other threads change them
measure       what hydration takes, in time and memory, measured per intent
memory        what this process has in memory
weights       where a checkpoint's module lives in a model
source        the directory of a checkpoint, the sidecar fetched from the hub if need be
containers    what Transformers sees of a signed container
load          load_corrected
"""

from srd_modifier.transformers.correction import hydrate, release, set_alpha
from srd_modifier.transformers.load import load_corrected
from srd_modifier.transformers.locking import steady_weights

__all__ = ["hydrate", "load_corrected", "release", "set_alpha", "steady_weights"]
