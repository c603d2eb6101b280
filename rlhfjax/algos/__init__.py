"""The equations: pure jnp functions, arrays in, (loss, metrics) out."""
