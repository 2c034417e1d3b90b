"""One optimiser step on pixels."""
