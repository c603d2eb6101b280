"""rlhfjax: the whole RLHF recipe in JAX — pretraining, fine-tuning, reward learning, PPO."""

import time

BEGAN = (
    time.time()
)  # of this process, but for Python's own start: what start-up is measured from
