"""What works on this machine, found out by small tries, what is missing, and the line that installs it.

Nothing is imported here before it is tried: a machine without torch has a doctor, too.
"""

from rnn_longctx.eval.doctor.checks import Finding, core_works, examine

__all__ = ["Finding", "core_works", "examine"]
