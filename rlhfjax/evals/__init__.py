"""Held-out loss, preference accuracy and generation quality."""
