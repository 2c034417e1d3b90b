"""Merging of alike tokens inside the network."""
