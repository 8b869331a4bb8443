"""Where checkpoints lie: with the package, in a directory, on the Hugging Face hub."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.models.checkpoint.foreign import file_instead
from rnn_longctx.models.checkpoint.layouts import SIDE

BUNDLED = Path(str(files("rnn_longctx"))) / "checkpoints"
DEMOS = (
    "demo",  # Mamba-2 as trained at 512 tokens: it collapses
    "demo-long",  # continued at 16K, so that it does not
    "demo-delta",  # KDA, trained on streams up to 256K for recall
)

# What is fetched from the hub, by name; pickled weights only where there are no others.
FILES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    SIDE,
    "calibration.json",
    "*tokenizer*",
    "special_tokens*",
    "vocab.json",
    "merges.txt",
]
SAFE = ["model*.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


OF_A_RUN = ("model", "last", "best")  # folders that every training run writes a model to


def name_of(folder: Path) -> str:
    """Return what a model in a folder is called: the folder's name; of a training run NAME, where its model/ lies, and
    NAME/last, NAME/best or NAME/STEP for the others (those of steps/), since all runs call these folders alike."""
    folder = folder.resolve()
    of_a_step = folder.parent.name == "steps" and folder.name.isdigit()
    run = (folder.parent.parent if of_a_step else folder.parent).name
    if not run or not (of_a_step or folder.name in OF_A_RUN):
        return folder.name
    return run if folder.name == "model" else f"{run}/{folder.name}"


def former_name(name: str) -> str:
    """Return what an older version, which knew a model by its folder's name alone, may have called it in results."""
    _, slash, last = name.rpartition("/")
    return last if slash and (last in OF_A_RUN or last.isdigit()) else "model"


def locate(source: str | Path) -> tuple[Path, str, dict[str, Any]]:
    """Return where a checkpoint lies, its name (never a whole path) and where it came from.

    Raises:
        InputError: it is neither there nor to be had.
    """
    if source in DEMOS:
        if not (BUNDLED / source).is_dir():
            raise InputError(f"this installation of rnn-longctx comes without its {source} checkpoint")
        return BUNDLED / source, str(source), {}
    if not isinstance(source, str | Path):
        raise InputError(f'expected "demo", a directory or a hub id, got {type(source).__name__}')
    path = home_path(source)
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{source} is an empty directory; expected config.json and weights")
        return path, name_of(path), {}
    if path.exists():
        expected = "is a file; expected a checkpoint directory, such as the one it lies in"
        raise InputError(f"{source} {file_instead(path) or expected}")
    close = difflib.get_close_matches(str(source), DEMOS, n=1, cutoff=0.7)
    near = f'; did you mean "{close[0]}"?' if close else ""
    neither = f"{str(source)!r} is neither a directory nor a hub id that can be reached{near}"
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise InputError(neither)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, allow_patterns=FILES + SAFE))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(source, allow_patterns=FILES + PICKLED))
    except Exception as error:  # the hub client raises many kinds, its transport more
        raise InputError(f"{neither} ({one_line(error)})") from None
    return path, source, {"source": source, "revision": path.name}
