"""Images from noisy images alone, at low and at high noise. `python -m recipes.noisy_images.run`."""
