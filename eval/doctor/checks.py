"""The list of what is examined: each with what needs it, the line that installs it, and a small try."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rnn_longctx.errors import one_line
from rnn_longctx.eval.doctor import machine, tries
from rnn_longctx.eval.doctor.tries import NotHere

State = Literal["works", "broken", "missing", "not here"]


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    Attributes:
        state: works; broken: it is installed, and the try failed; missing: it is not installed; not here: nothing is
            wrong, but this machine has no use for it (kernels of a GPU where there is none).
        version: of the package, or None.
        said: what was tried and came out, or the reason why it does not work.
        needed_for: what needs it, in words.
        install: the line that installs it; empty where nothing is to be installed.
        core: whether nothing works without it.
    """

    name: str
    state: State
    version: str | None
    said: str
    needed_for: str
    install: str
    core: bool


@dataclass(frozen=True)
class Check:
    """One thing to examine.

    Attributes:
        package: the distribution whose version is shown, and without which it is missing.
        gpu_only: whether it is of use on a GPU alone.
        attempt: returns what it saw; raises NotHere where this machine has no use for it, and anything else where it
            does not work.
    """

    name: str
    needed_for: str
    attempt: Callable[[], str]
    package: str = ""
    install: str = ""
    core: bool = False
    gpu_only: bool = False

    def run(self) -> Finding:
        """Return what is found, whatever the package does: what it prints and warns of is left out."""
        shown = _version(self.package) if self.package else None
        if self.package and shown is None:
            if self.gpu_only and not tries.gpu_there():
                return self._finding("not here", None, "not installed, and of use on a GPU alone")
            return self._finding("missing", None, "not installed")
        try:
            with _quietly():
                said = self.attempt()
        except NotHere as reason:
            return self._finding("not here", shown, str(reason))
        except Exception as error:  # somebody else's code, on somebody else's machine
            return self._finding("broken", shown, f"{type(error).__name__}: {one_line(error, 200)}")
        return self._finding("works", shown, said)

    def _finding(self, state: State, shown: str | None, said: str) -> Finding:
        there = state == "works" or (state == "not here" and (shown is not None or not self.package))
        install = "" if there else self.install
        return Finding(self.name, state, shown, said, self.needed_for, install, self.core)


TORCH = "pip install torch"
AGAIN = "pip install --force-reinstall rnn-longctx"
CUDA, TRAIN = "pip install 'rnn-longctx[cuda]'", "pip install 'rnn-longctx[train]'"
FLA = "pip install 'flash-linear-attention>=0.6,<0.7'"
EVERYTHING, GPU_SPEED = "everything", "speed on a GPU"

BEFORE = (
    Check("Python", EVERYTHING, tries.python, install="Python 3.11 or newer", core=True),
    Check("torch", EVERYTHING, tries.torch_computes, "torch", TORCH, core=True),
    Check("GPU", "speed on a GPU: --device cuda", tries.gpu),
)
AFTER = (
    Check("demo checkpoint", "make demo, and the examples", tries.demo, install=AGAIN, core=True),
    Check("memory", "a million tokens of the demo", machine.memory),
    Check("disk", "a million tokens of the demo", machine.disk),
    Check("transformers", "models of transformers", tries.adopted, "transformers", "pip install transformers", True),
    Check("pyarrow", "tables of results", tries.parquet, "pyarrow", "pip install pyarrow", core=True),
    Check("matplotlib", "plots; no browser is needed", tries.plot, "matplotlib", "pip install matplotlib", True),
    Check("triton", GPU_SPEED, tries.triton, "triton", CUDA, gpu_only=True),
    Check("mamba-ssm", "its models, bench against it", tries.mamba_ssm, "mamba-ssm", CUDA, gpu_only=True),
    Check("causal-conv1d", "mamba-ssm's speed", tries.causal_conv1d, "causal-conv1d", CUDA, gpu_only=True),
    Check("flash-linear-attention", "speed of delta rules on a GPU", tries.fla, "fla-core", FLA, gpu_only=True),
    Check("lm-eval", "rnn-longctx lm-eval", tries.lm_eval, "lm-eval", "pip install 'rnn-longctx[eval]'"),
    Check("wonderwords", "lm-eval's RULER tasks", tries.wonderwords, "wonderwords", "pip install wonderwords"),
    Check("nltk", "lm-eval's RULER tasks", tries.nltk, "nltk", "pip install nltk"),
    Check("optuna", "rnn-longctx tune", tries.optuna, "optuna", "pip install 'rnn-longctx[tune]'"),
    Check("accelerate", "training on several GPUs", tries.accelerate, "accelerate", TRAIN),
    Check("datasets", "texts of the Hugging Face hub (hf:)", tries.datasets, "datasets", TRAIN),
    Check("peft", "models with adapters", tries.peft, "peft", "pip install peft"),
    Check("tensorboard", "--log tensorboard", tries.tensorboard, "tensorboard", "pip install tensorboard"),
    Check("wandb", "--log wandb", tries.wandb, "wandb", "pip install wandb"),
)


def examine(say: Callable[[str], object] = lambda line: None) -> list[Finding]:
    """Return what is found on this machine, one thing after the other; say: told the name of each before its try."""
    findings: list[Finding] = []
    for check in _checks(findings):
        say(check.name)
        findings.append(check.run())
    return findings


def core_works(findings: Sequence[Finding]) -> bool:
    """Return whether everything works that the library cannot do without."""
    return all(finding.state in ("works", "not here") for finding in findings if finding.core)


def _checks(findings: list[Finding]) -> Iterator[Check]:
    """Yield the checks: what there are of backends is known only where torch works, and without it nothing else does.
    findings: those so far."""
    yield from BEFORE
    if not core_works(findings):
        return
    for name, attempt in tries.backends():
        always = name.endswith((" torch", " reference"))
        yield Check(f"backend {name}", EVERYTHING if always else GPU_SPEED, attempt, install=AGAIN, core=always)
    yield from AFTER


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what packages print, log and warn of while they are tried."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
