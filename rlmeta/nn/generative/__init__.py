"""Generative models."""

__all__ = ["vae"]
