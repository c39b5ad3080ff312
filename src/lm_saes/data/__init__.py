"""Text, language models and the streams of activations made from them."""
