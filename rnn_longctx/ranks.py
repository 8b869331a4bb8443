"""Which process this is of several that `torchrun` or `accelerate launch` began: what they put into the environment."""

from __future__ import annotations

import os
import time

PATIENCE = 10.0  # seconds that a rank waits for the launcher to end it


def world() -> int:
    """Return the number of processes that were begun together, on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0 on. Rank 0 is the one that speaks."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those of its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leave_to_first() -> None:
    """Wait, on every rank but the first, before a mistake is said. Rank 0 says one that all make, and the launcher ends
    the others with it; who is still there after PATIENCE seconds has probably made it alone, and says it."""
    if rank() > 0:
        time.sleep(PATIENCE)
