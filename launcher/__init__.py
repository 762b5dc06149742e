"""launcher: one recipe in, a planned, survivable fine-tuning run out."""

__version__ = "0.1.0"
