"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import csv
import ctypes
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rnn_longctx.cli_capacity import capacity
from rnn_longctx.errors import InputError

TEXTS = "stdlib, a file, a directory, jsonl:PATH[:field], parquet:PATH[:column], hf:dataset[:split[:column]]."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find where a recurrent language model stops working as its context grows, and what fixes it.",
)

Many = Optional[list[str]]  # noqa: UP045 (typer reads it)
STATE = typer.Option(help="Round the recurrent state to it between calls (float32): bfloat16, float16, float64.")
MODEL = typer.Argument(help='"demo", a directory, or a Hugging Face hub id.')


@app.command("eval")
def evaluate_command(
    model: Annotated[Optional[str], MODEL] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="YAML file; options given here win.")] = None,  # noqa: UP045
    lengths: Annotated[str | None, typer.Option(help="Tokens: 256,1k,64k,1m (k = 1024, m = 1024^2).")] = None,
    task: Annotated[Many, typer.Option(help="lm, passkey, or passkey:n=100,max=8k; again for more.")] = None,
    mitigation: Annotated[
        Many, typer.Option(help="none, all, state-norm, rri:alpha=0.999,beta=0.75, FILE.yaml, a+b; again for more.")
    ] = None,
    text: Annotated[str | None, typer.Option(help=TEXTS)] = None,
    calibration_text: Annotated[str | None, typer.Option(help="Text for remedies that are calibrated.")] = None,
    train_length: Annotated[Optional[str], typer.Option(help="Where the checkpoint does not say.")] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option(help='"bytes", a directory, or a hub id.')] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Folder for results and plots.")] = None,  # noqa: UP045
    batch: Annotated[Optional[int], typer.Option(help="The most streams read side by side.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option()] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16, float16, float64.")] = None,  # noqa: UP045
    state_dtype: Annotated[Optional[str], STATE] = None,  # noqa: UP045
    backend: Annotated[Optional[str], typer.Option(help="Force a scan backend.")] = None,  # noqa: UP045
) -> None:
    """Loss and recall of a model at increasing lengths, without and with remedies: a table, results and plots."""
    from rich.console import Console

    from rnn_longctx.config import from_dict, load_yaml, parse_length, parse_lengths, to_dict
    from rnn_longctx.eval import EvalConfig, Results, evaluate, parse_task
    from rnn_longctx.eval.leaderboard import board_tables, leaderboard
    from rnn_longctx.eval.plots import plot_all
    from rnn_longctx.eval.report import header, table
    from rnn_longctx.mitigations import parse_remedy

    given = {
        "model": model, "lengths": lengths and parse_lengths(lengths), "tasks": task or None,
        "mitigations": mitigation or None, "text": text, "calibration_text": calibration_text,
        "train_length": train_length and parse_length(train_length), "tokenizer": tokenizer, "out": out,
        "batch": batch, "seed": seed, "device": device, "dtype": dtype, "backend": backend,
        "state_dtype": state_dtype,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    if config is None and model is None:
        raise InputError("name a model (demo, a directory, a hub id) or a --config file")
    base = to_dict(load_yaml(EvalConfig, config)) if config else {}
    c = from_dict(EvalConfig, base | given, "eval")

    for words in c.tasks:  # a misspelt name shows before anything is loaded, and so does an unwritable folder
        parse_task(words)
    for words in c.mitigations:
        if words != "all":
            parse_remedy(words)
    Results(c.out)
    lm = _load(c.model, c.device, c.dtype, c.tokenizer, c.train_length)
    lm.use_backend(c.backend)
    lm.use_state_dtype(c.state_dtype)
    state = lm if hasattr(lm, "scan_state_elements") else lm.config
    console = Console()
    if not console.is_terminal:  # a log: lines as wide as the tables want
        console = Console(width=110)
    console.print(
        header(
            lm.name,
            sum(p.numel() for p in lm.parameters()),
            state.scan_state_elements,
            state.conv_state_elements,
            lm.train_length,
            str(lm.device),
            c.dtype if lm.state_dtype is None else f"{c.dtype} with states in {c.state_dtype}",
            lm.backend,
        )
    )
    frame = evaluate(lm, c.lengths, c.tasks, c.mitigations, text=c.text, calibration_text=c.calibration_text,
                     out=c.out, batch=c.batch, seed=c.seed, progress=console.is_terminal)  # fmt: skip
    for part in table(frame, width=console.width):
        console.print(part)
    written = ["results.parquet", "results.csv"]
    if len(frame["mitigation"].unique()) > 1:
        leaderboard(frame).to_csv(Path(c.out) / "leaderboard.csv", index=False)
        written.append("leaderboard.csv")
    for part in board_tables(frame) if "all" in c.mitigations else []:
        console.print(part)
    written += [p.name for p in plot_all(frame, c.out)]
    console.print(f"{c.out}: {', '.join(written)}")


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/train/demo.yaml.")],
    set: Annotated[Many, typer.Option("--set", help="Override one key: optimizer.lr=1e-3; again for more.")] = None,
    stream: Annotated[Optional[Path], typer.Option(help="A directory where text arrives: small updates on it, each kept only while held-out loss and passkeys hold. Until a file STOP is there.")] = None,  # noqa: UP045, E501
) -> None:  # fmt: skip
    """Train a model, or go on where a killed run stopped.

    Over several GPUs: accelerate launch -m rnn_longctx.train CONFIG, or torchrun --nproc-per-node 8 -m
    rnn_longctx.train CONFIG."""
    from rnn_longctx.config import load_yaml
    from rnn_longctx.train import TrainConfig, TrainingDiverged, train, train_online

    try:
        loaded = load_yaml(TrainConfig, config, set or [])
        saved = train(loaded) if stream is None else train_online(loaded, stream)
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"saved {saved}")
    except TrainingDiverged as error:
        typer.echo(f"rnn-longctx: {error}", err=True)
        raise typer.Exit(1) from None


@app.command("calibrate")
def calibrate_command(
    model: Annotated[str, MODEL],
    mitigation: Annotated[str, typer.Option(help="rri, window, state-norm, state-norm:every=64, token-filter, ...")],
    target: Annotated[str, typer.Option(help="Tokens to be read, such as 32k.")],
    text: Annotated[str, typer.Option(help="Found on this; never what is to be evaluated.")] = "builtin",
    out: Annotated[Path, typer.Option(help="YAML file, for --mitigation FILE.")] = Path("remedy.yaml"),
    slices: Annotated[int, typer.Option(min=1, help="Of the text.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_length: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "float32",
) -> None:
    """Find a remedy's settings: the least loss at the target length that keeps the model's recall."""
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.eval import calibrate

    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)) or out.is_dir():
        raise InputError(f"cannot write {out}: no such folder, or no file of it")
    lm, goal = _load(model, device, dtype, tokenizer, train_length), parse_length(target)
    found = calibrate(lm, mitigation, goal, load_text(text), seed=seed, slices=slices, say=typer.echo)
    found.save(out)
    typer.echo(f"{out}: {found.remedy}")


@app.command("probe")
def probe_command(
    model: Annotated[list[str], typer.Argument(help='"demo", a directory, or a hub id; several to compare.')],
    length: Annotated[str, typer.Option(help="Tokens to be read, such as 64k.")] = "32k",
    prompt: Annotated[str, typer.Option(help="text, newline or passkey.")] = "text",
    every: Annotated[int, typer.Option(help="Tokens between two looks at the states.")] = 256,
    text: Annotated[str, typer.Option(help=TEXTS)] = "stdlib",
    slices: Annotated[int, typer.Option(min=1, help="Rows read side by side.")] = 1,
    prove: Annotated[bool, typer.Option(help="Cap the accused heads alone, then others; measure the loss.")] = False,
    remember: Annotated[bool, typer.Option(help="Effective remembrance too: reads three times as much.")] = False,
    log: Annotated[Many, typer.Option(help="tensorboard or wandb, where installed; again for both.")] = None,
    mitigation: Annotated[str, typer.Option(help="Watch the model with a remedy on it.")] = "none",
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("runs/probe"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_length: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "float32",
) -> None:
    """Which heads of a model leave the range of their training, when, and whether that is what costs the loss."""
    import pandas as pd

    from rnn_longctx import mitigate
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.mitigations import parse_remedy
    from rnn_longctx.probes.pictures import draw
    from rnn_longctx.probes.run import probe, scalar_rows
    from rnn_longctx.scalars import scalars

    goal, remedy, source = parse_length(length), parse_remedy(mitigation), load_text(text)
    rows = []
    for i, name in enumerate(model):
        lm = _load(name, device, dtype, tokenizer, train_length)
        where = out if len(model) == 1 else out / f"{i}-{lm.name}"
        with mitigate(lm, remedy, target_length=goal):
            found = probe(lm, source, goal, prompt=prompt, every=every, slices=slices, seed=seed, prove=prove,
                          remember=remember, say=typer.echo)  # fmt: skip
        paths = [*found.save(where), *draw(found, where)]
        with scalars(log or [], where, lm.name) as write:
            for position, values in scalar_rows(found):
                write(values, position)
        if found.ablation:
            typer.echo(str(found.ablation))
        typer.echo(f"{where}: {', '.join(p.name for p in paths)}")
        rows.append({"model": name, **found.summary()})
    if len(model) > 1:
        frame = pd.DataFrame(rows)
        frame.to_csv(out / "models.csv", index=False)
        typer.echo(frame.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))


@app.command("generate")
def generate_command(
    model: Annotated[str, MODEL],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    mitigation: Annotated[str, typer.Option()] = "none",
    monitor: Annotated[
        str | None,
        typer.Option(help="Watch for collapse: warn, raise, mitigate:NAME, rollback:NAME, fallback:truncate."),
    ] = None,
    load_state: Annotated[Optional[Path], typer.Option(help="Go on from what --save-state kept.")] = None,  # noqa: UP045
    save_state: Annotated[Optional[Path], typer.Option(help="Keep what the prompt left, to ask it again.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    train_length: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "float32",
    state_dtype: Annotated[Optional[str], STATE] = None,  # noqa: UP045
) -> None:
    """Continue a prompt of any length, with a remedy on the model."""
    from contextlib import nullcontext

    import torch

    from rnn_longctx import CollapseError, CollapseMonitor, mitigate
    from rnn_longctx.mitigations import active, parse_remedy
    from rnn_longctx.models import state
    from rnn_longctx.models.generate import continuation, prefill

    remedy, lm = parse_remedy(mitigation), _load(model, device, dtype, tokenizer, train_length)
    lm.use_state_dtype(state_dtype)
    raw = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
    ids = torch.from_numpy(lm.tokenizer.encode(raw))[None]
    if ids.shape[1] == 0:
        raise InputError("the prompt is empty")
    target = state.target_of(load_state) if load_state else None
    target = target or ids.shape[1] + max_new_tokens
    with mitigate(lm, remedy, target_length=target):
        read = state.load_state(load_state, lm) if load_state else None
        watching = CollapseMonitor.calibrated(lm).on(lm, monitor) if monitor else nullcontext()
        try:
            with watching as watch:
                logits, cache = prefill(lm, ids, read)
                if save_state:  # under what is on by now
                    state.save_state(save_state, cache, lm, active(lm)[0], target)
                draw = torch.Generator(lm.device).manual_seed(seed)
                said = continuation(lm, logits, cache, temperature, draw)
                new = [int(next(said)) for _ in range(max_new_tokens)]
        except CollapseError as error:
            typer.echo(f"rnn-longctx: {error}", err=True)
            raise typer.Exit(1) from None
    typer.echo(lm.tokenizer.decode(new))
    if watch is not None:
        seen = watch.reports[-1] if watch.reports else f"nothing yet: a look is taken every {watch.every} tokens"
        typer.echo(f"monitor: {seen}", err=True)


@app.command("lm-eval")
def lm_eval_command(
    model: Annotated[str, typer.Option(help='"demo", a directory, or a Hugging Face hub id.')],
    tasks: Annotated[str, typer.Option(help="rnn_longctx_passkey,niah_single_1,lambada_openai: names of lm-eval's.")],
    lengths: Annotated[str, typer.Option(help="Tokens, for tasks that make data of a length: 4k,16k,64k.")] = "4k",
    mitigation: Annotated[Many, typer.Option(help="none, state-norm, a+b; again for more.")] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The most documents of a task and length.")] = None,  # noqa: UP045
    include_path: Annotated[Optional[str], typer.Option(help="A folder with more task files.")] = None,  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help="JSONL file for rnn_longctx_qa or _summary.")] = None,  # noqa: UP045
    out: Annotated[str, typer.Option(help="Folder for lm_eval.json and lm_eval.csv.")] = "runs/lm-eval",
    batch: Annotated[int, typer.Option(min=1, help="The most rows of equal length side by side.")] = 8,
    max_length: Annotated[Optional[str], typer.Option(help="Refuse longer requests. Default: no limit.")] = None,  # noqa: UP045
    train_length: Annotated[Optional[str], typer.Option(help="Where the checkpoint does not say.")] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option(help='"bytes", a directory, or a hub id.')] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "float32",
) -> None:
    """Tasks of EleutherAI's lm-eval at chosen lengths, without and with remedies: a table, JSON and CSV."""
    import logging

    from rnn_longctx.config import parse_length, parse_lengths
    from rnn_longctx.mitigations import parse_remedy

    names, remedies = [t.strip() for t in tasks.split(",") if t.strip()], mitigation or ["none"]
    parse_lengths(lengths)
    for words in remedies:  # a misspelt name shows before anything is loaded
        parse_remedy(words)
    from rnn_longctx.eval.harness_run import lm_eval_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    frame = lm_eval_table(
        _load(model, device, dtype, tokenizer, train_length), names, lengths, remedies, limit=limit,
        include_path=include_path, data=data, out=out, batch=batch, seed=seed,
        max_length=None if max_length is None else parse_length(max_length), progress=sys.stderr.isatty(),
    )  # fmt: skip
    shown = frame.drop(columns=["model", "weights_hash"])
    typer.echo(shown.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
    typer.echo(f"{out}: lm_eval.json, lm_eval.csv")


@app.command("plot")
def plot_command(
    directory: Annotated[Path, typer.Argument(help="A folder with results.parquet or results.csv.")],
) -> None:
    """Draw the plots again, from the table alone."""
    from rnn_longctx.eval import Results
    from rnn_longctx.eval.plots import plot_all

    for path in plot_all(Results.read(directory), directory):
        typer.echo(str(path))


app.add_typer(capacity, name="capacity")
bench = typer.Typer(no_args_is_help=True, help="Speed, side by side with what people use today.")
app.add_typer(bench, name="bench")


@bench.command("cpu")
def bench_cpu(
    model: Annotated[str, MODEL] = "demo",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[str, typer.Option()] = "4k",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Tokens per second against transformers' Mamba-2 on the CPU: same weights, same threads, float32."""
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.bench import cpu

    typer.echo(cpu(_load(model, "cpu", "float32", None, None), batch, parse_length(length), repeats))


OUT = typer.Option(help="CSV file to write the table to.")


@bench.command("scan")
def bench_scan(
    lengths: Annotated[str, typer.Option(help="Tokens of the forward rows, batch 1.")] = "16k,64k,1m",
    train: Annotated[str, typer.Option(help="Batch x tokens of the forward and backward rows.")] = "8x8k",
    remedies: Annotated[str, typer.Option(help="Batch x tokens of the rows with remedies.")] = "1x1m,1x128k,9x32k",
    out: Annotated[Optional[Path], OUT] = None,  # noqa: UP045
) -> None:
    """The scan on a GPU against mamba-ssm's and flash-linear-attention's kernels, where those are installed."""
    from rnn_longctx.config import parse_lengths
    from rnn_longctx.eval.bench_scan import scan_rows

    forward = parse_lengths(lengths) if lengths else []
    _record(scan_rows(forward, _sizes("train", train), _sizes("remedies", remedies)), out)


def _sizes(name: str, text: str) -> list[tuple[int, int]]:
    from rnn_longctx.config import parse_length

    pairs = [word.split("x") for word in text.split(",") if word]
    if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise InputError(f"{name}: expected batch x tokens, such as 8x8k, got {text!r}")
    return [(int(batch), parse_length(length)) for batch, length in pairs]


@bench.command("model")
def bench_model(
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "64k,1m",
    segment: Annotated[str, typer.Option(help="Tokens read at once.")] = "64k",
    out: Annotated[Optional[Path], OUT] = None,  # noqa: UP045
) -> None:
    """Reading a prompt with a model of 370M parameters on a GPU, here and in mamba-ssm, where that is installed."""
    from rnn_longctx.config import parse_length, parse_lengths
    from rnn_longctx.eval.bench_model import prefill_rows

    _record(prefill_rows(parse_lengths(lengths), parse_length(segment)), out)


@bench.command("train")
def bench_train(
    whole: Annotated[str, typer.Option(help="Batch x tokens of sequences that are read in one call.")] = "2x8k",
    streams: Annotated[
        str, typer.Option(help="Batch x tokens of those read by segments that pass states on.")
    ] = "1x128k",
    segments: Annotated[str, typer.Option(help="Tokens of a segment.")] = "2k,4k,8k",
    layers: Annotated[int, typer.Option(min=1)] = 48,
    d_model: Annotated[int, typer.Option(min=1)] = 1024,
    vocab: Annotated[int, typer.Option(min=1)] = 50288,
    out: Annotated[Optional[Path], OUT] = None,  # noqa: UP045
) -> None:
    """Training steps of a model of 370M parameters in bf16, here and in mamba-ssm, where that is installed."""
    from rnn_longctx.config import parse_lengths
    from rnn_longctx.eval.bench_train import train_rows
    from rnn_longctx.models import Mamba2Config

    shape = Mamba2Config(d_model=d_model, n_layer=layers, vocab_size=vocab, d_state=128, headdim=64)
    _record(train_rows(shape, _sizes("whole", whole), _sizes("streams", streams), parse_lengths(segments)), out)


@bench.command("decode")
def bench_decode(
    tokens: Annotated[int, typer.Option(min=1)] = 500,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Optional[Path], OUT] = None,  # noqa: UP045
) -> None:
    """Tokens per second of a model of 370M parameters on a GPU, with and without a remedy."""
    from rnn_longctx.eval.bench_model import decode_rows

    _record(decode_rows(tokens, batch), out)


@bench.command("parallel")
def bench_parallel(
    length: Annotated[str, typer.Option(help="Tokens of the context that is read.")] = "4m",
    segment: Annotated[str, typer.Option(help="Tokens that a GPU reads at once.")] = "256k",
    train: Annotated[str, typer.Option(help="Tokens of the sequence that is trained on; 0: none.")] = "16k",
    out: Annotated[Optional[Path], OUT] = None,  # noqa: UP045
) -> None:
    """One context over 1, 2, 4, ... GPUs with a model of 370M parameters, under torchrun: torchrun --nproc-per-node 4
    -m rnn_longctx.cli bench parallel"""
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.bench_parallel import joined, model_370m, parallel_rows

    tokens, at_once, trained = parse_length(length), parse_length(segment), 0 if train == "0" else parse_length(train)
    with joined() as rank:
        rows = parallel_rows(model_370m(), tokens, at_once, trained)
        if rank == 0:
            _record(rows, out)
        else:
            for _ in rows:
                pass


def _record(rows: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Print each row as it is measured, and keep those there are in a CSV file."""
    from rnn_longctx.eval.bench_scan import environment

    words = [w for i, w in enumerate(sys.argv) if i > 0 and w != "--out" and sys.argv[i - 1] != "--out"]
    about = {**environment(), "command": shlex.join(["rnn-longctx", *words])}
    kept: list[dict[str, Any]] = []
    for row in rows:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        typer.echo("  ".join(f"{k} {v}" for k, v in shown.items()))
        kept.append(shown | about)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, kept[0].keys())
                writer.writeheader()
                writer.writerows(kept)


def _load(model: str, device: str, dtype: str, tokenizer: str | None, train_length: Any) -> Any:
    import torch

    from rnn_longctx.config import parse_length
    from rnn_longctx.models.adopt import load_any

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    length = None if train_length is None else parse_length(train_length)
    return load_any(model, device=device, dtype=dtype, tokenizer=tokenizer, train_length=length)


def _tune_cpu() -> None:
    """Before torch is loaded: threads that wait asleep (spinning ones stall each other if anything else runs), and
    an allocator that keeps a call's activations instead of handing them back and faulting them in anew."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD


def main() -> None:
    """Entry point. Errors of input are one line; a reader that went away (`| head`) is no error."""
    _tune_cpu()
    try:
        app(standalone_mode=True)
    except InputError as error:
        print(f"rnn-longctx: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
