"""benchmarks/results/leaderboard.csv and the tables of docs/results/leaderboard.md, from folders of `rnn-longctx eval`:

    python benchmarks/leaderboard.py runs/leaderboard/demo runs/leaderboard/prose

One CSV of all folders, numbers to five digits; on the screen a table a model: the loss at the longest length over that
of the better `recompute` for each text (bold: surely below every control's), recall at the two longest lengths where it
was measured, and its tokens a second and its memory over those of none, the median over texts.
"""

import sys
from pathlib import Path

import pandas as pd

from rnn_longctx.config import format_length

OUT = Path(__file__).parent / "results" / "leaderboard.csv"
TASKS = ("passkey", "multikey2", "words")
COSTS = ("speed", "memory")


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    if missing := [str(f) for f in folders if not (f / "leaderboard.csv").is_file()] or not folders:
        sys.exit(f"expected folders with a leaderboard.csv; without one: {missing if folders else 'none was named'}")
    board = pd.concat([pd.read_csv(f / "leaderboard.csv") for f in folders], ignore_index=True)
    board.to_csv(OUT, index=False, float_format="%.5g", lineterminator="\n")
    for model, rows in board.groupby("model", sort=False):
        print(f"\n{model}\n\n{table(rows)}")


def table(rows: pd.DataFrame) -> str:
    texts, longest = list(dict.fromkeys(rows["text"])), rows["length"].max()
    texts.sort(key=lambda text: text != "stdlib")  # code first
    asked = [task for task in TASKS if task in rows and rows[task].notna().any()]
    far = {t: sorted(rows["length"][rows[t].notna()].unique())[-2:] for t in asked}
    costs = [cost for cost in COSTS if rows[cost].notna().any()]
    heads = [*texts, *(f"{t} {' / '.join(map(format_length, far[t]))}" for t in asked), *costs]
    lines = {}
    for name in dict.fromkeys(rows["mitigation"]):
        mine = rows[rows["mitigation"] == name]
        ratios = [ratio(rows[(rows["text"] == t) & (rows["length"] == longest)], name) for t in texts]
        recall = [" / ".join(at(mine[mine["length"] == n], t, ".2f") for n in far[t]) for t in asked]
        cost = [median(mine[mine[c].notna()], c) for c in costs]
        word = f"*control* `{name}`" if bool(mine["control"].any()) else f"`{name}`"
        rank = sum(value for value, _ in ratios)
        bold = [f"{'**' * sure}{value:.3f}{'**' * sure}" if value == value else "" for value, sure in ratios]
        lines[word] = (rank if rank == rank else float("inf"), [*bold, *recall, *cost])
    body = [f"| {word} | {' | '.join(cells)} |" for word, (_, cells) in sorted(lines.items(), key=lambda kv: kv[1][0])]
    return "\n".join([f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *body])


def ratio(rows: pd.DataFrame, name: str) -> tuple[float, bool]:
    """A remedy's loss over the better recompute's, and whether it is surely below every control's."""
    mine, against = rows[rows["mitigation"] == name], rows[rows["mitigation"].str.startswith("recompute:")]
    if mine.empty:
        return float("nan"), False
    sure = "loss" in str(mine["wins"].iloc[0]).split(", ")
    return float(mine["loss"].iloc[0] / against["loss"].min()), sure


def median(rows: pd.DataFrame, column: str) -> str:
    far = rows[rows["length"] == rows["length"].max()]
    return "" if far.empty else f"{far[column].median():.2f}"


def at(rows: pd.DataFrame, column: str, form: str) -> str:
    found = rows[column].dropna()
    return "" if found.empty else format(float(found.iloc[0]), form)


if __name__ == "__main__":
    main()
