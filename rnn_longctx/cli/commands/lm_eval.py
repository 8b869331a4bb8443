"""`rnn-longctx lm-eval`: tasks of EleutherAI's harness at chosen lengths, without and with remedies."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL_HELP, Many, ModelOptions, option, say_segment
from rnn_longctx.cli.output import table, talks, wrote
from rnn_longctx.plain import plain_table

if TYPE_CHECKING:
    from rnn_longctx.eval.harness.run import HarnessConfig


@dataclass(frozen=True)
class HarnessOptions:
    """What is measured, how much of it, and where the table goes."""

    lengths: Annotated[str, typer.Option(help="Tokens, for tasks that make data of a length: 4k,16k,64k.")] = "4k"
    mitigation: Annotated[Many, option("none, state-norm, a+b; again for more.", "none")] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="The most documents of a task and length.", show_default="all")
    ] = None
    include_path: Annotated[str | None, typer.Option(help="A folder with more task files.")] = None
    data: Annotated[str | None, typer.Option(help="JSONL file for rnn_longctx_qa or _summary.")] = None
    out: Annotated[str, typer.Option(help="Folder for lm_eval.json and lm_eval.csv.")] = "runs/lm-eval"
    batch: Annotated[int, typer.Option(min=1, help="The most rows of equal length side by side.")] = 8
    max_length: Annotated[str | None, option("Refuse longer requests.", "no limit")] = None
    add_bos_token: Annotated[
        bool | None,
        typer.Option(
            "--add-bos-token/--no-add-bos-token",
            help="Whether prompts begin with BOS.",
            show_default="as the tokenizer does",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of prompts that are made of a length, and of sampling.")] = 0

    def config(self, tasks: str) -> HarnessConfig:
        """Return what is asked, checked."""
        from rnn_longctx.config import parse_length
        from rnn_longctx.eval.harness.run import HarnessConfig

        values = vars(self) | {
            "tasks": [name.strip() for name in tasks.split(",") if name.strip()],
            "mitigations": self.mitigation or ["none"],
            "max_length": None if self.max_length is None else parse_length(self.max_length),
        }
        values.pop("mitigation")
        return HarnessConfig(**values)


@command("lm-eval")
def lm_eval(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],  # as lm-eval's own
    tasks: Annotated[str, typer.Option(help="rnn_longctx_passkey,niah_single_1,lambada_openai: names of lm-eval's.")],
    harness: HarnessOptions = HarnessOptions(),
    options: ModelOptions = ModelOptions(),
) -> None:
    """Tasks of EleutherAI's lm-eval at chosen lengths, without and with remedies: a table, JSON and CSV.

    Examples:
        rnn-longctx lm-eval --model demo --tasks rnn_longctx_passkey --lengths 1k --limit 10
        rnn-longctx lm-eval --model demo --tasks niah_single_1 --mitigation state-norm
    """
    import logging

    from rnn_longctx.eval.harness.run import lm_eval_table

    config = harness.config(tasks)  # a misspelt name shows before anything is loaded
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = options.load(model)
    say_segment(lm)
    frame = lm_eval_table(lm, config, progress=talks() and sys.stderr.isatty())
    hidden = ["model", "weights_hash", "dtype", "tokens_read_min", "tokens_read_max", "seed"]
    shown = frame.drop(columns=hidden + (["state_dtype"] if options.state_dtype is None else []))
    lines = plain_table(shown).to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}")
    table("scores", frame, lines)
    wrote(str(config.out), ["lm_eval.json", "lm_eval.csv"], f" (seed {config.seed})")
