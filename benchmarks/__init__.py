"""Benchmarks: every figure in the documentation comes from one of these, and `make bench` runs them all."""
