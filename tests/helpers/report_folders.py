"""Folders of every kind that a report is made of: small tables, made up or from the benchmarks, with any names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from rnn_longctx.eval.results import COLUMNS
from rnn_longctx.eval.tables import compare, growth

ROOT = Path(__file__).parents[2]
LENGTHS = [256, 1024, 4096, 16384]
LOSSES = {
    "none": [0.8, 0.9, 1.9, 4.2],
    "state-norm": [0.8, 0.75, 0.74, 0.73],
    "recompute:last=256": [0.8, 0.78, 0.77, 0.77],
}
RIGHT = {"none": [1.0, 0.9, 0.1, 0.0], "state-norm": [1.0, 1.0, 0.7, 0.2], "recompute:last=256": [1.0, 0.5, 0.2, 0.0]}
HEADS = (3, 4)  # layers, heads of each


def eval_folder(folder: Path, model: str = "small", remedy: str = "state-norm", text: str = "stdlib") -> Path:
    """A table of losses over 6 slices and of answers at 10 depths, where the bare model collapses at 4K tokens."""
    rng, rows = np.random.default_rng(), []
    hard = rng.normal(0, 0.05, 6)
    about = {"model": model, "weights_hash": "0123abcd", "tokenizer": "bytes", "batch": 4, "dtype": "float32"}
    about |= {"backend": "torch", "device": "cpu", "train_length": 256, "version": "0.1.0", "peak_bytes": 2**30}
    about |= {"seconds": 1.5, "tokens_per_second": 9000.0, "first_token_seconds": 0.2, "next_token_seconds": 0.01}
    for mitigation, losses in LOSSES.items():
        name = remedy if mitigation == "state-norm" else mitigation
        for i, length in enumerate(LENGTHS):
            row = dict.fromkeys(COLUMNS) | about | {"mitigation": name, "length": length, "seed": 0}
            samples = list(losses[i] + hard + rng.normal(0, 0.001, 6))
            rows.append(row | _measured("lm", "nats_per_token", samples) | {"text": text, "text_hash": "ab"})
            hits = [float(k < 10 * RIGHT[mitigation][i]) for k in range(10)] * 2
            rows.append(row | _measured("passkey", "accuracy", hits))
            depths = [(k + 0.5) / 10 for k in range(10)]
            rows += [row | _measured("passkey", "accuracy", hits[k::10]) | {"depth": d} for k, d in enumerate(depths)]
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(folder / "results.parquet", index=False)
    return folder


def _measured(task: str, metric: str, samples: list[float]) -> dict[str, object]:
    stderr = float(np.std(samples, ddof=1)) / len(samples) ** 0.5
    value = float(np.mean(samples))
    return {"task": task, "metric": metric, "value": value, "stderr": stderr, "n": len(samples), "samples": samples}


def probe_folder(folder: Path, model: str = "small", verdict: str = "layer 1 head 2 leaves its range at 512") -> Path:
    """Looks at 12 heads, of which layer 1 head 2 grows to 32 times its range."""
    layers, heads = HEADS
    positions = [64 * k for k in range(1, 65)]
    rows, about = [], []
    for layer in range(layers):
        for head in range(heads):
            grows = (layer, head) == (1, 2)
            rows += [
                {"layer": layer, "head": head, "position": p, "norm": p / 128 if grows else 0.5, "retention": 0.5}
                for p in positions
            ]
            about.append({"layer": layer, "head": head, "onset": 448.0 if grows else np.nan})
            about[-1] |= {"ratio": 32.0 if grows else 0.5, "worst": 32.0 if grows else 0.5, "retained": 0.5}
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "trace.parquet", index=False)
    pd.DataFrame(about).sort_values("ratio", ascending=False).to_csv(folder / "heads.csv", index=False)
    losses = [1.0 if p < 1024 else 2.5 for p in positions]
    pd.DataFrame({"position": positions, "loss": losses}).to_csv(folder / "losses.csv", index=False)
    kept = pd.DataFrame({"kept": [64, 256, 1024], "cut": [1, 1, 1], "tv": [0.4, 0.2, 0.05]})
    kept.to_csv(folder / "remembrance.csv", index=False)
    settings = {"model": model, "train_length": 256, "length": 4096, "every": 64, "text": "stdlib", "verdict": verdict}
    ablation = {"without": 2.5, "recompute": 1.0, "fewest": [[1, 2]]}
    settings |= {"envelope": [[1.0] * heads] * layers, "ablation": ablation}
    (folder / "probe.json").write_text(json.dumps(settings))
    return folder


def capacity_folder(folder: Path) -> Path:
    """The study of the benchmarks."""
    return Path(shutil.copytree(ROOT / "benchmarks" / "results" / "capacity", folder))


def compare_folder(folder: Path, entry: str = "mamba2") -> Path:
    """Two entries, one of which collapses, with answers, states, remedies, costs and a grid of planted links."""
    rows = []
    for name, last in ((entry, 3.0), ("gla", 1.0)):
        key = {"entry": name, "mixer": name, "parameters": 1000, "state": 64, "learning_rate": 1e-3}
        key |= {"train_length": 256, "note": "", "text": "stdlib", "task": "lm", "mitigation": "none"}
        for seed in (0, 1):
            of = key | {"seed": seed}
            rows.append(of | {"metric": "loss_peak", "length": 256, "value": 1.1, "samples": [1.1] * 4})
            for length in LENGTHS:
                loss = last if length > 1024 else 1.0
                for mitigation, value in (("none", loss), ("recompute:last=256", 1.0), ("state-norm", 1.02)):
                    row = {"metric": "loss", "mitigation": mitigation, "length": length, "value": value}
                    rows.append(of | row | {"samples": [value - 0.1, value, value, value + 0.1]})
                answers = {"metric": "accuracy", "task": "passkey", "text": "", "length": length, "value": 0.5}
                rows.append(of | answers | {"samples": [1.0, 0.0] * 5})
            whole = {"task": "", "text": "", "samples": None}
            once = {"heads": 8.0, "heads_left": 2.0, "train_seconds": 9.0, "train_tokens": 1e6}
            rows += [of | whole | {"metric": m, "length": None, "value": v} for m, v in once.items()]
            rows += [of | whole | {"metric": "state_growth", "length": n, "value": n / 256} for n in LENGTHS]
            rows += [of | whole | {"metric": "tokens_per_second", "length": n, "value": 1e4} for n in LENGTHS]
            for task, noise in (("planted-noise0", 0.0), ("planted", 0.5)):
                planted = of | {"text": "", "samples": None, "task": task, "length": 256}
                rows += [planted | {"metric": "recovery", "depth": d, "value": 1 - noise} for d in (0.25, 0.75)]
                rows.append(planted | {"metric": "chance", "value": 0.1, "seed": None})
    folder.mkdir(parents=True)
    compare.write(compare.summarised(rows, 256), folder)
    return folder


def growth_folder(folder: Path) -> Path:
    """What the benchmarks measured on a CPU."""
    frame = pd.read_csv(ROOT / "benchmarks" / "results" / "growth_cpu.csv", keep_default_na=True)
    folder.mkdir(parents=True)
    growth.write(frame.assign(note=frame["note"].fillna("")), folder)
    return folder


def train_folder(folder: Path, decision: str = "kept") -> Path:
    """The log of the demo model's training, with evaluations at two lengths and three updates."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "rnn_longctx" / "checkpoints" / "demo" / "training_log.csv", folder / "log.csv")
    steps = [(step, length) for step in (0, 500, 1000) for length in (512, 2048)]
    rows = [
        {"step": s, "tokens": 100 * s, "length": n, "loss": 5 - s / 300, "passkey_accuracy": s / 1000} for s, n in steps
    ]
    pd.DataFrame(rows).to_csv(folder / "eval.csv", index=False)
    made = {"decision": [decision] * 3, "train_loss": [1.0, 0.9, 0.8], "new_before": [1.2, 1.1, 1.0]}
    pd.DataFrame({"update": [1, 2, 3], **made, "new_after": [1.0, 0.9, 0.9]}).to_csv(folder / "online.csv", index=False)
    (folder / "run.json").write_text(json.dumps({"train_length": "512", "data": {"text": ["builtin"]}}))
    return folder


def monitor_log(file: Path, reports: int = 120, action: str = "warn", time: str = "2026-01-01T00:00:00") -> Path:
    """Reports of one stream: ok, then warnings, then collapsed from two thirds on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(monitor_line(k, reports, action, time) for k in range(reports)))
    return file


def monitor_line(k: int, reports: int = 120, action: str = "warn", time: str = "2026-01-01T00:00:00") -> str:
    """The k-th line of such a log."""
    status = ("ok", "warning", "collapsed")[min(2, 3 * k // reports)]
    heads = [[1, 2, 1.5 + k / 10]] if status != "ok" else []
    done = action if 3 * k in (reports, 2 * reports) else None
    line = {"time": time, "position": 256 * (k + 1), "status": status, "heads": heads, "outside": len(heads)}
    return json.dumps(line | {"worst": 0.5 + k / 10, "shift": 0.3, "action": done}) + "\n"


def pilot_folder(folder: Path, name: str = "small") -> Path:
    """A pilot that advises a remedy, beside the tables of its evaluation and probe."""
    eval_folder(folder, model=name)
    probe_folder(folder / "probe", model=name)
    row = {"name": "state-norm", "control": False, "place": 1, "loss": 0.73, "n": 6, "over_control": 0.95}
    row |= {"saved": {"value": 3.4, "low": 3.3, "high": 3.5}, "gain": {"value": 0.04, "low": 0.01, "high": 0.07}}
    row |= {"recall": {"passkey": 0.2}, "speed": 0.9, "tokens_per_second": 9000.0, "peak_bytes": None, "fails_at": None}
    compared = {"length": 16384, "against": "recompute:last=256", "rows": [row]}
    losses = [
        {"length": n, "loss": v, "stderr": 0.02, "slices": 6, "failing": 0} for n, v in zip(LENGTHS, LOSSES["none"])
    ]
    text = {"name": "my documents", "documents": 12, "tokens": 99_000, "beyond_training": 0.9, "reach_collapse": 0.5}
    gain = {
        "name": "state-norm",
        "control": "recompute:last=256",
        "length": 16384,
        "gain": 0.04,
        "low": 0.01,
        "high": 0.07,
    }
    speed = {"name": "none", "tokens_per_second": 9000.0, "peak_bytes": 2**30}
    found = {
        "model": {"name": name, "parameters": 1000, "train_length": 256, "device": "cpu", "backend": "torch"},
        "text": text,
        "budget": {"seconds": 600.0, "spent": 400.0, "price_an_hour": 1.0},
        "recommendation": {"kind": "remedy", "remedy": "state-norm", "words": ["It collapses at 4K.", "Use it."],
                           "uncertainty": ["Nothing is known beyond 16K."], "python": "import rnn_longctx",
                           "command": "rnn-longctx generate", "next_steps": [["Train it", "rnn-longctx train"]]},
        "collapse": {"length": 4096, "verdict": "collapses at 4K", "threshold": 1.8, "lengths": losses},
        "compared": compared, "screened": compared, "recall": [{"task": "passkey", "name": "none", "right": 0.5}],
        "above_without_document": {"qa": {"value": 0.3, "low": 0.1, "high": 0.5}},
        "context_gain": [gain, gain | {"length": 4096}],
        "onset": {"verdict": "layer 1 head 2 leaves its range", "worst": [{"layer": 1, "head": 2, "onset": 448.0}]},
        "throughput": [speed], "estimate": {"stages": [{"stage": "loss", "seconds": 9.0}]},
        "steps": {"loss": {"seconds": 8.0}}, "not_measured": [], "not_applicable": {}, "excerpts": None,
    }  # fmt: skip
    (folder / "pilot.json").write_text(json.dumps(found))
    return folder


FOLDERS = {
    "eval": eval_folder, "probe": probe_folder, "capacity": capacity_folder, "compare": compare_folder,
    **({"pilot": pilot_folder} if (ROOT / "eval" / "show" / "page" / "kinds" / "pilot.py").is_file() else {}),
    "growth": growth_folder, "train": train_folder, "monitor": lambda path: monitor_log(path.with_suffix(".jsonl")),
}  # fmt: skip
