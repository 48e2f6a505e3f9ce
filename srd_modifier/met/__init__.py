"""The hydration policy file `met.json`: which residual to load for which intent, and what that costs.

policy      the chunks of every intent: the default, or a custom one from YAML
inventory   what a model's tensors take, layer by layer
measured    the inventory of a checkpoint or a GGUF file, from its headers
estimate    the inventory of a model that is not quantized yet, from its config alone
sums        totals and budgets, and the check that they close
schema      the file's shape: met.schema.json, and what checks a file by it
document    build, estimate, read and check the whole
speed       how fast the storage is that the load times are for
"""

from srd_modifier.met.document import build_met, encode_met, estimate_met, read_met
from srd_modifier.met.policy import INTENTS, Policy, policy_of

__all__ = ["INTENTS", "Policy", "build_met", "encode_met", "estimate_met", "policy_of", "read_met"]
