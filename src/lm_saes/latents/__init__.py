"""Latents between encode and decode: sparse codes, what selects them, and the axis they may be sharded on."""
