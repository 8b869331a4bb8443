"""Chunk selection (OPRM, arXiv 2505.07793): a prompt is cut into chunks, each read alone with the question after it,
and the answer begins from the one that is surest,

    chosen = argmin over chunks j of the entropy of p(. | chunk_j, question)

The question is the prompt's last `query` tokens. A strategy for prompts: the chosen chunk's state is all that is kept,
so losses of a stream are not defined. Reads nothing of the model and changes no recurrence. The chunks of a row are
read side by side, as many at once as a segment holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy, same_everywhere
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import last_hidden
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class ChunkSelect(Remedy):
    """Answer from the chunk of the prompt that is surest.

    Attributes:
        chunk: tokens of a chunk, the question not counted.
        query: tokens of the question.
    """

    name = "chunk-select"
    examples = ("chunk-select:chunk=17,query=5",)
    chunk: int = 2000
    query: int = quiet(64)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.query < 1:
            raise InputError(f"chunk-select: chunk and query are at least 1 token, got {self.chunk} and {self.query}")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        reader = lambda model, ids, segment: read(model, ids, segment, self.chunk, self.query)  # noqa: E731
        return Plan(same_everywhere(model), reader=reader)


@torch.no_grad()
def read(model: LanguageModel, ids: Tensor, segment: int, chunk: int, query: int) -> tuple[Tensor, StreamCache]:
    """Logits (B, vocab) after the last of ids (B, T), and the cache, of each row's surest chunk."""
    chosen = [_surest(model, row.to(model.device), segment, chunk, query) for row in ids]
    if len(ids) == 1:
        chosen[0][1].position = torch.full((1,), ids.shape[1], device="cpu")
        return chosen[0]
    cache = type(chosen[0][1]).concat([cache for _, cache in chosen], list(range(len(ids))))
    cache.position = torch.full((len(ids),), ids.shape[1], device="cpu")
    return torch.cat([logits for logits, _ in chosen]), cache


def _surest(model: LanguageModel, ids: Tensor, segment: int, chunk: int, query: int) -> tuple[Tensor, StreamCache]:
    body, question = ids[:-query], ids[-query:]
    whole = len(body) // chunk * chunk
    # the chunks are whole from the end on: what is left over is the beginning
    groups = [body[len(body) - whole :].view(-1, chunk)] if whole else []
    if len(body) > whole or not whole:
        groups.append(body[: len(body) - whole][None])
    best: tuple[float, Tensor, StreamCache] | None = None
    for rows in groups:
        for some in rows.split(max(1, segment // (rows.shape[1] + query))):
            cache = model.new_cache()
            prompt = torch.cat([some, question.expand(len(some), -1)], 1)
            last = last_hidden(model.stream(prompt, cache, max(1, segment // len(some))))
            logits = model.logits(last)
            entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
            i = int(entropy.argmin())
            if best is None or float(entropy[i]) < best[0]:
                best = float(entropy[i]), logits[i : i + 1], cache.rows([i])
    assert best is not None
    return best[1:]
