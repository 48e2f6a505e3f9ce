"""The vLLM plugin: `vllm serve DIR` serves the corrected model, with no flags.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). A checkpoint with a sidecar is
then read by `CorrectedConfig`, which extends vLLM's own compressed-tensors support:

    register    what vLLM learns at its start, and nothing heavier
    settings    what a user can set: alpha, layer alphas, chunks, compute
    config      CorrectedConfig: which layer of the model is computed how
    layers      the three ways to compute a corrected layer: merge, int8, split
    stream      the tensors that vLLM is given to load, the corrected ones in the place of W4
    loader      the one patch of vLLM, which puts the stream in the place of the checkpoint's
    int8        weights and residuals as groups of int8 in the layout of `pack-quantized`
    dial        set_alpha: another alpha for a running engine

Without the plugin, or with `--quantization compressed-tensors`, vLLM serves the plain W4A16 model.
"""

from srd_modifier.vllm.register import register

__all__ = ["register"]
