"""The processes that train together: one of one, or ranks that `accelerate launch` or `torchrun` began.

A global batch is cut by rows into lanes, one a data-parallel rank. With `sequence_parallel: n` a lane is n ranks of
consecutive numbers that hold every sequence of it together (`rnn_longctx.train.parallel`). Each rank's loss is its part
of the global mean times the number of ranks, so that the mean of gradients that DDP and FSDP2 take is the gradient of
one rank that read everything. Hugging Face accelerate starts the process group and wraps for DDP; FSDP2 is PyTorch's
`fully_shard` itself, since accelerate leaves it out on CPUs. Parameters are sharded and travel in float32: A_log and
dt_bias in 16 bits are other decays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import LM
from rnn_longctx.ranks import rank, world
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.parallel import sequence_parallel, stretch

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # that ranks wait for rank 0, which evaluates and writes alone


class Team:
    """The processes of a run, as one of them sees the others.

    Raises:
        InputError: a device that is not there, or a number of ranks that the config does not fit.
    """

    def __init__(self, config: TrainConfig):
        self.world = world()
        self.rank = rank() if self.world > 1 else 0
        self.sequence = config.sequence_parallel
        self.sharded = self.world > 1 and (config.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true")
        if self.world % self.sequence:
            raise InputError(f"sequence_parallel: {self.sequence} does not divide the {self.world} ranks there are")
        self.lanes = self.world // self.sequence
        for rows in (stage.rows for stage in config.stages):
            if rows % (self.lanes * config.accumulate):
                ranks = f"{self.lanes} ranks times " if self.lanes > 1 else ""
                name = "batch_size" if rows == config.batch_size else "train_length"
                raise InputError(f"{name}: {rows} rows do not divide by {ranks}accumulate {config.accumulate}")
        self.accelerator: Any = None
        self.began = not dist.is_initialized()
        self.group: dist.ProcessGroup | None = None
        if self.world == 1:
            self.device = training_device(config.device)
            return
        if config.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device: expected auto, cpu or cuda for {self.world} ranks, got {config.device!r}")
        cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
        if not cpu:
            training_device("cuda")
        self.accelerator = _accelerator(cpu)
        self.device = self.accelerator.device
        if self.sequence > 1:  # a group of their own, which DDP's traffic does not mix with; every rank makes all
            groups = [dist.new_group(list(range(i, i + self.sequence))) for i in range(0, self.world, self.sequence)]
            self.group = groups[self.rank // self.sequence]

    def rows(self, config: TrainConfig) -> slice:
        """Return which rows of a batch this rank reads. config: that of a stage."""
        each, lane = config.batch_size // self.lanes, self.rank // self.sequence
        return slice(lane * each, (lane + 1) * each)

    # --- the model

    def spread(self, learner: nn.Module) -> nn.Module:
        """Return the learner as it is to be called: as it is, in DDP, or sharded in place (before its optimizer is
        made)."""
        if self.world == 1:
            return learner
        if not self.sharded:
            return self.accelerator.prepare_model(learner)
        from torch.distributed.fsdp import fully_shard

        exempt = [name for name, p in learner.named_parameters() if getattr(p, "_no_weight_decay", False)]
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        for layer in learner.model.layers:  # type: ignore[union-attr]
            fully_shard(layer.mixer, mesh=mesh)
        fully_shard(learner, mesh=mesh)  # the rest: embedding, head, norms
        for name in exempt:
            learner.get_parameter(name)._no_weight_decay = True  # type: ignore[attr-defined]
        return learner

    def step(self, learner: nn.Module, *last: bool) -> AbstractContextManager:
        """Return the context around a forward and backward call.

        DDP reduces gradients after the last of all alone. FSDP2 reduces them every time: no rank of a model that is
        sharded has room for all.

        Args:
            last: whether the call is of the last rows, and of their last segment.
        """
        return nullcontext() if all(last) or self.world == 1 or self.sharded else learner.no_sync()  # type: ignore

    def reading(self, model: LM) -> AbstractContextManager:
        """Return a context in which the ranks of a lane read each sequence together."""
        return nullcontext() if self.sequence == 1 else sequence_parallel(model, self.group)

    def stretch(self, length: int) -> slice:
        """Return which of `length` tokens that a lane reads are this rank's."""
        return slice(0, length) if self.sequence == 1 else stretch(length, self.group)

    def whole(self, model: LM) -> LM:
        """Return on rank 0 a model that can be used by itself: `model`, or a copy with all of its weights.
        Collective."""
        if not self.sharded:
            return model
        state = self.gathered(model.state_dict())
        if self.rank > 0:
            return model
        with torch.device("meta"):
            plain = LM(model.config)
        plain.load_state_dict({k: t.to(self.device) for k, t in state.items()}, assign=True)
        if model.config.tie_embeddings:
            plain.lm_head.weight = plain.backbone.embedding.weight
        for name in ("name", "train_length", "tokenizer", "provenance", "eos_token_id"):
            setattr(plain, name, getattr(model, name))
        return plain

    def gathered(self, tree: Any) -> Any:
        """Return the tree with all of every sharded tensor, on the CPU. Collective."""
        if not self.sharded:
            return tree
        from torch.distributed.tensor import DTensor
        from torch.utils._pytree import tree_map_only

        return tree_map_only(DTensor, lambda t: t.full_tensor().cpu(), tree)

    def load(self, model: LM, optimizer: torch.optim.Optimizer, snapshot: dict[str, Any]) -> None:
        """Load weights and moments from a snapshot, whatever ranks wrote it. Collective."""
        weights, moments = snapshot["model"], snapshot["optimizer"]
        if self.sharded:
            shards = model.state_dict()
            weights = {k: self._shard(t, shards[k]) for k, t in weights.items()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {k: self._shard(t, parameters[i]) if k != "step" else t for k, t in of_parameter.items()}
                for i, of_parameter in moments["state"].items()
            }
            moments = moments | {"state": state}
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)

    def _shard(self, tensor: Tensor, like: Any) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements)

    # --- what ranks tell each other

    def first(self, run: Callable[[], T]) -> T:
        """Return on every rank what `run` returns on rank 0. What it raises there ends every rank; rank 0 says why."""
        if self.world == 1:
            return run()
        message: list[Any] = [None, True]  # what it returned, whether it failed
        try:
            if self.rank == 0:
                message = [run(), False]
        finally:
            dist.broadcast_object_list(message, device=self.device if self.device.type == "cuda" else None)
        if message[1]:
            raise SystemExit(1)
        return message[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks. Collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agreed(self, losses: Tensor, norm: Tensor) -> list[float]:
        """Return the numbers as rank 0 has them, so that all decide alike. Collective."""
        if self.sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        values = torch.cat([losses, norm.to(losses.dtype).view(1)])
        if self.world > 1:
            dist.broadcast(values, 0)
        return values.tolist()

    def sum_of_lanes(self, values: Tensor) -> Tensor:
        """Sum what all ranks of a lane have alike. Collective."""
        return self.sum(values) / self.sequence

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of every lane from those of this one, in order, on the CPU. Collective."""
        if self.world == 1:
            return rows
        of_ranks = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(of_ranks, rows.contiguous())
        return torch.cat(of_ranks[:: self.sequence]).cpu()

    def close(self) -> None:
        """End the process group, if this team began it."""
        if self.world > 1 and self.began:
            self.accelerator.end_training()


def _accelerator(cpu: bool) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError:
        raise InputError("training over several ranks needs accelerate: pip install 'rnn-longctx[train]'") from None
    # the loop enters autocast itself
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def training_device(name: str) -> torch.device:
    """Return the device that a config names. Nothing is put on it, unlike by `devices.device_of`: a rank, or a study
    whose cells train, is to take no memory of a card that it does not use. Raises InputError: no such device, or none
    here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:0, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {name} was asked for, but there is no CUDA device here")
    return device
