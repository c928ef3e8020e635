"""Posterior samplers on one learned prior, ours and those of other libraries. `python -m
recipes.benchmarks.posterior.run`."""
