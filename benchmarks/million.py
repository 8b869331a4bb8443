"""What docs/results/million.md says, measured on a CPU; each part writes its tables into benchmarks/results.

python benchmarks/million.py trace            # of keys in demo-long: million_signals.csv, million_answers.csv
python benchmarks/million.py trace text       # one of these alone: its rows are written anew, the others stay
python benchmarks/million.py losses           # of text, with heads slowed: million_losses.csv
python benchmarks/million.py tiny --out runs/million-tiny     # small trainings, a row a length: million_tiny.csv
python benchmarks/million.py start --out runs/million-start   # demo-long, the heads that keep keys slowed
python benchmarks/million.py writes           # how much each head of demo-delta writes: million_writes.csv
python benchmarks/million.py untrained        # what the recipe's model finds before its first step: million.csv
python benchmarks/million.py table runs/e/*   # of evaluations' folders, ended or not: million.csv
python benchmarks/million.py draw             # docs/results/million.png and million_recall.png, from the tables
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import yaml

import rnn_longctx
from rnn_longctx.config import from_dict
from rnn_longctx.data import load_text, load_tokenizer, tokens
from rnn_longctx.eval.tables.sheets import context_gain
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.measure.taps import tapping
from rnn_longctx.models.checkpoint import save
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixer_reading import MixerReading
from rnn_longctx.probes.key_trace import KeyTrace, trace_key
from rnn_longctx.train import TrainConfig, train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
K = 1024
COLUMNS = ["model", "task", "text", "mitigation", "metric", "length", "control", "value", "low", "high", "stderr", "n"]
KEEPERS = (3, 6, 7, 9, 10, 12, 13)  # heads of demo-long's first layer with time constants above 10K tokens of filler


LAYER_16, LAYER_100 = "a-scale:scale=0.0625/1/1/1", "a-scale:scale=0.01/1/1/1"


@dataclass(frozen=True)
class Trace:
    """One way to follow keys through demo-long.

    Attributes:
        slowed: the log-decays of the KEEPERS are divided by it.
        mitigation: a remedy on the model.
    """

    gaps: Sequence[int]
    n: int
    haystack: str | None = None
    reading: str = "plain"
    slowed: float = 1.0
    mitigation: str = "none"
    each_head: bool = True

    def run(self) -> KeyTrace:
        model = rnn_longctx.load("demo-long")
        assert isinstance(model, LM)
        slow(model, self.slowed)
        hay = None if self.haystack is None else load_text(self.haystack)
        with rnn_longctx.mitigate(model, self.mitigation):
            return trace_key(
                model, self.gaps, self.n, haystack=hay, reading=self.reading, each_head=self.each_head, say=print
            )


def slow(model: LM, by: float) -> None:
    """Divide the rates of the KEEPERS by a number, in the weights."""
    first = model.mixers[0]
    first.scale_rates(torch.tensor([1 / by if head in KEEPERS else 1.0 for head in range(first.heads)]).double())


TRACES = {
    "filler": Trace([K, 4 * K, 16 * K, 64 * K, 128 * K, 256 * K], 10),
    "text": Trace([K, 2 * K, 4 * K, 8 * K, 16 * K], 8, "stdlib"),
    "held": Trace([4 * K, 16 * K], 4, reading="held", each_head=False),
    "slowed 16": Trace([K, 16 * K, 64 * K, 128 * K], 4, slowed=16, each_head=False),
    "slowed 64": Trace([64 * K, 256 * K, K * K], 3, slowed=64, each_head=False),
    "slowed 16 in text": Trace([4 * K, 16 * K], 4, "stdlib", slowed=16, each_head=False),
    "slowed 64 in text": Trace([4 * K, 16 * K], 4, "stdlib", slowed=64, each_head=False),
    "layer slowed 16 in text": Trace([4 * K], 4, "stdlib", mitigation=LAYER_16, each_head=False),
    "layer slowed 100 in text": Trace([4 * K], 4, "stdlib", mitigation=LAYER_100, each_head=False),
}


def trace(names: Sequence[str]) -> None:
    for name in names or TRACES:
        result = TRACES[name].run()
        print(result.by_gap("right").to_string(), result.verdict, sep="\n")
        for table, rows in (("signals", result.signals), ("answers", result.answers)):
            replace_rows(RESULTS / f"million_{table}.csv", "trace", name, rows.assign(**result.about))


def replace_rows(path: Path, column: str, name: str, rows: pd.DataFrame) -> None:
    """Write rows under a name into a table, in the place of those that it has under that name."""
    rows = rows.copy()
    rows.insert(0, column, name)
    if path.exists():
        before = pd.read_csv(path)
        rows = pd.concat([before[before[column] != name], rows])
    rows.to_csv(path, index=False, float_format="%.6g")


def losses() -> None:
    """Write the loss on the standard library, over the second half of 8K tokens, of demo-long slowed."""
    text, rows = load_text("stdlib"), []
    for by, mitigation in ((1, "none"), (16, "none"), (64, "none"), (1, LAYER_16), (1, LAYER_100)):
        model = rnn_longctx.load("demo-long")
        assert isinstance(model, LM)
        slow(model, by)
        ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, 8 * K + 1)[0]) for i in range(3)])
        with rnn_longctx.mitigate(model, mitigation):
            loss = float(tail_loss(model, ids).mean())
        rows.append({"keepers_slowed": by, "mitigation": mitigation, "text_hash": text.hash, "length": 8 * K, "n": 3})
        rows[-1]["loss"] = loss
        print(rows[-1])
    pd.DataFrame(rows).to_csv(RESULTS / "million_losses.csv", index=False, float_format="%.6g")


def start(out: Path, by: float) -> None:
    """Write demo-long with the rates of the KEEPERS divided by a number."""
    model = rnn_longctx.load("demo-long")
    assert isinstance(model, LM)
    slow(model, by)
    model.provenance = {"init": {"name": "demo-long", "heads": list(KEEPERS), "rates divided by": by}}
    save(model, out)
    print(out)


SLOW_DELTA = "gated-deltanet:heads=2,head_dim=32,expand_v=1,A_min=1e-6,A_max=1,A_log_uniform=true"
SLOW_KDA = "kda:heads=2,head_dim=32,A_min=1e-6,A_max=1,A_log_uniform=true"
SLOW_MAMBA = "mamba2:headdim=16,d_state=32,A_low=1e-6,A_high=1,A_draw=log-uniform"
PASSING = {"segment": 128, "bptt": "all", "start": "previous", "carry": 0.9}
TINY: dict[str, tuple[str | list[str], dict[str, Any]]] = {
    "gated-deltanet": ("gated-deltanet:heads=2,head_dim=32,expand_v=1", {}),
    "gated-deltanet-slow": (SLOW_DELTA, {}),
    "gated-deltanet-slow, uniform gaps": (SLOW_DELTA, {"draw": "uniform"}),
    "gated-deltanet-slow, state passing": (SLOW_DELTA, {"passing": PASSING}),
    "kda-slow": (SLOW_KDA, {}),
    "kda-slow, uniform gaps": (SLOW_KDA, {"draw": "uniform"}),
    "kda-fast-slow": (["kda:heads=2,head_dim=32", SLOW_KDA], {}),
    "kda-wide": (SLOW_KDA.replace("head_dim=32", "head_dim=64"), {}),
    "mamba2": ("mamba2:headdim=16,d_state=32", {}),
    "mamba2-slow": (SLOW_MAMBA, {}),
    "mamba2-slow, state passing": (SLOW_MAMBA, {"passing": PASSING}),
    "hybrid-slow": ([SLOW_DELTA, SLOW_MAMBA], {}),
}


def tiny(names: Sequence[str], out: Path, seed: int) -> None:
    """Train models of two layers on induction, over gaps of up to 64 tokens, then of up to 512; ask at up to 32K."""
    for name in names or TINY:
        mixer, more = TINY[name]
        folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        shape = {"mixer": mixer, "d_model": 64, "n_layer": 2, "vocab_size": 256, "mlp": 0}
        of_mixer = out / f"{name.partition(',')[0]}-{seed}"
        short = train(config(64, 64, 150, 5e-3, seed, of_mixer / "short", {"model": shape}))
        draw = more.get("draw", "log-uniform")
        extra = {k: v for k, v in more.items() if k != "draw"} | {"init": str(short)}
        long = train(config(512, 8, 80, 3e-3, seed, folder / "long", extra, draw))
        table = rnn_longctx.evaluate(
            rnn_longctx.load(long), ["64", "512", "2k", "8k", "32k"], ["induction:n=30,tokens=1m"], out=folder / "eval"
        )
        rows = table[(table["mitigation"] == "none") & table["depth"].isna()]
        columns = ["task", "length", "value", "n"]
        name_of_rows = f"{name}, seed {seed}"
        replace_rows(RESULTS / "million_tiny.csv", "model", name_of_rows, rows[columns].assign(seed=seed))


def config(
    length: int, rows: int, steps: int, lr: float, seed: int, out: Path, more: dict[str, Any], draw: str = "log-uniform"
) -> TrainConfig:
    mixed = {"task": "induction", "fraction": 1.0, "lengths": [8, length], "fill": True, "draw": draw}
    settings = {
        "data": {"text": ["builtin"], "held_out": 0.05, "mix": [mixed], "answer_weight": 100.0},
        "train_length": length,
        "batch_size": rows,
        "steps": steps,
        "optimizer": {"lr": lr},
        "schedule": {"name": "cosine", "warmup": 20},
        "device": "cpu",
        "amp": False,
        "seed": seed,
        "save_dtype": "float32",
        "log_every": 25,
        "checkpoint_every": 1000,
        "out": str(out),
    }
    return from_dict(TrainConfig, settings | more)


def table(folders: Sequence[str]) -> None:
    """Write what evaluations measured over all depths, and their gains over `recompute`: million.csv, and of a million
    tokens by depth: million_depths.csv; the rows of other models stay."""
    tables, depths = [], []
    for folder in map(Path, folders):
        frame = measured(folder)
        losses = frame[frame["metric"] == "nats_per_token"]
        kept = frame[frame["depth"].isna() & frame["metric"].isin(["accuracy", "nats_per_byte"])]
        far = frame[frame["depth"].notna() & (frame["metric"] == "accuracy") & (frame["length"] == K * K)]
        gains = context_gain(losses).rename(columns={"gain": "value"}).assign(metric="gain")
        run = json.loads((folder / "runs.jsonl").read_text().splitlines()[-1])
        depths.append(far.reindex(columns=["model", "task", "depth", "value", "n"]).assign(command=run["command"]))
        both = pd.concat([kept, gains]).reindex(columns=COLUMNS)
        tables.append(both.assign(device=run["device"], versions=run["versions"], command=run["command"]))
    for some, name, order in (
        (tables, "million.csv", COLUMNS[:6]),
        (depths, "million_depths.csv", ["model", "task", "depth"]),
    ):
        rows, path = pd.concat(some), RESULTS / name
        if path.exists():
            before = pd.read_csv(path)
            rows = pd.concat([before[~before["model"].isin(rows["model"])], rows])
        if "metric" in rows:  # a loss at the training length stands in all evaluations: that of most text
            rows = rows.sort_values("n").drop_duplicates([*order, *rows.columns.intersection(["control"])], keep="last")
        rows.sort_values(order).to_csv(path, index=False)


def measured(folder: Path) -> pd.DataFrame:
    """Return the rows of an evaluation, of one that was cut off those of its cells."""
    if (whole := folder / "results.parquet").exists():
        return pd.read_parquet(whole)
    return pd.DataFrame(json.loads(file.read_text())["row"] for file in sorted(folder.glob("cells/*.json")))


def writes(names: Sequence[str]) -> None:
    """Measure how much each head writes: over 8K tokens of Python source, and at which two bytes, if at few, its 20
    largest writes there are; in a key's sentence after them, and at its digits; and at the digits, 666, of 8K tokens
    more: million_writes.csv."""
    hay, key = load_text("stdlib"), "The pass key is 93271. Remember it. 93271 is the pass key."
    for name in names or ["demo-delta"]:
        model = rnn_longctx.load(name)
        assert isinstance(model, LM)
        text, numbers = (torch.from_numpy(tokens(hay, model.tokenizer, i, 8 * K)[0]).long() for i in (0, 3))
        sentence = torch.tensor(model.tokenizer.encode(key))
        read = torch.cat([text, sentence, numbers])
        first, after = len(text), len(text) + len(sentence)
        betas: list[torch.Tensor] = []

        def tap(reading: MixerReading, betas: list[torch.Tensor] = betas) -> None:
            betas.append(reading.gates.worked_out(torch.float32).input_scale[0])

        with torch.inference_mode(), tapping(model.mixers, [tap] * len(model.mixers)):
            model(read[None])
        rows = [
            {"weights_hash": model.weights_hash, "layer": layer, "head": head}
            | {
                "mean": float(beta[:first].mean()),
                "median": float(beta[:first].median()),
                "above_half": float((beta[:first] > 0.5).mean(dtype=torch.float)),
                "at_key": float(beta[first:after].max()),
                "at_its_digits": float(beta[first:after][digits(sentence)].mean()),
                "at_other_digits": float(beta[after:][digits(numbers)].mean()),
                "at_other_digits_most": float(beta[after:][digits(numbers)].max()),
                "opens_at": opens_at(text, beta[:first]),
            }
            for layer, of_layer in enumerate(betas)
            for head, beta in enumerate(of_layer.T)
        ]
        command = f"python benchmarks/million.py writes {name}"
        replace_rows(RESULTS / "million_writes.csv", "model", model.name, pd.DataFrame(rows).assign(command=command))


def untrained() -> None:
    """Evaluate the model of the recipe as it is before the first step, as the others of million.csv are."""
    config = from_dict(TrainConfig, yaml.safe_load((ROOT / "configs" / "train" / "million.yaml").read_text()))
    torch.manual_seed(config.seed)
    assert config.model is not None
    model, out = LM(config.model).eval(), Path("runs/million-untrained")
    model.name, model.tokenizer, model.train_length = "untrained", load_tokenizer("bytes"), config.longest
    tasks = [
        "passkey:n=60,tokens=1m",
        "passkey:haystack=stdlib,n=60,tokens=1m",
        "multikey:n=60,tokens=1m",
        "lm:slices=16",
    ]
    rnn_longctx.evaluate(model, ["512", "4k"], tasks, out=out)
    table([str(out)])


def digits(text: torch.Tensor) -> torch.Tensor:
    """Return which bytes are digits."""
    return (text >= ord("0")) & (text <= ord("9"))


def opens_at(text: torch.Tensor, beta: torch.Tensor) -> str:
    """Return the pairs of bytes at whose second one the 20 largest writes are, with how many, the three most often."""
    pairs = Counter(
        bytes(text[max(0, i - 1) : i + 1].tolist()).decode("latin-1") for i in beta.topk(20).indices.tolist()
    )
    return ", ".join(f"{pair!r} {count}" for pair, count in pairs.most_common(3))


def draw() -> None:
    """Draw what is left of a key, and what brings answers back, over the gap."""
    signals, answers = (pd.read_csv(RESULTS / f"million_{name}.csv") for name in ("signals", "answers"))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for ax, name, title in ((axes[0], "filler", "the paper's sentences"), (axes[1], "text", "Python source")):
        own = answers[(answers["trace"] == name) & (answers["layer"] < 0) & (answers["gap"] > 0)]
        for state, label in (
            ("read", "as it is"),
            ("undecayed", "the key's share undecayed"),
            ("unwritten", "without later writes"),
            ("amplified", "what is left of the key amplified"),
        ):
            rows = own[own["state"] == state].sort_values("gap")
            ax.plot(rows["gap"], rows["right"], marker="o", ms=4, label=label)
        ax.set_title(f"keys found, over {title}", fontsize=10)
        ax.set_ylim(-0.03, 1.03)
    axes[1].legend(fontsize=8)
    for name, color in (("filler", "C0"), ("text", "C1")):
        own = signals[(signals["trace"] == name) & (signals["layer"] == 0) & (signals["gap"] > 0)]
        for i, (_, head) in enumerate(own.groupby("head")):
            label = {"filler": "the paper's sentences", "text": "Python source"}[name] if i == 0 else None
            axes[2].plot(head["gap"], head["decay"].where(head["decay"] > 1e-6), color=color, lw=0.9, label=label)
    axes[2].set_yscale("log")
    axes[2].set_title("what decay leaves in the heads of the first layer", fontsize=10)
    axes[2].legend(fontsize=8)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xlabel("tokens between key and question")
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results" / "million.png", dpi=90)


SHOWN = {
    "n1/best": "demo-delta",
    "n0/best": "its recipe, other seeds",
    "n2/best": None,
    "slow-wide/best": "all layers slow",
    "b3/best": "all slow, a quarter of the state",
    "demo-long": "demo-long",
    "demo": "demo, token-filter+state-norm",
    "window/best": "softmax attention, window of 512",
}


def draw_recall() -> None:
    """Draw the keys found over length, in filler and in text, of what was trained for it and what stands beside it."""
    found = pd.read_csv(RESULTS / "million.csv")
    found = found[
        (found["metric"] == "accuracy")
        & (found["mitigation"].str.startswith("token-filter") | (found["mitigation"] == "none"))
    ]
    found = found[(found["model"] != "demo") | (found["mitigation"] != "none")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for ax, task, title in (
        (axes[0], "passkey", "the paper's sentences"),
        (axes[1], "passkey-in-stdlib", "Python source"),
    ):
        for i, (model, label) in enumerate(SHOWN.items()):
            rows = found[(found["model"] == model) & (found["task"] == task)].sort_values("length")
            color = "C0" if model == "n1/best" else "C9" if model.startswith("n") else f"C{i - 2}"
            width = 2 if color == "C0" else 1
            ax.plot(rows["length"], rows["value"], marker="o", ms=4, color=color, label=label, lw=width)
        ax.axvline(262144, color="grey", lw=0.8, ls=":")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("tokens (dotted: the longest trained on)")
        ax.set_title(f"keys found, over {title}", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results" / "million_recall.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["trace", "losses", "tiny", "start", "writes", "untrained", "table", "draw"])
    parser.add_argument("names", nargs="*", help="of traces or of models; none: all; folders of `table`")
    parser.add_argument("--out", type=Path, default=Path("runs/million-tiny"), help="folder of the trainings, or model")
    parser.add_argument("--by", type=float, default=64.0, help="how much the heads are slowed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "trace":
        trace(options.names)
    elif options.part == "tiny":
        tiny(options.names, options.out, options.seed)
    elif options.part == "losses":
        losses()
    elif options.part == "start":
        start(options.out, options.by)
    elif options.part == "writes":
        writes(options.names)
    elif options.part == "untrained":
        untrained()
    elif options.part == "table":
        table(options.names)
    else:
        draw()
        draw_recall()


if __name__ == "__main__":
    main()
