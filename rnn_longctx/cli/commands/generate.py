"""`rnn-longctx generate`: continue prompts, with a remedy on the model and a watch over its states."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, Many, ModelOptions, option
from rnn_longctx.cli.output import fact, note, problem, text
from rnn_longctx.errors import CollapseError, InputError

if TYPE_CHECKING:
    import numpy as np

    from rnn_longctx.models.interface import LanguageModel


@dataclass(frozen=True)
class StateOptions:
    """Where a state comes from and goes to."""

    load_state: Annotated[Path | None, typer.Option(help="Go on from what --save-state kept.")] = None
    save_state: Annotated[Path | None, typer.Option(help="Keep what was read and said, to go on from it.")] = None


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when it ends."""

    max_new_tokens: Annotated[int | None, option("At most.", "128, with --save-state 0", min=0)] = None
    stop: Annotated[Many, option("End with this text; again for more.", "the end-of-sequence id alone")] = None
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0
    seed: Annotated[int, typer.Option()] = 0


@command("generate")
def generate(
    model: Annotated[str, MODEL],
    prompt: Annotated[
        list[str],
        typer.Option(help="Text to continue, - for that of standard input; again for more, answered in turn."),
    ],
    mitigation: Annotated[str, typer.Option()] = "none",
    monitor: Annotated[
        str | None,
        option("Watch for collapse: warn, raise, mitigate:NAME, rollback:NAME, fallback:truncate.", "no watch"),
    ] = None,
    state: StateOptions = StateOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    options: ModelOptions = ModelOptions(),
) -> None:
    """Continue a prompt of any length, with a remedy on the model; the text is printed as it is made.

    Examples:
        rnn-longctx generate demo --prompt "import os" --max-new-tokens 40
        rnn-longctx generate demo --prompt - --mitigation state-norm < text.py
        rnn-longctx generate demo --prompt - --save-state doc.state < text.py
    """
    from rnn_longctx import CollapseMonitor, generate_stream, mitigate
    from rnn_longctx.mitigations import active, parse_remedy
    from rnn_longctx.models import saved_state

    load, save = state.load_state, state.save_state
    remedy, target = parse_remedy(mitigation), saved_state.target_of(load) if load else None
    lm = options.load(model)
    prompts = [_tokens(lm, one) for one in prompt]
    if not all(map(len, prompts)):
        raise InputError("the prompt is empty")
    if len(prompts) > 1 and (save or monitor):
        raise InputError("--save-state and --monitor are of one stream: give them one --prompt")
    new = sampling.max_new_tokens if sampling.max_new_tokens is not None else 0 if save else 128
    target, written = target or max(map(len, prompts)) + new, ""
    answers: list[str] = []
    with mitigate(lm, remedy, target_length=target):
        cache: Any = saved_state.load_state(load, lm) if load else lm.new_cache() if save else None
        watching = CollapseMonitor.calibrated(lm).on(lm, monitor) if monitor else nullcontext()
        how: Any = {"temperature": sampling.temperature, "seed": sampling.seed, "stop": sampling.stop or ()}
        try:
            with watching as watch:
                for i, ids in enumerate(prompts):
                    if i:
                        text()
                    stream = cache if i == len(prompts) - 1 or cache is None else cache.clone()
                    answers.append("")
                    for written in generate_stream(lm, ids, new, cache=stream, **how):
                        text(written)
                        answers[-1] += written
                if save:  # under what is on by now
                    saved_state.save_state(save, cache, lm, active(lm)[0], target)
        except CollapseError as error:
            problem(error)
            raise typer.Exit(1) from None
        finally:
            if written:
                text()
            fact("answers", answers)
    if save:
        note(f"wrote {save}, {save.stat().st_size / 2**20:.3g} MiB")
    if watch is not None:
        fact("monitor", watch.summary())
        note(f"monitor: {watch.summary()}")


def _tokens(lm: LanguageModel, prompt: str) -> np.ndarray:
    """Return the ids of a prompt, `-` for standard input. Raises InputError for bytes that are no text."""
    from rnn_longctx.data.content import as_text, not_utf8

    if prompt == "-":
        raw = as_text(sys.stdin.buffer.read(), "standard input")
    else:
        raw = prompt.encode("utf-8", "surrogateescape")
    if (bad := not_utf8(raw)) is not None:
        raise InputError(f"--prompt is not UTF-8 text at byte {bad}")
    return lm.tokenizer.encode(raw)
