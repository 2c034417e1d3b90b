"""Entry point for tools that still ask for a setup.py; the package is described in pyproject.toml alone."""

from setuptools import setup

setup()
