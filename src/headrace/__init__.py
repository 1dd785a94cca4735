"""Headrace: an LLM serving system whose centre is the KV cache."""

__version__ = "0.1.0"
