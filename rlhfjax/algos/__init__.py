"""The equations as pure jnp functions: losses, advantages, reward shaping, estimators."""
