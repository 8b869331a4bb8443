"""`rnn-longctx bench`: the commands that measure speed, and the tables they print."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError

bench = typer.Typer(no_args_is_help=True, help="Speed, side by side with what people use today.")
OUT = typer.Option(help="CSV file to write the table to.")


@bench.command("cpu")
def bench_cpu(
    model: Annotated[str, typer.Argument(help='"demo", "demo-long", a directory, or a Hugging Face hub id.')] = "demo",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[str, typer.Option()] = "4k",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Tokens per second against transformers' Mamba-2 on the CPU: same weights, same threads, float32."""
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.bench.cpu import cpu
    from rnn_longctx.models.checkpoint.checkpoint import load

    typer.echo(cpu(load(model), batch, parse_length(length), repeats))


@bench.command("scan")
def bench_scan(
    lengths: Annotated[str, typer.Option(help="Tokens of the forward rows, batch 1.")] = "16k,64k,1m",
    train: Annotated[str, typer.Option(help="Batch x tokens of the forward and backward rows.")] = "8x8k",
    remedies: Annotated[str, typer.Option(help="Batch x tokens of the rows with remedies.")] = "1x1m,1x128k,9x32k",
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """The scan on a GPU against mamba-ssm's and flash-linear-attention's kernels, where those are installed."""
    from rnn_longctx.config import parse_lengths
    from rnn_longctx.eval.bench.scan import scan_rows

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
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """Reading a prompt with a model of 370M parameters on a GPU, here and in mamba-ssm, where that is installed."""
    from rnn_longctx.config import parse_length, parse_lengths
    from rnn_longctx.eval.bench.model import prefill_rows

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
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """Training steps of a model of 370M parameters in bf16, here and in mamba-ssm, where that is installed."""
    from rnn_longctx.config import parse_lengths
    from rnn_longctx.eval.bench.train import train_rows
    from rnn_longctx.models.mixers.mamba2 import Mamba2Config

    shape = Mamba2Config(d_model=d_model, n_layer=layers, vocab_size=vocab, d_state=128, headdim=64)
    _record(train_rows(shape, _sizes("whole", whole), _sizes("streams", streams), parse_lengths(segments)), out)


@bench.command("decode")
def bench_decode(
    tokens: Annotated[int, typer.Option(min=1)] = 500,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """Tokens per second of a model of 370M parameters on a GPU, with and without a remedy."""
    from rnn_longctx.eval.bench.model import decode_rows

    _record(decode_rows(tokens, batch), out)


@bench.command("parallel")
def bench_parallel(
    length: Annotated[str, typer.Option(help="Tokens of the context that is read.")] = "4m",
    segment: Annotated[str, typer.Option(help="Tokens that a GPU reads at once.")] = "256k",
    train: Annotated[str, typer.Option(help="Tokens of the sequence that is trained on; 0: none.")] = "16k",
    each: Annotated[str, typer.Option(help="Batch x tokens of a GPU in data-parallel training; empty: none.")] = "2x8k",
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """One context over 1, 2, 4, ... GPUs, and a batch each, with a model of 370M parameters, under torchrun: torchrun
    --nproc-per-node 4 -m rnn_longctx.cli bench parallel"""
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.bench.parallel import joined, model_370m, parallel_rows

    tokens, at_once, trained = parse_length(length), parse_length(segment), 0 if train == "0" else parse_length(train)
    batches = _sizes("each", each)
    with joined() as rank:
        rows = parallel_rows(model_370m(), tokens, at_once, trained, batches[0] if batches else None)
        if rank == 0:
            _record(rows, out)
        else:
            for _ in rows:
                pass


def _record(rows: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Print each row as it is measured, and keep those there are in a CSV file."""
    from rnn_longctx.eval.bench.scan import environment

    words = [w for i, w in enumerate(sys.argv) if i > 0 and w != "--out" and sys.argv[i - 1] != "--out"]
    about = {**environment(), "command": shlex.join(["rnn-longctx", *words])}
    kept: list[dict[str, Any]] = []
    for row in rows:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        typer.echo("  ".join(f"{k} {v}" for k, v in shown.items()))
        kept.append(shown | about)
        if out:
            out = home_path(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, kept[0].keys())
                writer.writeheader()
                writer.writerows(kept)
