"""Attention probabilities of single rows, where a ranking needs them."""
