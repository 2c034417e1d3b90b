"""Linear layers of a frozen Transformer with what surrounds them: LayerNorm, GELU, residual; input gradients only."""
