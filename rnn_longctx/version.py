"""The version of this library, for every module to read."""

__version__ = "0.1.0"
