"""Missing pixels: what is learned from incomplete images alone, and is it copied? `python -m
recipes.masking.run`."""
