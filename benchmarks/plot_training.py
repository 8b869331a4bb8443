"""docs/results/training.png, from benchmarks/results/continual.csv."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES = {
    ("demo", "none"): "demo",
    ("demo", "rri:alpha=0.998,beta=1"): "demo under rri (best remedy by loss)",
    ("demo", "token-filter:theta=0.05+state-norm:every=64"): "demo under token-filter+state-norm (best by recall)",
    ("plain, 256", "none"): "plain fine-tuning at 256",
    ("fitted noise at 16K", "none"): "fitted noise",
    ("state passing at 16K", "none"): "state passing",
    ("state passing at 16K from a-floor (demo-long)", "none"): "state passing from a-floor: demo-long",
}
LENGTHS = {512: "512", 4096: "4K", 16384: "16K", 65536: "64K", 262144: "256K", 2**20: "1M"}


def main() -> None:
    root = Path(__file__).parents[1]
    with (root / "benchmarks" / "results" / "continual.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if "slices=32" not in row["command"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for (training, mitigation), label in SERIES.items():
        own = [row for row in rows if (row["training"], row["mitigation"]) == (training, mitigation)]
        for ax, task in zip(axes, ("lm", "passkey"), strict=True):
            points = sorted((int(row["length"]), float(row["value"])) for row in own if row["task"] == task)
            style = {"lw": 2.2, "color": "k"} if "demo-long" in label else {"lw": 1.2}
            ax.plot(*zip(*points, strict=True), marker="o", ms=3, label=label, **style)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(LENGTHS), list(LENGTHS.values()))
        ax.set_xlabel("tokens read")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("loss on the standard library (nats a byte)")
    axes[0].set_ylim(0.9, 2.6)
    axes[0].legend(fontsize=7.5, loc="upper left")
    axes[1].set_ylabel("passkeys found")
    axes[1].axvline(16384, ls=":", c="grey")
    figure.tight_layout()
    figure.savefig(root / "docs" / "results" / "training.png", dpi=110)


if __name__ == "__main__":
    main()
