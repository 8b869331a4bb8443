"""What stands before a run's first step: its folder claimed, its settings checked, its text read, its model made."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from rnn_longctx.config import home_path, to_dict
from rnn_longctx.data import ByteTokenizer, Tokenizer, load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import library
from rnn_longctx.mitigations import fold
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint.layouts import check_layout
from rnn_longctx.models.config import warn_of_unfit
from rnn_longctx.models.lm import LM
from rnn_longctx.progress import Say, silent
from rnn_longctx.train.autocast import autocast
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.corpus import Corpus, load_corpus
from rnn_longctx.train.mix import check_mix
from rnn_longctx.train.parallel import least_tokens, refuse_unspread
from rnn_longctx.train.snapshots import claim_folder, held
from rnn_longctx.train.starts import check_start
from rnn_longctx.train.team import Team

# Settings that change where and how often things are written and how the work is cut, not what is trained.
_NEUTRAL = {"out", "device", "log_every", "checkpoint_every", "export_every", "save_dtype", "save_layout", "licences"}
_NEUTRAL |= {"log_to", "accumulate", "sequence_parallel", "fsdp"}


@dataclass(frozen=True)
class Run:
    """What is trained, on which text, by which processes.

    Attributes:
        config: with the shape of the model.
        model: on the team's device.
        say: what rank 0 speaks of progress with; the others say nothing.
    """

    config: TrainConfig
    corpus: Corpus
    model: LM
    team: Team
    say: Say

    @property
    def out(self) -> Path:
        return home_path(self.config.out)

    @property
    def text_hashes(self) -> list[str | int]:
        return [text["hash"] for text in self.corpus.texts]

    def autocast(self) -> torch.autocast:
        return autocast(self.config, self.team.device)


def prepare(config: TrainConfig, team: Team, stack: ExitStack, say: Say, online: bool = False) -> Run:
    """Return what is to be trained; its folder is claimed until the stack ends. Raises InputError, as `train` does."""
    if team.device.type == "cuda":  # graphs and streams are made on the current card, and PyTorch keeps the first one's
        stack.enter_context(torch.cuda.device(team.device))
        torch.cuda.graph.default_capture_stream = None
    say = silent if team.rank else say
    for kind in config.log_to if team.rank == 0 else []:  # before a text is read for hours
        library(kind)
    tokenizer = load_tokenizer(config.data.tokenizer)
    started = None if config.init is None else _started_from(config.init, tokenizer, team.device)
    if started is not None:
        label = f"{started.name}@{started.weights_hash}"  # no path: this is recorded with the finished model
        config = replace(config, model=started.config, init=label)
    _check_model(config, tokenizer)
    _check_passing(config)
    assert config.model is not None
    check_mix(config.data, tokenizer, config.model.vocab_size)
    if started is not None and config.mitigation is not None:
        _fold(started, config.mitigation)

    def claim() -> None:
        claim_run(config, online)
        stack.enter_context(held(home_path(config.out)))

    team.first(claim)
    corpus = _read_text(config, tokenizer, team, say)
    torch.manual_seed(config.seed)
    assert config.model is not None
    team.first(partial(warn_of_unfit, config.model, config.longest))
    model = LM(config.model).to(team.device) if started is None else started
    model.train_length, model.name, model.tokenizer = config.longest, home_path(config.out).name, tokenizer
    return Run(config, corpus, model, team, say)


def claim_run(config: TrainConfig, online: bool = False) -> None:
    """Record the config in the run's folder, or check that it is the one recorded there. Raises InputError: another."""
    claim = {name: value for name, value in to_dict(config).items() if name not in _NEUTRAL}
    claim["online"] = {k: v for k, v in claim["online"].items() if k != "poll"} if online else None
    claim_folder(home_path(config.out), claim)


def _read_text(config: TrainConfig, tokenizer: Tokenizer, team: Team, say: Say) -> Corpus:
    say("reading the text")
    began = time.monotonic()
    corpus = load_corpus(config.data, tokenizer, config.longest, say)
    names = ", ".join(f"{t['name']} ({t['hash']})" for t in corpus.texts)
    sizes = f"{len(corpus):,} tokens and {len(corpus.held_out):,} held out"
    say(f"text: {names}: {sizes}, in {time.monotonic() - began:.0f} s")
    if team.first(lambda: names) != names:  # of another machine: each rank takes its rows of what it reads itself
        raise InputError(f"data.text: rank {team.rank} reads {names}, and that is not what rank 0 reads")
    if len(config.stages) > 1 and len(corpus.held_out) <= config.stages[0].length:
        few = f"{len(corpus.held_out)} tokens are too few; see data.held_out"
        raise InputError(f"train_length: a schedule is gated on held-out text, and {few}")
    return corpus.to(team.device)


def _check_model(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise InputError where the model has too few ids for the tokenizer, or no file of the asked layout holds it."""
    assert config.model is not None
    if config.model.vocab_size < tokenizer.vocab_size:
        sizes = f"{config.model.vocab_size}, tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens"
        raise InputError(f"model.vocab_size: {sizes}")
    try:
        check_layout(config.model, config.save_layout)
    except InputError as error:
        raise InputError(f"save_layout: {error}") from None


def _check_passing(config: TrainConfig) -> None:
    """Raise InputError where streams cannot begin as they should, or where a segment leaves a rank of a lane too few
    tokens for its convolutions' edges."""
    assert config.model is not None
    with torch.device("meta"):
        model = LM(config.model)
    if config.passing is not None:
        check_start(model, config.passing.start)
    if config.sequence_parallel == 1:
        return
    try:
        refuse_unspread(model)
    except InputError as error:
        raise InputError(f"sequence_parallel: {error}; set it to 1") from None
    for length in (stage.length for stage in config.stages):
        segment = length if config.passing is None else min(length, config.passing.segment)
        least, needed = min(segment, length % segment or segment), least_tokens(model)
        if least // config.sequence_parallel < needed:
            cut = f"a segment of {least} tokens over {config.sequence_parallel} ranks"
            raise InputError(f"sequence_parallel: {cut} leaves fewer than {needed} tokens a rank")


def _started_from(init: str, tokenizer: Tokenizer, device: torch.device) -> LM:
    """Return the checkpoint in float32, with where it comes from as its provenance."""
    try:
        model = checkpoint.load(init, device=device)
    except InputError as error:
        raise InputError(f"init: {error}") from None
    spec = getattr(model.tokenizer, "spec", "bytes")  # None: it does not say
    if spec is not None and isinstance(model.tokenizer, ByteTokenizer) != isinstance(tokenizer, ByteTokenizer):
        wrong = f"{tokenizer.name}, but that is not what {init} was trained with"
        raise InputError(f"data.tokenizer: {wrong}; set data.tokenizer={spec}")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a float32 file is mapped: what becomes of it must not matter
    model.tokenizer = tokenizer
    origin = {"name": model.name, "weights": model.weights_hash, "provenance": model.provenance}
    model.provenance = {"init": origin}
    return model


def _fold(model: LM, mitigation: str) -> None:
    """Fold the mitigation into the checkpoint, whose training length is still its own. A run that goes on takes its
    weights, folded once, from the snapshot."""
    try:
        fold(model, mitigation)
    except InputError as error:
        raise InputError(f"mitigation: {error}") from None
