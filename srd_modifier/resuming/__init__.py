"""Quantizations that a kill may interrupt: their journal, where they lie until they are whole, and who may go on."""
