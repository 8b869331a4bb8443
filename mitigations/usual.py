"""The remedies and controls that `--mitigation all` stands for."""

from __future__ import annotations

from rnn_longctx.mitigations.base import REMEDIES


def standard(train_length: int | None) -> list[str]:
    """Return what `--mitigation all` measures: every remedy at its published or plainest settings (`Remedy.usual`),
    then the controls, those of hybrids last. Left out are those that need a file, or the training length where it is
    not known."""
    kinds = sorted(REMEDIES.values(), key=lambda kind: (kind.diagnoses, kind.control, kind.name != "none"))
    return [text for kind in kinds for text in kind.usual(train_length)]


def diagnostics(train_length: int) -> list[str]:
    """Return the controls that tell which part of a hybrid fails beyond its training length."""
    return [text for kind in REMEDIES.values() if kind.diagnoses for text in kind.usual(train_length)]
