"""The one place where the version is written; packaging reads it from here without importing anything."""

__version__ = "0.1.0"
