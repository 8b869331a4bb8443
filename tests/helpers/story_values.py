"""Values put into a table of results."""

from __future__ import annotations

import numpy as np


def put(frame, value, **where):
    """Set the value and every sample of the rows that match; the mean of a row is then its value."""
    rows = np.logical_and.reduce([frame[c] == v for c, v in where.items()])
    assert rows.any()
    for i in frame.index[rows]:
        frame.at[i, "samples"] = [float(value)] * len(frame.at[i, "samples"])
    frame.loc[rows, "value"] = value
