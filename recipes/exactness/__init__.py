"""Is the clean distribution recovered from noisy or incomplete data alone? `python -m
recipes.exactness.run`."""
