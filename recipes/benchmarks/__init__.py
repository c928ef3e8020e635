"""Costs, each measured in one run that holds all contenders. `python -m recipes.benchmarks.NAME`."""
