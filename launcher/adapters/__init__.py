"""Afterwards: compare, merge, export and serve adapters."""
