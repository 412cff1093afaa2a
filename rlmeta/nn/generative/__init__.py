"""Generative models: the conditional variational autoencoder (VAE)."""

__all__ = ["vae"]
