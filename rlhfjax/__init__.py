"""rlhfjax: the whole RLHF recipe in JAX — pretraining, fine-tuning, reward learning, PPO."""
