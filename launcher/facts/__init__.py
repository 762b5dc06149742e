"""What exists: model shapes, GPUs, sites and data; never needs weights, GPU or network."""
