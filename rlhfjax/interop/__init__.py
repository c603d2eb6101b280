"""Models in and out: our own folders, Hugging Face's, GGUF files; what knows how a model lies on a disk."""
