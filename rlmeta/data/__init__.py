"""Numbers to learn from: spaces as trees of tensors, labelled samples, data sets, expert demonstrations."""

__all__ = ["demonstrations", "samples", "sets", "spaces", "splits"]
