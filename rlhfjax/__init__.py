"""rlhfjax: the whole RLHF recipe in JAX — pretraining, fine-tuning, reward learning, PPO."""

import time

__version__ = "0.1.0"
BEGAN = time.time()
"""When this process began, after Python's own start: start-up is measured from here."""
