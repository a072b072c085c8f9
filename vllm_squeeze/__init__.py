"""Squeezed attention for vLLM: long shared prompt prefixes, indexed offline and read in part."""

__version__ = "0.1.0"
