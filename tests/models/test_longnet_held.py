"""What LongNet's layer holds after a call, against its definition: of each head the last tokens that it took of the
segment that goes on."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnn_longctx.models.flash import Pattern
from rnn_longctx.models.mixers.dilated import _held_after


def by_definition(document, heads, pattern, end):
    """Return (B, H, M, D) of a document (B, T, H, D) read up to before `end`."""
    w, r, memory = pattern.segment, pattern.dilation, pattern.memory
    held = document.new_zeros(len(document), heads, memory, document.shape[-1])
    for head in range(heads):
        taken = [t for t in range(end) if t % r == head % r]
        for place, t in enumerate(reversed(taken[-memory:] if memory else []), 1):
            if t >= end // w * w:
                held[:, head, memory - place] = document[:, t, head]
    return held


@settings(deadline=None, max_examples=150)
@given(
    heads=st.integers(1, 7),
    dilation=st.integers(1, 5),
    size=st.integers(1, 6),
    ranks=st.integers(0, 20),
    new=st.integers(1, 70),
)
def test_held_is_what_heads_took_last_of_the_present_segment(heads, dilation, size, ranks, new):
    pattern, start = Pattern(size * dilation, dilation), ranks * dilation
    document = torch.randn(2, start + new, heads, 3)
    before = by_definition(document, heads, pattern, start)
    after = _held_after(document[:, start:], before, pattern, start)
    assert torch.equal(after, by_definition(document, heads, pattern, start + new))
