"""Figures and one self-contained HTML page from a workdir."""
