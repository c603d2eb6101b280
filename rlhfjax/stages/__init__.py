"""One file a stage of the recipe."""
