"""`rnn-longctx eval`: loss and recall at increasing lengths, without and with remedies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, TEXTS, Many, StateDtype, Tokenizer, TrainLength, about, load_model, option
from rnn_longctx.cli.output import fact, head, hush, problem, say, table, talks, terminal, wrote
from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text, plain_table
from rnn_longctx.ranks import rank, world

if TYPE_CHECKING:
    from rnn_longctx.eval import EvalConfig


@dataclass(frozen=True)
class EvalOptions:
    """The keys of a config, which options win over."""

    lengths: Annotated[str | None, option("Tokens: 256,1k,64k,1m (k = 1024, m = 1024^2).", "256,1k,4k,16k")] = None
    task: Annotated[
        Many, option("lm, multikey, words, passkey, or passkey:n=100,max=8k; again for more.", "lm and passkey")
    ] = None
    mitigation: Annotated[
        Many, option("all, none, state-norm, rri:alpha=0.999,beta=0.75, FILE.yaml, a+b; again for more.", "none")
    ] = None
    text: Annotated[Many, option(f"{TEXTS[:-1]}; again for more.", "stdlib")] = None
    calibration_text: Annotated[
        str | None, option("For remedies that are calibrated; never what is evaluated.", "the checkpoint's, or builtin")
    ] = None
    train_length: TrainLength = None
    tokenizer: Tokenizer = None
    out: Annotated[str | None, option("Folder for results and plots.", "runs/eval")] = None
    batch: Annotated[int | None, option("The most streams read side by side.", "32")] = None
    seed: Annotated[int | None, option("Of the prompts.", "0")] = None
    device: Annotated[str | None, option("auto, cpu, cuda, cuda:1.", "auto")] = None
    dtype: Annotated[str | None, option("float32, bfloat16, float16, float64.", "float32")] = None
    state_dtype: StateDtype = None
    backend: Annotated[str | None, option("Force a scan backend.", "chosen")] = None

    def over(self, config: Path | None, model: str | None) -> EvalConfig:
        """Return the config of a file with what the command line says in its place."""
        from rnn_longctx.config import from_dict, load_yaml, parse_length, parse_lengths, to_dict
        from rnn_longctx.eval import EvalConfig

        if config is None and model is None:
            raise InputError("name a model (demo, a directory, a hub id) or a --config file")
        options: dict[str, Any] = vars(self) | {
            "model": model,
            "lengths": self.lengths and parse_lengths(self.lengths),
            "tasks": self.task or None,
            "mitigations": self.mitigation or None,
            "text": self.text or None,
            "train_length": self.train_length and parse_length(self.train_length),
        }
        options = {k: v for k, v in options.items() if v is not None and k not in ("task", "mitigation")}
        base = to_dict(load_yaml(EvalConfig, config)) if config else {}
        return from_dict(EvalConfig, base | options, "eval")


@command("eval")
def evaluate(
    model: Annotated[str | None, MODEL] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options given here win.")] = None,
    options: EvalOptions = EvalOptions(),
) -> None:
    """Loss and recall of a model at increasing lengths, without and with remedies: a table, results and plots.

    Under torchrun or accelerate launch the ranks share them out, each on a GPU of its own.

    Examples:
        rnn-longctx eval demo --lengths 256,1k,4k --out runs/mine
        rnn-longctx eval demo --task lm --mitigation none --mitigation state-norm
        rnn-longctx eval --config configs/eval/demo.yaml
        torchrun --nproc-per-node 8 -m rnn_longctx.cli eval demo --mitigation all --out runs/mine
    """
    from rnn_longctx.eval.revival import command_line, revived

    began = revived(problem) if world() > 1 else None
    from rnn_longctx.devices import device_of_rank
    from rnn_longctx.eval import Results, answer
    from rnn_longctx.eval.claims import Claims
    from rnn_longctx.eval.show.plots import plot_all
    from rnn_longctx.eval.show.terminal import asked, conclusion
    from rnn_longctx.eval.show.terminal import table as tables
    from rnn_longctx.eval.tables.leaderboard import leaderboard

    c = options.over(config, model)
    question = c.question()  # a misspelt name shows before anything is loaded, and so does an unwritable folder
    Results(c.out)
    claims = None if began is None else Claims(c.out, rank(), began, problem)
    if claims and claims.rank > 0:
        hush()
    device = device_of_rank(c.device) if claims else c.device
    lm = load_model(c.model, device, c.dtype, c.tokenizer, c.train_length, c.state_dtype)
    lm.use_backend(c.backend)
    head(about(lm, c.dtype))
    measured = answer(lm, question, out=c.out, progress=talks(), claims=claims)
    if claims and claims.rank > 0:
        return
    missing = f"{claims.missing}; go on with: {command_line()}" if claims and claims.missing else ""
    if missing and measured.empty:
        raise InputError(missing)
    frame = Results.read(home_path(c.out))  # of all models
    frame.attrs = measured.attrs
    shown, more = asked(frame)
    fact("conclusion", conclusion(shown))
    table("results", shown, *tables(plain_table(shown), width=terminal().width))
    if more:
        say(f"{c.out}: {more}")
    written = ["results.parquet", "results.csv"]
    if len(frame["mitigation"].unique()) > 1:
        write_atomic(home_path(c.out) / "leaderboard.csv", csv_text(leaderboard(frame)).encode())
        written.append("leaderboard.csv")
    written += [p.name for p in plot_all(frame, c.out)]
    wrote(home_path(c.out), written)
    if missing:
        raise InputError(missing)
