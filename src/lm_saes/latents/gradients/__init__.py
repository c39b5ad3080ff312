"""Gradients of large tensors that are handed over as rows, or block by block."""
