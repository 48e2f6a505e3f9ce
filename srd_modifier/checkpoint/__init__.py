"""The checkpoint on disk: a plain W4A16 model with a residual sidecar beside it (docs/format.md).

config      srd_config: the settings in config.json, and each module's alpha
shards      one safetensors file, mapped into memory and checked in the order of its bytes
base        the W4A16 model: its tensors, its digest, its weights in float32
writer      the sidecar's files, laid out in advance and written module by module
sidecar     the sidecar of a checkpoint, verified, decoded module by module
save        base and sidecar bound together in one directory
sensitivity the predicted damage of every module, bound to its checkpoint
spending    what a budget leaves for the residual, and what a residual takes of it
trim        a smaller sidecar, cut out of a larger one
merge       the corrected weights as an ordinary dense checkpoint
sizes       bytes on disk and bits per weight
locate      where the files of a model lie, by directory or hub id
atomic      directories and files that appear whole or not at all
"""
