"""Models on disk, read and written: our own folders, Hugging Face folders, GGUF files, adapters."""
