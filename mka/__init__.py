"""Depth compression of language models: merge similar decoder layers, quantize, and prove what was lost."""

__version__ = "0.1.0"
