"""Axes: who holds which latents, tokens and sites of a run over several processes."""
