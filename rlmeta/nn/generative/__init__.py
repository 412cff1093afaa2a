"""Generative networks: from noise to samples like those that were seen."""

__all__ = ["vae"]
