"""On the compute node: one rank of a training job. Heavy: torch and friends."""

import logging

# bitsandbytes advises every CPU job to install a package for a faster path that gives no gradients (see base.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
