"""Experiments on the embedded model: one command each, into JSON that ``docs/experiments.md`` is made from."""
