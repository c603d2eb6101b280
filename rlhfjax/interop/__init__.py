"""Models in and out: our own folders, GGUF files; the one place that knows how a model lies on a disk."""
