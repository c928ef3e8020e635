"""Priors from noisy and undersampled multi-coil scans. `python -m recipes.mri.run`."""
