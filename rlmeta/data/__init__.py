"""Numbers to learn from: spaces as trees of tensors, labelled samples, data sets, expert demonstrations."""
