"""Smoothness and magnitude of images."""
