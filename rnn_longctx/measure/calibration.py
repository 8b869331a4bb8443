"""What remedies, envelopes and steps were calibrated on, as data: evaluation keeps clear of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """A text and what was taken from it. `str()` is how results and their keys name it.

    Attributes:
        text, text_hash: the text's name and hash (`rnn_longctx.data.Text`).
        slices, length: how many slices of how many tokens were read of it.
        digest: stands for what was measured, where that is part of the name.
        search: how settings were found on it ("grid, seed 0"), in the place of slices.
        documents: digests of the text's documents, where they are known (`rnn_longctx.eval.search.unseen`).
    """

    text: str
    text_hash: str
    slices: int = 0
    length: int = 0
    digest: str = ""
    search: str = ""
    documents: frozenset[str] = frozenset()

    @property
    def source(self) -> str:
        """The text's name and hash."""
        return " ".join(filter(None, (self.text, self.text_hash)))

    def __str__(self) -> str:
        taken = self.search or f"{self.slices} x {self.length}"
        return ", ".join(filter(None, (self.source, taken, self.digest)))
