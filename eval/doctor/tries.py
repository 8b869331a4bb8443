"""One small try of everything: each returns in words what it saw, and raises where something does not work.

Random numbers are drawn from generators of their own: a try changes nothing that a program goes on with.
"""

from __future__ import annotations

import importlib
import math
import platform
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rnn_longctx.recurrence.interface import Recurrence

OLDEST = (3, 11)
SIZE = 16
LENGTH = 40  # tokens of a scan: two chunks of 16 and a part, short enough for Triton's interpreter
# What a backend may be off by, relative to the largest output: a few roundings of products in its type.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}


class NotHere(Exception):
    """What is tried has no use on this machine, and nothing is wrong with it."""


def python() -> str:
    """Return Python's version and the machine."""
    if sys.version_info < OLDEST:
        raise RuntimeError(
            f"Python {'.'.join(map(str, OLDEST))} or newer is needed, this is {platform.python_version()}"
        )
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def torch_computes() -> str:
    """Multiply two matrices."""
    import torch

    a = torch.arange(6.0, device="cpu").view(2, 3)
    if (a @ a.T).tolist() != [[5.0, 14.0], [14.0, 50.0]]:
        raise RuntimeError("a product of two small matrices is wrong")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs alone"
    return f"multiplies matrices, {built}, {torch.get_num_threads()} threads"


def gpu() -> str:
    """Return every GPU that torch sees, and multiply on it."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built:
            raise NotHere(f"torch is built for {built} and sees no GPU: look for a driver (nvidia-smi)")
        raise NotHere("torch is built for CPUs alone")
    parts = []
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        ones = torch.ones(16, 16, device=device)
        if float((ones @ ones).sum()) != 16**3:
            raise RuntimeError(f"a product of two small matrices is wrong on {device}")
        major, minor = torch.cuda.get_device_capability(device)
        few = "" if (major, minor) >= (8, 0) else ", too old for the kernels, which need 8.0"
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        parts.append(f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, {gib:.0f} GiB{few}")
    return "; ".join(parts)


# ---- backends of the recurrences


def backends() -> list[tuple[str, Callable[[], str]]]:
    """Return a name and a try for every backend of every recurrence."""
    from rnn_longctx.recurrence.interface import RECURRENCES

    pairs = [(recurrence, name) for recurrence in RECURRENCES.values() for name in recurrence.backends.known]
    return [(f"{recurrence.name} {name}", partial(scan, recurrence, name)) for recurrence, name in pairs]


def scan(recurrence: Recurrence, backend: str) -> str:
    """Read a short random stream by a backend, and compare it with the definition in float64."""
    import torch

    from rnn_longctx.recurrence.backends import Call
    from rnn_longctx.recurrence.gates import SteppedGates
    from rnn_longctx.recurrence.policy import PLAIN
    from rnn_longctx.recurrence.span import WHOLE

    known = recurrence.backends.known[backend]
    if reason := known.missing():
        raise NotHere(reason)
    devices = [torch.device(name) for name in ("cuda", "cpu") if name == "cpu" or torch.cuda.is_available()]
    types = (torch.float32, torch.bfloat16, torch.float16)
    refused = ""
    for device, dtype, kind, per_channel in product(devices, types, recurrence.takes, (False, True)):
        ours = _stream(kind, per_channel, device, dtype)
        call = Call(device, dtype, per_channel, SIZE, SIZE, kind is SteppedGates)
        if reason := known.refuses(PLAIN, call):
            refused = refused or reason
            continue
        theirs = _stream(kind, per_channel, torch.device("cpu"), torch.float64)
        expected, after = recurrence.reference(*theirs, WHOLE, PLAIN, None)
        y, carry = recurrence.scan(*ours, backend=backend)
        name = str(dtype).removeprefix("torch.")
        off = max(_off(y, expected), _off(recurrence.state(carry), after.state))
        if not off <= TOLERANCE[name]:
            raise RuntimeError(f"its {name} outputs on {device} are off by {off:.1g} of the largest")
        return f"{LENGTH} tokens in {name} on {device}, off by {off:.0e}"
    raise NotHere(refused)


def _stream(kind: type, per_channel: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return inputs and gates of a kind: 2 rows, 2 heads of SIZE channels and SIZE columns of state, the same each
    time."""
    import torch

    from rnn_longctx.recurrence.gates import DeltaGates, Gates, ScanInputs, SteppedGates

    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float64)

    rows, heads, size = (2, LENGTH), 2, SIZE
    keys = torch.nn.functional.normalize(draw(*rows, 1, size) - 0.5, dim=-1)
    inputs = [draw(*rows, heads, size) - 0.5, keys, draw(*rows, 1, size) - 0.5]
    decayed = (heads, size) if per_channel else (heads,)
    gates: list[Any]
    if kind is SteppedGates:
        gates = [draw(*rows, heads), -draw(*decayed)]
    else:
        assert kind in (Gates, DeltaGates)
        gates = [-0.5 * draw(*rows, *decayed), draw(*rows, heads)]
    # Everything is rounded to the type that is tried, so that the definition reads what the backend does.
    inputs, gates = ([t.to(torch.bfloat16).to(device, dtype) for t in some] for some in (inputs, gates))
    return ScanInputs(*inputs), kind(*gates)


def _off(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double().cpu() - expected).abs().max() / expected.abs().max())


# ---- the demo and what it is read, kept and drawn with


def demo() -> str:
    """Read a few tokens of text with the demo checkpoint, which must predict them better than chance."""
    import torch

    from rnn_longctx.models.load import load

    model = load("demo", device="cpu")
    ids = torch.from_numpy(model.tokenizer.encode("import os\n\n\ndef walk(top):\n    return os.listdir(top)\n" * 4))[
        None
    ]
    with torch.inference_mode():
        loss = float(model.losses(model(ids[:, :-1].long()), ids[:, 1:].long()).mean())
    if not loss < math.log(model.vocab_size):
        raise RuntimeError(f"its loss is {loss:.3g} nats a byte, no better than chance")
    return f"reads {ids.shape[1] - 1} tokens, loss {loss:.2f} nats a byte (chance {math.log(model.vocab_size):.2f})"


def adopted() -> str:
    """Read with a random Mamba-2 of transformers, adopted, and under a remedy that changes nothing."""
    import torch
    import transformers

    from rnn_longctx.mitigations import mitigate
    from rnn_longctx.models.adopt.adopting import adopt

    with torch.random.fork_rng(devices=[]):
        sizes: Any = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8, "hidden_size": 16, "expand": 2}
        config = transformers.Mamba2Config(vocab_size=32, num_hidden_layers=1, chunk_size=16, **sizes)
        theirs = transformers.Mamba2ForCausalLM(config).eval()
    ids = torch.arange(24, device="cpu")[None]
    with torch.inference_mode():
        before = theirs(ids).logits
        with mitigate(theirs, "rri:alpha=1,beta=1"):
            under = theirs(ids).logits
        model = adopt(theirs)
        ours = model.logits(model(ids))
    for logits, what in ((under, "under a remedy that changes nothing"), (ours, "read by this library")):
        if not torch.allclose(logits, before, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"a Mamba2ForCausalLM says something else {what}")
    return "a Mamba2ForCausalLM is adopted and says what it did"


def parquet() -> str:
    """Write a table and read it again."""
    import io

    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b"], "samples": [[0.5, 1.0], [2.0]]})
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    again = pd.read_parquet(io.BytesIO(buffer.getvalue()))
    if again["text"].tolist() != ["a", "b"] or list(again["samples"][0]) != [0.5, 1.0]:
        raise RuntimeError("a table is not what was written")
    return "writes and reads a Parquet table"


def plot() -> str:
    """Draw a line into memory."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, drawn = Figure(figsize=(1, 1)), io.BytesIO()
    figure.add_subplot().plot([0, 1])
    FigureCanvasAgg(figure).print_png(drawn)
    return f"draws a picture of {len(drawn.getvalue()) / 1000:.0f} kB"


# ---- optional packages


def triton() -> str:
    """Say whether Triton's kernels can run."""
    from rnn_longctx.recurrence import triton as here

    _imports("triton")
    if reason := here.missing():
        raise NotHere(reason)
    return "runs in its interpreter, on the CPU" if here.interpreted() else "kernels can run (see the backends)"


def mamba_ssm() -> str:
    """Import its scan; that it reads rightly is what its backend tries."""
    _needs_gpu()
    return _imports("mamba_ssm.ops.triton.ssd_combined")


def causal_conv1d() -> str:
    """Compare its convolution with torch's."""
    _needs_gpu()
    import torch

    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x = torch.linspace(-1, 1, 2 * 8 * 32, device="cuda").view(2, 8, 32)
    weight = torch.linspace(0, 1, 8 * 4, device="cuda").view(8, 4)
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (3, 0)), weight[:, None], groups=8)
    if not torch.allclose(convolve(x, weight), expected, rtol=1e-2, atol=1e-2):
        raise RuntimeError("its convolution is not torch's")
    return "convolves as torch does"


def fla() -> str:
    """Say whether its kernels can run; that they read rightly is what its backends try."""
    from rnn_longctx.recurrence import fla as here

    if reason := here.missing():
        raise NotHere(reason)
    return _imports("fla.ops")


def lm_eval() -> str:
    """Import what a model of lm-eval is made of."""
    return _imports("lm_eval.api.model")


def wonderwords() -> str:
    """Draw a word."""
    word = importlib.import_module("wonderwords").RandomWord().word()
    if not word:
        raise RuntimeError("it draws no word")
    return "draws a word"


def nltk() -> str:
    """Import it."""
    return _imports("nltk")


def optuna() -> str:
    """Run a search of three trials in memory."""
    package = importlib.import_module("optuna")
    study = package.create_study(sampler=package.samplers.RandomSampler(0))
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=3)
    return f"a search of {len(study.trials)} trials ran"


def accelerate() -> str:
    """Import what training over several processes is made of."""
    return _imports("accelerate")


def datasets() -> str:
    """Read a data set that is made in memory."""
    made = importlib.import_module("datasets").Dataset.from_dict({"text": ["a", "b"]})
    if made["text"][1] != "b":
        raise RuntimeError("a data set is not what it was made of")
    return "reads a data set of two records"


def peft() -> str:
    """Import its layers."""
    return _imports("peft")


def tensorboard() -> str:
    """Import its writer."""
    return _imports("torch.utils.tensorboard")


def wandb() -> str:
    """Import it, and send nothing."""
    return _imports("wandb")


def _imports(module: str) -> str:
    importlib.import_module(module)
    return f"imports {module}"


def gpu_there() -> bool:
    """Return whether torch, if there is one, sees a GPU."""
    try:
        import torch
    except Exception:  # none, or one that does not load here
        return False
    return torch.cuda.is_available()


def _needs_gpu() -> None:
    if not gpu_there():
        raise NotHere("needs a CUDA device")
