"""What heads hold, from the contributions of tokens: what a filter would have taken from them, and whether the key of a
passkey is among it."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import Remedy, mitigate
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.generate import generate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.probes.terms import read_terms, refuse
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.tasks.passkey import passkey_batch
from rnn_longctx.tasks.prompts import Prompt


@torch.no_grad()
def dropped_share(model: Mamba2LM, ids: Tensor, remedy: str | Remedy = "token-filter",
                  target_length: int | None = None, segment: int = SEGMENT) -> pd.DataFrame:  # fmt: skip
    """How much of what the plain model held at the last token came from tokens that a filter drops.

    Which tokens are dropped is read off the filtered model, whose lower layers already differ; how much they
    contributed, off the plain one. What LongMamba (arXiv 2504.16053) takes away.

    Args: ids (1, T); remedy: one that drops tokens and does nothing else; target_length: what it is made for, in
        tokens, None for T.
    Returns: a row a layer and head, columns layer, head, min_dt (the filter's threshold, 0 where it does not act),
        dropped (share of the T tokens), share (of the sizes of the contributions at the last token).
    Raises: InputError: what `attribute` and `mitigate` refuse, another remedy, a model that has one already.
    """
    model = as_language_model(model)
    refuse(model, ids, segment)
    if any(mixer.policy != PLAIN for mixer in model.mixers):
        raise InputError("the plain model is compared with the filtered one: take the remedy off first")
    target = ids.shape[1] if target_length is None else target_length
    with mitigate(model, remedy, target_length=target) as handle:
        plan = handle.plan
        if plan.restart or plan.reader or any(p != ScanPolicy(min_dt=p.min_dt) for p in plan.policies):
            raise InputError(f"{handle.remedy} does something else than drop tokens (as token-filter does)")
        skipped = [[(p.scale == 0) & (p.log_decay == 0) for p in parts] for parts in read_terms(model, ids, segment)]
    dropped = torch.stack([torch.cat(layer).T.cpu() for layer in zip(*skipped)])  # (L, H, T)
    plain = attribute(model, ids, segment=segment)
    size = plain.values[:, 0].abs()
    share = (size * dropped).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)
    layers, heads = share.shape
    return pd.DataFrame({
        "layer": np.repeat(np.arange(layers), heads),
        "head": np.tile(np.arange(heads), layers),
        "min_dt": np.concatenate([np.broadcast_to(p.min_dt, heads) for p in plan.policies]),
        "dropped": dropped.double().mean(-1).flatten().numpy(),
        "share": share.flatten().numpy(),
    })  # fmt: skip


@torch.no_grad()
def key_hits(model: Mamba2LM, n: int = 20, length: int = 1024, top: int = 10, seed: int = 0) -> pd.DataFrame:
    """Where a passkey is found: of right answers, how often a head's top tokens hold a digit of the key.

    The query is the position that says the answer's first digit, the key's digits are those of its sentence in the
    prompt (twice five). Beside it stands the same at the last token before the question: a head with as much there
    holds digits whether they are asked for or not. The first row is the best head; of many heads the best of a few
    answers is above `chance` by luck too. A head may find the key without a hit: at a token beside it, into which
    convolutions brought it.

    Args: n prompts of `length` tokens, as `passkey_batch(seed)` makes them; top: tokens a head.
    Returns: best head first, columns layer, head, hits (share of the right answers), share (of the head's
        contributions: what those digits among its top hold, mean), unasked_hits, unasked_share (before the question),
        chance (of a hit by `top` tokens drawn at random), right (answers), n. Empty where no answer is right.
    Raises: InputError: numbers below 1, a model without a tokenizer, what `attribute` and `passkey_batch` refuse.
    """
    model = as_language_model(model)
    if n < 1 or top < 1:
        raise InputError(f"expected at least one prompt and one token, got n={n}, top={top}")
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: the passkey's prompts are text")
    prompts = passkey_batch(model.tokenizer, length, n, seed)
    ids = torch.from_numpy(np.stack([p.ids for p in prompts]))
    refuse(model, ids[:1], SEGMENT)
    hits, shares, chances = [], [], []
    for row, prompt in zip(ids, prompts):
        said = generate(model, row[None], prompt.new_tokens)[0].cpu()
        if re.match(r"\d*", model.tokenizer.decode(said.tolist()).strip())[0] != prompt.answer:  # type: ignore[index]
            continue
        first = next(i for i, token in enumerate(said.tolist()) if _digit(model.tokenizer, token))
        digits = key_digits(model.tokenizer, prompt)
        queries = [prompt.question - 1, length + first - 1]
        found = attribute(model, torch.cat([row, said[:first]])[None], top, queries=queries)
        hit = torch.isin(found.tokens, torch.tensor(digits, device="cpu")) & (found.values != 0)  # (L, 2, H, top)
        hits.append(hit.any(-1))
        shares.append((found.values.abs() * hit).sum(-1) / found.sums.clamp(min=torch.finfo(found.sums.dtype).tiny))
        seen = length + first
        chances.append(1 - math.comb(seen - len(digits), min(top, seen)) / math.comb(seen, min(top, seen)))
    columns = ["layer", "head", "hits", "share", "unasked_hits", "unasked_share", "chance", "right", "n"]
    if not hits:
        return pd.DataFrame(columns=columns)
    rate, share = (torch.stack(v).double().mean(0) for v in (hits, shares))  # (L, 2, H)
    layers, _, heads = rate.shape
    table = pd.DataFrame({
        "layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers),
        "hits": rate[:, 1].flatten().numpy(), "share": share[:, 1].flatten().numpy(),
        "unasked_hits": rate[:, 0].flatten().numpy(), "unasked_share": share[:, 0].flatten().numpy(),
        "chance": float(np.mean(chances)), "right": len(hits), "n": n,
    })  # fmt: skip
    return table[columns].sort_values(["hits", "share"], ascending=False, ignore_index=True)


def key_digits(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Positions of the tokens of a prompt's key sentence that hold a digit."""
    return [i for span in prompt.spans for i in range(*span) if _digit(tokenizer, int(prompt.ids[i]))]


def _digit(tokenizer: Tokenizer, token: int) -> bool:
    return any(c.isdigit() for c in tokenizer.decode([token]))
