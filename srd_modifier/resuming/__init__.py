"""Quantizations that a kill may interrupt, streamed or calibrated.

workplace  where one lies until it is whole, beside its output
journal    what of it is on the disk: a line for every step
task       what it is made of, so that nothing else continues it
suitable   which of those that calibrate can be resumed
"""
