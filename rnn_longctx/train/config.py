"""What a training run is made of: typed fields that a YAML file fills (see configs/train/demo.yaml)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rnn_longctx.errors import InputError
from rnn_longctx.models.mamba2 import Mamba2Config


@dataclass(frozen=True)
class PasskeyConfig:
    """A share of the sequences ends with a passkey prompt and its answer; text fills what comes before it."""

    fraction: float = 0.1  # of the sequences in a batch
    lengths: tuple[int, int] = (128, 256)  # tokens of prompt and answer, drawn uniformly, both ends included
    answer_weight: float = 1.0  # weight of the answer tokens' mean loss, added to the loss of all tokens
    style: Literal["headerless", "paper"] = "headerless"

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise InputError(f"fraction: expected a share between 0 and 1, got {self.fraction}")
        if not 0 < self.lengths[0] <= self.lengths[1]:
            raise InputError(f"lengths: expected the shortest and the longest, got {list(self.lengths)}")


@dataclass(frozen=True)
class DataConfig:
    text: list[str] = field(default_factory=lambda: ["site-packages"])  # as rnn_longctx.data.load_text reads them
    tokenizer: str = "bytes"
    held_out: float = 0.005  # share of the text, its last documents, never trained on: the validation text
    passkey: PasskeyConfig = field(default_factory=PasskeyConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {self.held_out}")
        if not self.text:
            raise InputError("text: expected at least one text, such as site-packages")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. No weight decay on vectors (norms, biases, A_log, D, dt_bias) and `_no_weight_decay`
    parameters."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the whole gradient


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine to the end, or (wsd) a constant with a linear decay over the last
    `decay`."""

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 100  # steps
    decay: float = 0.1  # wsd: share of the steps
    min_lr: float = 0.0  # as a share of lr, reached at the end

    def __post_init__(self) -> None:
        if self.name == "wsd" and not 0 < self.decay <= 1:
            raise InputError(f"decay: expected a share of the steps above 0, up to 1, got {self.decay}")


@dataclass(frozen=True)
class TrainConfig:
    model: Mamba2Config
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train_length: int = 256  # tokens
    batch_size: int = 256  # sequences
    steps: int = 1500
    amp: bool | Literal["auto"] = "auto"  # bf16 autocast; auto: on CUDA
    device: str = "auto"  # auto: CUDA when there is one
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 250  # steps
    export_every: int | None = None  # steps between models kept under out/steps, to follow something over training
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the finished model's file
    out: str = "runs/train/demo"
    licences: str = ""  # recorded with the finished model: what the training text is licensed under

    def __post_init__(self) -> None:
        for name in ("train_length", "batch_size", "steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.export_every is not None and self.export_every < 1:
            raise InputError(f"export_every: expected a positive number, got {self.export_every}")
        if "stdlib" in self.data.text:
            raise InputError("data.text: stdlib is the evaluation text and is never trained on; use site-packages")
        if self.data.passkey.fraction and self.data.passkey.lengths[1] > self.train_length:
            longest = self.data.passkey.lengths[1]
            raise InputError(f"data.passkey.lengths: {longest} is longer than train_length {self.train_length}")
