"""Benchmarks and tuning for the mixture-of-transformers packages."""

__version__ = "0.1.0"
