"""BAGEL on routed kernels: paint, edit and answer with one mixture-of-transformers model."""

__version__ = "0.1.0"
