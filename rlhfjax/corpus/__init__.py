"""Filters of raw text: language, quality, duplicates, prompts of one user, evaluation text."""
