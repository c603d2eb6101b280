"""Sources, corpora, tokenizers, the chat template, packing, preferences and loaders."""
