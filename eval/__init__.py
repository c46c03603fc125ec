"""Benchmarks and measurements; each module is a command, `python -m eval.NAME`."""
