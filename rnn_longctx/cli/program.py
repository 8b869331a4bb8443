"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rnn_longctx.cli.bench import bench
from rnn_longctx.cli.capacity import capacity
from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError

TEXTS = "stdlib, a file, a directory, jsonl:PATH[:field], parquet:PATH[:column], hf:dataset[:split[:column]]."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find where a recurrent language model stops working as its context grows, and what fixes it.",
)
app.add_typer(bench, name="bench")
app.add_typer(capacity, name="capacity")

Many = list[str] | None
MODEL = typer.Argument(help='"demo", "demo-long", a directory, or a Hugging Face hub id.')


def _option(help: str, default: str, **more: Any) -> Any:
    """Of an option that is None where it is not given: what stands for it then is shown as its default."""
    return typer.Option(help=help, show_default=default, **more)


TrainLength = Annotated[
    str | None, _option("Tokens, such as 2k, where the checkpoint does not say.", "the checkpoint's")
]
Tokenizer = Annotated[str | None, _option('"bytes", a directory, or a hub id.', "the checkpoint's")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64.")]
StateDtype = Annotated[
    str | None,
    _option("Round the recurrent state to it between calls: bfloat16, float16, float64.", "float32"),
]


@app.command("eval")
def evaluate_command(
    model: Annotated[str | None, MODEL] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options given here win.")] = None,
    lengths: Annotated[str | None, _option("Tokens: 256,1k,64k,1m (k = 1024, m = 1024^2).", "256,1k,4k,16k")] = None,
    task: Annotated[
        Many, _option("lm, multikey, words, passkey, or passkey:n=100,max=8k; again for more.", "lm and passkey")
    ] = None,
    mitigation: Annotated[
        Many,
        _option("all, none, state-norm, rri:alpha=0.999,beta=0.75, FILE.yaml, a+b; again for more.", "none"),
    ] = None,
    text: Annotated[Many, _option(f"{TEXTS[:-1]}; again for more.", "stdlib")] = None,
    calibration_text: Annotated[
        str | None,
        _option("For remedies that are calibrated; never what is evaluated.", "the checkpoint's, or builtin"),
    ] = None,
    train_length: TrainLength = None,
    tokenizer: Tokenizer = None,
    out: Annotated[str | None, _option("Folder for results and plots.", "runs/eval")] = None,
    batch: Annotated[int | None, _option("The most streams read side by side.", "32")] = None,
    seed: Annotated[int | None, _option("Of the prompts.", "0")] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, cuda:1.", "auto")] = None,
    dtype: Annotated[str | None, _option("float32, bfloat16, float16, float64.", "float32")] = None,
    state_dtype: StateDtype = None,
    backend: Annotated[str | None, _option("Force a scan backend.", "chosen")] = None,
) -> None:
    """Loss and recall of a model at increasing lengths, without and with remedies: a table, results and plots."""
    from rich.console import Console

    from rnn_longctx.config import from_dict, load_yaml, parse_length, parse_lengths, to_dict
    from rnn_longctx.eval import EvalConfig, Results, evaluate, parse_task
    from rnn_longctx.eval.show.plots import plot_all
    from rnn_longctx.eval.show.terminal import asked, header, table
    from rnn_longctx.eval.tables.leaderboard import leaderboard
    from rnn_longctx.mitigations import parse_remedy
    from rnn_longctx.models.segments import shortened

    given = {
        "model": model, "lengths": lengths and parse_lengths(lengths), "tasks": task or None,
        "mitigations": mitigation or None, "text": text or None, "calibration_text": calibration_text,
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
    lm = _load(c.model, c.device, c.dtype, c.tokenizer, c.train_length, c.state_dtype)
    lm.use_backend(c.backend)
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
            shortened(lm),
        )
    )
    measured = evaluate(lm, c.lengths, c.tasks, c.mitigations, text=c.text, calibration_text=c.calibration_text,
                        out=c.out, batch=c.batch, seed=c.seed, progress=True)  # fmt: skip
    frame = Results.read(home_path(c.out))  # of all models
    frame.attrs = measured.attrs
    shown, more = asked(frame)
    for part in table(shown, width=console.width):
        console.print(part)
    if more:
        console.print(f"{c.out}: {more}", highlight=False)
    written = ["results.parquet", "results.csv"]
    if len(frame["mitigation"].unique()) > 1:
        leaderboard(frame).to_csv(home_path(c.out) / "leaderboard.csv", index=False)
        written.append("leaderboard.csv")
    written += [p.name for p in plot_all(frame, c.out)]
    console.print(f"{c.out}: {', '.join(written)}")


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/train/demo.yaml.")],
    set: Annotated[Many, typer.Option("--set", help="optimizer.lr=1e-3; model=a checkpoint; data=texts; ...")] = None,
    more: Annotated[Many, typer.Argument(metavar="KEY=VALUE", help="More of --set.")] = None,
    stream: Annotated[
        Path | None,
        typer.Option(help="A directory where text arrives: an update on it is kept while held-out loss and passkeys "
                          "hold. Until a file STOP is there."),
    ] = None,
) -> None:  # fmt: skip
    """Train a model, or go on where a killed run stopped.

    Over several GPUs: accelerate launch -m rnn_longctx.train CONFIG (or torchrun --nproc-per-node 8 -m ...)."""
    from rnn_longctx.config import load_yaml
    from rnn_longctx.train import TrainConfig, TrainingDiverged, spelled_out, train, train_online

    try:
        loaded = load_yaml(TrainConfig, config, spelled_out([*(set or []), *(more or [])]))
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
    train_length: TrainLength = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    state_dtype: StateDtype = None,
) -> None:
    """Find a remedy's settings: the least loss at the target length that keeps the model's recall."""
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.eval.search.calibrate import calibrate

    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder is not writable'}")
    lm, goal = _load(model, device, dtype, tokenizer, train_length, state_dtype), parse_length(target)
    found = calibrate(lm, mitigation, goal, load_text(text), seed=seed, slices=slices, say=typer.echo)
    found.save(out)
    typer.echo(f"{out}: {found.remedy}{'' if found.helps else ' (helps: false)'}")


@app.command("probe")
def probe_command(
    model: Annotated[
        list[str], typer.Argument(help='"demo", "demo-long", a directory, or a hub id; several to compare.')
    ],
    length: Annotated[str, typer.Option(help="Tokens to be read, such as 64k.")] = "32k",
    prompt: Annotated[str, typer.Option(help="text, newline or passkey.")] = "text",
    every: Annotated[str, typer.Option(help="Tokens between two looks at the states.")] = "256",
    text: Annotated[str, typer.Option(help=TEXTS)] = "stdlib",
    slices: Annotated[int, typer.Option(min=1, help="Rows read side by side.")] = 1,
    prove: Annotated[bool, typer.Option(help="Cap the accused heads alone, then others; measure the loss.")] = False,
    remember: Annotated[bool, typer.Option(help="Effective remembrance too: reads three times as much.")] = False,
    log: Annotated[Many, _option("tensorboard or wandb, where installed; again for both.", "neither")] = None,
    mitigation: Annotated[str, typer.Option(help="Watch the model with a remedy on it.")] = "none",
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("runs/probe"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_length: TrainLength = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    state_dtype: StateDtype = None,
) -> None:
    """Which heads of a model leave the range of their training, when, and whether that is what costs the loss."""
    import pandas as pd

    from rnn_longctx import mitigate
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.loggers import scalars
    from rnn_longctx.mitigations import parse_remedy
    from rnn_longctx.probes.pictures import draw
    from rnn_longctx.probes.probe import probe, scalar_rows

    goal, remedy, source = parse_length(length), parse_remedy(mitigation), load_text(text)
    rows = []
    for i, name in enumerate(model):
        lm = _load(name, device, dtype, tokenizer, train_length, state_dtype)
        where = out if len(model) == 1 else out / f"{i}-{lm.name}"
        with mitigate(lm, remedy, target_length=goal):
            found = probe(lm, source, goal, prompt=prompt, every=parse_length(every, "--every"), slices=slices,
                          seed=seed, prove=prove, remember=remember, say=typer.echo)  # fmt: skip
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
    prompt: Annotated[
        list[str],
        typer.Option(help="Text to continue, - for that of standard input; again for more, answered in turn."),
    ],
    mitigation: Annotated[str, typer.Option()] = "none",
    monitor: Annotated[
        str | None,
        _option("Watch for collapse: warn, raise, mitigate:NAME, rollback:NAME, fallback:truncate.", "no watch"),
    ] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on from what --save-state kept.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Keep what was read and said, to go on from it.")] = None,
    max_new_tokens: Annotated[int | None, _option("At most.", "128, with --save-state 0", min=0)] = None,
    stop: Annotated[Many, _option("End with this text; again for more.", "the end-of-sequence id alone")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    train_length: TrainLength = None,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    state_dtype: StateDtype = None,
) -> None:
    """Continue a prompt of any length, with a remedy on the model; the text is printed as it is made."""
    from contextlib import nullcontext

    from rnn_longctx import CollapseError, CollapseMonitor, generate_stream, mitigate
    from rnn_longctx.data.content import as_text, not_utf8
    from rnn_longctx.mitigations import active, parse_remedy
    from rnn_longctx.models import saved_state

    remedy, target = parse_remedy(mitigation), saved_state.target_of(load_state) if load_state else None
    lm = _load(model, device, dtype, tokenizer, train_length, state_dtype)
    prompts = []
    for text in prompt:
        stdin = text == "-"
        raw = as_text(sys.stdin.buffer.read(), "standard input") if stdin else text.encode("utf-8", "surrogateescape")
        if (bad := not_utf8(raw)) is not None:
            raise InputError(f"--prompt is not UTF-8 text at byte {bad}")
        prompts.append(lm.tokenizer.encode(raw))
    if not all(map(len, prompts)):
        raise InputError("the prompt is empty")
    if len(prompts) > 1 and (save_state or monitor):
        raise InputError("--save-state and --monitor are of one stream: give them one --prompt")
    new = max_new_tokens if max_new_tokens is not None else 0 if save_state else 128
    target, said = target or max(map(len, prompts)) + new, ""
    with mitigate(lm, remedy, target_length=target):
        cache: Any = saved_state.load_state(load_state, lm) if load_state else lm.new_cache() if save_state else None
        watching = CollapseMonitor.calibrated(lm).on(lm, monitor) if monitor else nullcontext()
        how: Any = {"temperature": temperature, "seed": seed, "stop": stop or ()}
        try:
            with watching as watch:
                for i, ids in enumerate(prompts):
                    if i:
                        typer.echo()
                    read = cache if i == len(prompts) - 1 or cache is None else cache.clone()
                    for said in generate_stream(lm, ids, new, cache=read, **how):
                        typer.echo(said, nl=False)
                if save_state:  # under what is on by now
                    saved_state.save_state(save_state, cache, lm, active(lm)[0], target)
        except CollapseError as error:
            typer.echo(f"rnn-longctx: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            if said:
                typer.echo()
    if save_state:
        typer.echo(f"wrote {save_state}, {save_state.stat().st_size / 2**20:.3g} MiB", err=True)
    if watch is not None:
        typer.echo(f"monitor: {watch.summary()}", err=True)


@app.command("lm-eval")
def lm_eval_command(
    model: Annotated[str, typer.Option(help=MODEL.help)],  # as lm-eval's own
    tasks: Annotated[str, typer.Option(help="rnn_longctx_passkey,niah_single_1,lambada_openai: names of lm-eval's.")],
    lengths: Annotated[str, typer.Option(help="Tokens, for tasks that make data of a length: 4k,16k,64k.")] = "4k",
    mitigation: Annotated[Many, _option("none, state-norm, a+b; again for more.", "none")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The most documents of a task and length.", show_default="all")
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="A folder with more task files.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL file for rnn_longctx_qa or _summary.")] = None,
    out: Annotated[str, typer.Option(help="Folder for lm_eval.json and lm_eval.csv.")] = "runs/lm-eval",
    batch: Annotated[int, typer.Option(min=1, help="The most rows of equal length side by side.")] = 8,
    max_length: Annotated[str | None, _option("Refuse longer requests.", "no limit")] = None,
    add_bos_token: Annotated[
        bool | None,
        typer.Option(
            "--add-bos-token/--no-add-bos-token",
            help="Whether prompts begin with BOS.",
            show_default="as the tokenizer does",
        ),
    ] = None,
    train_length: TrainLength = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Of prompts that are made of a length, and of sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    state_dtype: StateDtype = None,
) -> None:
    """Tasks of EleutherAI's lm-eval at chosen lengths, without and with remedies: a table, JSON and CSV."""
    import logging

    from rnn_longctx.config import parse_length, parse_lengths
    from rnn_longctx.mitigations import parse_remedy

    names, remedies = [t.strip() for t in tasks.split(",") if t.strip()], mitigation or ["none"]
    parse_lengths(lengths)
    for words in remedies:  # a misspelt name shows before anything is loaded
        parse_remedy(words)
    from rnn_longctx.eval.harness.run import lm_eval_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    frame = lm_eval_table(
        _load(model, device, dtype, tokenizer, train_length, state_dtype), names, lengths, remedies, limit=limit,
        include_path=include_path, data=data, out=out, batch=batch, seed=seed, add_bos_token=add_bos_token,
        max_length=None if max_length is None else parse_length(max_length), progress=sys.stderr.isatty(),
    )  # fmt: skip
    hidden = ["model", "weights_hash", "dtype", "tokens_read_min", "tokens_read_max", "seed"]
    shown = frame.drop(columns=hidden + (["state_dtype"] if state_dtype is None else []))
    typer.echo(shown.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
    typer.echo(f"{out}: lm_eval.json, lm_eval.csv (seed {seed})")


@app.command("plot")
def plot_command(
    directory: Annotated[Path, typer.Argument(help="A folder with results.parquet or results.csv.")],
) -> None:
    """Draw the plots again, from the table alone."""
    from rnn_longctx.eval import Results
    from rnn_longctx.eval.show.plots import plot_all

    for path in plot_all(Results.read(directory), directory):
        typer.echo(str(path))


def _load(model: str, device: str, dtype: str, tokenizer: str | None, train_length: Any, states: str | None) -> Any:
    import torch

    from rnn_longctx.models.adopt.adopting import load_any

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = load_any(model, device=device, dtype=dtype, tokenizer=tokenizer, train_length=train_length)
    lm.use_state_dtype(states)
    return lm


def _tune_cpu() -> None:
    """Before torch is loaded: threads that wait asleep (spinning ones stall each other if anything else runs), and
    an allocator that keeps a call's activations instead of handing them back and faulting them in anew."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD


def main() -> None:
    """Entry point. Errors of input and a full GPU are one line; a reader that went away (`| head`) is no error."""
    _tune_cpu()
    try:
        app(standalone_mode=True)
    except (InputError, RuntimeError) as error:
        if not isinstance(error, InputError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print(f"rnn-longctx: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
