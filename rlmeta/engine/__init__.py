"""How a pure function of tensors is recorded and replayed without Python, on several cores, and where its time goes."""

__all__ = ["capture", "clock", "parts", "passes", "tape"]
