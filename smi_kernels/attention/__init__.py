"""Attention over few tokens: forward, and gradients with respect to what the previous layer made."""
