"""Metrics of what was left out of data and changed in it when it was opened."""

from typing import Any


def data_metrics(data: Any, stage: str) -> dict[str, float]:
    """Returns STAGE/data_skipped_rows and STAGE/data_merged_turns, of what the data counts.

    Args:
      data: a source, or the batches that a loader makes of it.
    """
    counts = {"skipped_rows": "skipped", "merged_turns": "merged"}
    return {
        f"{stage}/data_{name}": float(getattr(data, attribute))
        for name, attribute in counts.items()
        if hasattr(data, attribute)
    }
