"""What runs and what is imported on three journeys through the project, and how long imports take: for counts.py.

A journey is a fresh process with a profiler. Counted is a call of a function of the package, at its start and at every
resumption of a generator; a comprehension, a dataclass's generated method and the body of a module or class are none,
but a function that such a body calls at import is one. A crossing is a call whose nearest caller in the package, over
whatever lies between (torch's Module, typer), is in another file; an edge, an ordered pair of files that has one. How
many crossings there are depends on how much is read: that figure is for two commits of one journey.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from counts_source import PACKAGE

ADOPTED = """
import torch, transformers
torch.manual_seed(0)
config = transformers.Mamba2Config(hidden_size=32, vocab_size=97, num_heads=8, head_dim=8, state_size=16, n_groups=1,
    num_hidden_layers=2, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=None)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
"""
TRAIN = """
init: demo
mitigation: a-floor
passing: {segment: 64, bptt: all, start: previous, carry: 0.5}
data: {text: [TEXT], held_out: 0.1, passkey: {fraction: 0.25, lengths: [128, 256], style: auto}}
evaluate: {lengths: [128, 256], every: 2, passkeys: 1}
schedule: {warmup: 1}
train_length: 256
batch_size: 4
steps: 2
log_every: 1
checkpoint_every: 2
device: cpu
out: OUT
"""


def evaluated(folder: Path) -> None:
    run_cli("eval", "demo", "--task", "lm:slices=1,tokens=0", "--mitigation", "state-norm", "--lengths", "2k",
            "--text", write_text(folder), "--out", str(folder / "eval"), "--device", "cpu")  # fmt: skip


def mitigated(folder: Path) -> None:
    values: dict[str, Any] = {}
    exec(ADOPTED, values)
    import torch

    import rnn_longctx

    rnn_longctx.mitigate(values["model"], "rri")
    values["model"].generate(torch.arange(2, 10)[None], max_new_tokens=4, do_sample=False)


def trained(folder: Path) -> None:
    config = TRAIN.replace("TEXT", write_text(folder)).replace("OUT", str(folder / "run"))
    (folder / "train.yaml").write_text(config)
    run_cli("train", str(folder / "train.yaml"))


JOURNEYS = {"eval demo, lm, state-norm": evaluated, "mitigate(hf, rri), generate": mitigated, "train, 2 steps": trained}


def write_text(folder: Path) -> str:
    """64 KB of English numbers: nothing of the project's, so that it is the same for every commit."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = (" ".join(words[int(digit)] for digit in str(n * n * n)) + ".\n" for n in range(100, 2000))
    (folder / "text.txt").write_text("".join(lines)[: 1 << 16])
    return str(folder / "text.txt")


def run_cli(*arguments: str) -> None:
    from rnn_longctx.cli import main

    sys.argv = ["rnn-longctx", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def trace(name: str, root: Path) -> dict[str, int]:
    """Run one journey in this process and count."""
    folder = (root / PACKAGE).resolve()
    files: dict[CodeType, str | None] = {}
    functions, crossings = set[tuple[str, str, int]](), Counter[tuple[str, str]]()

    def file_of(code: CodeType) -> str | None:
        """The project's file that some code is from, links followed; None: another's."""
        if code not in files:
            path = os.path.realpath(code.co_filename)
            inside = any(path.startswith(str(home) + os.sep) for home in homes)
            files[code] = path if inside else None
        return files[code]

    homes = [folder, *(p.resolve() for p in (root / PACKAGE).iterdir() if p.is_symlink())]

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not is_function(code) or (file := file_of(code)) is None or code.co_name in INLINE:
            return
        caller = frame.f_back
        while caller is not None and file_of(caller.f_code) is None:
            caller = caller.f_back
        functions.add((file, code.co_name, code.co_firstlineno))
        if caller is not None and (other := file_of(caller.f_code)) is not None and other != file:
            crossings[other, file] += 1

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            JOURNEYS[name](Path(scratch))
        finally:
            sys.setprofile(None)
            os.chdir(root)
    ran = {file for file, _, _ in functions}
    return {"files": len(ran), "functions": len(functions), "edges": len(crossings), "crossings": crossings.total(),
            "modules imported": loaded()}  # fmt: skip


INLINE = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_OPTIMIZED)  # bodies of modules and classes are not


def loaded() -> int:
    return sum(f"{name}.".startswith(f"{PACKAGE}.") for name in sys.modules)


TIMED = {
    "import rnn_longctx": ("", "import rnn_longctx"),
    "mitigate(adopted, rri), first call": (ADOPTED, "import rnn_longctx; rnn_longctx.mitigate(model, 'rri')"),
}
CLOCK = f"""
import sys, time
{{before}}
start = time.perf_counter()
{{timed}}
print(time.perf_counter() - start, sum((name + ".").startswith("{PACKAGE}.") for name in sys.modules))
"""


def child(root: Path, *command: str) -> str:
    """What a fresh Python with this checkout's package prints last."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def everything(root: Path, times: int = 7) -> list[tuple[str, float]]:
    """Rows of the journeys, and of imports: seconds are the median of so many fresh processes."""
    rows: list[tuple[str, float]] = []
    for name in JOURNEYS:
        counts = json.loads(child(root, __file__, name, str(root)))
        rows += [(f"{name}: {what}", value) for what, value in counts.items()]
    for what, (before, timed) in TIMED.items():
        lines = [child(root, "-c", CLOCK.format(before=before, timed=timed)).split() for _ in range(times)]
        rows.append((f"{what}: seconds", round(statistics.median(float(s) for s, _ in lines), 4)))
        rows.append((f"{what}: modules imported", int(lines[0][1])))
    return rows


if __name__ == "__main__":
    print("\n" + json.dumps(trace(sys.argv[1], Path(sys.argv[2]))))
