"""The commands: training, generation of activations, evaluation, and their settings."""
