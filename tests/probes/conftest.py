"""A model that a monitor sees collapse."""

import pytest
from monitored import calibrated, first, ids_of, model, watched


@pytest.fixture
def lost():
    """A model that collapses, its monitor, ids, and where."""
    lm, ids = model(), ids_of()
    monitor = calibrated(lm)
    return lm, monitor, ids, first(watched(lm, monitor, ids))
