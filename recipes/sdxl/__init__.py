"""SDXL fine-tuned on noisy latents."""
