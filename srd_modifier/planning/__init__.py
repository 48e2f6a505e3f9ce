"""What `srd quantize` would do, before it is done: from config.json and the headers of the weights' files alone.

source       where the headers come from: a directory, or the metadata of a hub model
skeleton     the model without weights
modules      what the recipe does to each module, and every tensor that would be saved
files        bytes of those files, to the byte
alternatives the same model in other forms
miniature    the same model with fewer layers and made-up weights
estimate     what quantizing is expected to take
probe        short runs on such models, in `measuring`, for time and memory
calibrated   the same for recipes that calibrate: one run, in `calibrating`, taken apart into its `stages`
programs     starts these runs in processes of their own
plan         all of it in one call
"""
