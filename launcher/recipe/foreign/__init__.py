"""Configurations of other tools, read into recipes; what cannot be carried over is listed."""
