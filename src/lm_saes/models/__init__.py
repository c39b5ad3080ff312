"""Language models: sources of activations, and of weights that dictionaries may start from."""
