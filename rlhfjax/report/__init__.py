"""Figures and one self-contained HTML page from a workdir."""

from rlhfjax.report.page import write_report
from rlhfjax.report.terminal import summary_table

__all__ = ["summary_table", "write_report"]
