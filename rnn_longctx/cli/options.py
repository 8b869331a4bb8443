"""The options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnn_longctx.cli.output import say
from rnn_longctx.plain import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rnn_longctx.models.interface import LanguageModel

TEXTS = "stdlib, a file, a directory, jsonl:PATH[:field], parquet:PATH[:column], hf:dataset[:split[:column]]."
MODEL_HELP = '"demo", "demo-long", "demo-delta", a directory, or a Hugging Face hub id.'
MODEL = typer.Argument(help=MODEL_HELP)
Many = list[str] | None


def option(help: str, default: str, **more: Any) -> Any:
    """Of an option that is None where it is not given: what stands for it then is shown as its default."""
    return typer.Option(help=help, show_default=default, **more)


TrainLength = Annotated[
    str | None, option("Tokens, such as 2k, where the checkpoint does not say.", "the checkpoint's")
]
Tokenizer = Annotated[str | None, option('"bytes", a directory, or a hub id.', "the checkpoint's")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64.")]
StateDtype = Annotated[
    str | None, option("Round the recurrent state to it between calls: bfloat16, float16, float64.", "float32")
]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    train_length: TrainLength = None
    tokenizer: Tokenizer = None
    device: Device = "auto"
    dtype: Dtype = "float32"
    state_dtype: StateDtype = None

    def load(self, name: str) -> LanguageModel:
        """Return the model of a name, on its device. Raises InputError: see `rnn_longctx.load`."""
        return load_model(name, self.device, self.dtype, self.tokenizer, self.train_length, self.state_dtype)


def load_model(
    name: str, device: str, dtype: str, tokenizer: str | None, train_length: str | int | None, state_dtype: str | None
) -> LanguageModel:
    """Return the model of a name, its own or of another library, with its state kept in `state_dtype`."""
    from rnn_longctx.devices import device_of
    from rnn_longctx.models.adopt.adopting import load_any

    model = load_any(name, device=device_of(device), dtype=dtype, tokenizer=tokenizer, train_length=train_length)
    model.use_state_dtype(state_dtype)
    return model


def about(model: LanguageModel, dtype: str) -> RenderableType:
    """Return what stands above a command's results: the model, its state, its training length, and on what it runs."""
    from rnn_longctx.devices import dtype_name
    from rnn_longctx.eval.show.terminal import header
    from rnn_longctx.models.segments import reads

    return header(
        plain(model.name),
        sum(p.numel() for p in model.parameters()),
        model.state_size(),
        model.train_length,
        str(model.device),
        dtype if model.state_dtype is None else f"{dtype} with states in {dtype_name(model.state_dtype)}",
        model.backend,
        reads(model),
    )


def say_segment(model: LanguageModel) -> None:
    """Print how many tokens of an adopted model are read at once, where another library's kernels limit that."""
    from rnn_longctx.models.segments import reads

    if line := reads(model):
        say(f"{model.name} reads {line}")
