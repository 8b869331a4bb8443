"""A process of several that dies is begun again. torchrun would end all of them for one that fails, and with them what
they measure; so each does its work in a process below it, which may die."""

from __future__ import annotations

import atexit
import os
import shlex
import subprocess
import sys
import time

from rnn_longctx.eval.pool import end_with_parent
from rnn_longctx.progress import Say
from rnn_longctx.ranks import rank, world

# The environment variable of a process below: when the run began, and the pipe that it says into that it ends by
# itself, be it for an error.
BELOW = "RNN_LONGCTX_RANK"
LIVES = 5  # of a rank


def revived(say: Say) -> float:
    """Go on in a process below this one, in which it returns when the run began, in seconds since the epoch.

    Args:
        say: what speaks of a process that died.
    Raises:
        SystemExit: in this process, when the one below has ended by itself, or has died LIVES times: the code is then 0
            for all ranks but the first, so that the launcher lets the others go on.
    """
    if BELOW in os.environ:
        end_with_parent()
        began, pipe = os.environ[BELOW].split()
        os.set_inheritable(int(pipe), False)
        atexit.register(os.write, int(pipe), b"ended")
        return float(began)
    began = repr(time.time())
    for life in range(LIVES):
        code, by_itself = _live(began)
        if by_itself:
            raise SystemExit(code)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        say(f"rank {rank()} died ({how}), and is {'begun again' if life + 1 < LIVES else 'given up'}")
    raise SystemExit(1 if rank() == 0 else 0)


def _live(began: str) -> tuple[int, bool]:
    """Run this command line in a process below; return its exit code, and whether it ended by itself."""
    ours, its = os.pipe()
    os.set_blocking(ours, False)
    # (standard input ends with this process, and the other process with that)
    process = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        stdin=subprocess.PIPE,
        pass_fds=(its,),
        env=os.environ | {BELOW: f"{began} {its}"},
    )
    os.close(its)
    try:
        code = process.wait()
        try:
            return code, os.read(ours, 1) != b""
        except BlockingIOError:  # a process that it began holds the pipe
            return code, False
    finally:
        process.terminate()
        process.wait()
        os.close(ours)


def command_line() -> str:
    """Return the command line that goes on with this run, on as many ranks of one machine."""
    return f"torchrun --nproc-per-node {world()} -m rnn_longctx.cli {shlex.join(sys.argv[1:])}"
