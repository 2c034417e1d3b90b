"""Measurements, each in one process, with its baseline interleaved, written down as data with where it was taken."""
