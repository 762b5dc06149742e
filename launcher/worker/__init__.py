"""On the compute node: one rank of a training job. Heavy: torch and friends."""
