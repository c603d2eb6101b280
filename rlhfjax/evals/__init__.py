"""Statistics of comparisons and of generated text."""
