"""Text, the stream of activations, and their cache on disk."""
