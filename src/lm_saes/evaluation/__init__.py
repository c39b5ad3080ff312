"""Measuring a trained dictionary on held-out text: reconstruction, sparsity, downstream loss, examples."""
