"""Tests, arranged by what they need: unit (nothing), train (the training stack on CPU), cluster (a real Slurm)."""
