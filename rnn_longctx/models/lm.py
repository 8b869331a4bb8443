"""A language model that reads a context as a stream. Nothing about a stream is kept on a module; a reader's control
(`rnn_longctx.models.restart`) is the model's `restart`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.block import Backbone, Block, Output
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.hashing import Identified
from rnn_longctx.models.ids import refuse_offloaded, rows_of
from rnn_longctx.models.interface import Reader
from rnn_longctx.models.layerwise import BlockByBlock
from rnn_longctx.models.losses import head_losses, token_losses
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.mixers.full_attention import FullAttention
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.precision import state_dtype
from rnn_longctx.models.reading import Hooked
from rnn_longctx.models.restart import Restart, read_restarting
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.recurrence.shard import Shard
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import SSD


class LM(Hooked, Identified, nn.Module):
    """A language model whose context is a stream.

        model = LM(ModelConfig("gla:heads=4", d_model=256, n_layer=6))
        model = LM(Mamba2Config(d_model=256, n_layer=6))

    Attributes:
        name, train_length, tokenizer, provenance, calibration: filled in by `rnn_longctx.load`.
        weights_hash: of what the model computes now, in whatever layout it was stored (see `digest`).
        eos_token_id: the id or ids that its config ends an answer with, beside the tokenizer's, or None.
        restart: a control that drops the state and reads the last tokens again, or None.
        reader: how a prompt is read where that is not token after token, or None.
        spread: finds the shard of a call, of ids, mask and reset, where a stream is spread over several ranks (see
            `rnn_longctx.train.parallel`), or None.
    """

    digested_as: ClassVar[str] = "Mamba2LM"  # its name when saved states and cells were first keyed by the digest

    def __init__(self, config: ModelConfig | Mamba2Config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.name = "unnamed"
        self.train_length: int | None = None
        self.tokenizer: Any = None
        self.eos_token_id: int | list[int] | None = None
        self.provenance: dict = {}
        self.restart: Restart | None = None
        self.reader: Reader | None = None
        self.spread: Callable[[Tensor, Tensor | None, Tensor | None], Shard] | None = None

    own_forward = False
    foldable = True
    rotary_scaling: str | None = None

    @property
    def module(self) -> LM:
        return self

    @property
    def tied(self) -> bool:
        return self.lm_head.weight is self.backbone.embedding.weight

    # --- the layer interface that remedies and probes use

    @property
    def layers(self) -> list[Block]:
        """The residual layers, in order."""
        return list(self.backbone.layers)  # type: ignore[arg-type]

    @property
    def mixers(self) -> list[Recurrent]:
        """The recurrent mixers, in order; a model of attention alone has none."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, Recurrent)]

    @property
    def rotary(self) -> list[FullAttention]:
        """The layers of full attention with rotary positions, whose `yarn` may be set."""
        full = (layer.mixer for layer in self.layers if isinstance(layer.mixer, FullAttention))
        return [mixer for mixer in full if mixer.rotary]

    @property
    def attends(self) -> bool:
        """Whether some layer keeps keys and values of the tokens that it has read."""
        return any(block.mixer.attends for block in self.layers)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def d_model(self) -> int:
        return self.config.d_model

    def state_size(self) -> StateSize:
        """Return how many numbers a row keeps between two tokens, in all layers."""
        return sum((block.mixer.state_size() for block in self.layers), StateSize())

    @property
    def backend(self) -> str:
        """The scan that the present policies choose here; "torch" where there is no scan."""
        names = {mixer.chosen_backend(self.device, self.dtype) for mixer in self.mixers}
        return "+".join(sorted(names)) or "torch"

    def use_backend(self, name: str | None) -> None:
        """Force one scan backend for every layer (None: choose). Raises InputError if it is missing here."""
        mixers = self.mixers
        for recurrence in {m.recurrence.name: m.recurrence for m in mixers}.values() or [SSD]:
            recurrence.backends.choose(PLAIN, name)
        for mixer in mixers:
            mixer.backend = name

    @property
    def state_dtype(self) -> torch.dtype | None:
        """What the state is rounded to between calls, or None: see `use_state_dtype`."""
        return next((mixer.state_dtype for mixer in self.mixers), None)

    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Keep every layer's recurrent state at another precision than the scan's own, which is float32 (float64 in a
        float64 model; None goes back to it): float32, bfloat16, float16 or float64.

        The state is rounded whenever a call hands it on, that is after each segment of a prompt and after each token in
        generation, and nowhere else: within a call the scan is float32 (float64 for a float64 state, too). A sliding
        window's delay line is rounded with it; a convolution's last inputs are as they were, and so is attention's
        cache.

        Raises:
            InputError: another type.
        """
        rounded = state_dtype(dtype, self.dtype)
        for mixer in self.mixers:
            mixer.state_dtype = rounded

    @property
    def device(self) -> torch.device:
        return refuse_offloaded(self.backbone.embedding.weight, self.name).device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.embedding.weight.dtype

    # --- reading

    def forward(
        self, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        """Read ids (B, T) and return the hidden states (B, T, d_model) after the last norm.

        Args:
            cache: what the stream has read so far; it is moved on in place. None starts and forgets a stream.
            mask: (B, T) bool, False at left padding (only before a row's first token).
            reset: (B, T) bool, True where a new document begins.
        """
        cache = cache if cache is not None else Cache()
        if self.restart is not None:
            if reset is not None:
                raise InputError(f"the control {self.restart} cannot be combined with document boundaries")
            return read_restarting(self.hooked_read(), self.restart, ids, cache, mask)
        return self.hooked_read()(ids, cache, mask, reset)

    def read(self, ids: Tensor, cache: Cache, mask: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        """Read as `forward` does, without the reader's control."""
        if cache.layers and len(cache.position) != len(ids):
            raise InputError(f"the cache holds {counted(len(cache.position), 'row')}, the ids {len(ids)}")
        shard = None if self.spread is None else self.spread(ids, mask, reset)
        if ids.shape[1] == 0:
            return self.backbone.embedding.weight.new_zeros(*ids.shape, self.config.d_model)
        if mask is not None and bool(mask.all()):
            mask = None
        span, in_fp32 = Span(mask, reset, shard, shared={}), self.config.residual_in_fp32
        h: Tensor = self.backbone.embedding(ids)  # (B, T, d_model)
        out: Output = None
        carries = []
        for i, block in enumerate(self.layers):
            # (no function around these three: its caller would keep the residual before alive while the mixer reads)
            normed, h = block.norm.add(h, out, in_fp32)
            out, carry = block.mixer(normed, cache.layers[i] if cache.layers else None, span)
            h, out = block.feed_forward(h, out, in_fp32)
            carries.append(carry)
        length = ids.shape[1] if shard is None else shard.total
        read = torch.full((len(ids),), length, device="cpu") if mask is None else mask.sum(1).cpu()
        cache.position = read + (cache.position if cache.layers else 0)
        cache.layers = carries
        return self.backbone.norm_f.add(h, out, in_fp32)[0]

    def stream(self, ids: Tensor, cache: Cache | None = None, segment: int = 4096) -> Iterator[Tensor]:
        """Yield the hidden states of ids (B, T), or (T), one row, a segment at a time, in the memory of one segment."""
        ids, cache = rows_of(ids), self.new_cache() if cache is None else cache
        for t in range(0, ids.shape[1], segment):
            yield self(ids[:, t : t + segment].to(self.device), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., vocab) float32 from hidden states (..., d_model)."""
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target) in nats, (B, T), from hidden states (B, T, d_model); never all logits at once. A target
        of -100 is ignored: 0, without a gradient."""
        if torch.is_grad_enabled() and isinstance(self.lm_head, nn.Linear):  # (no adapter around it)
            return head_losses(hidden, self.lm_head.weight, targets)
        return token_losses(self.logits, self.config.vocab_size, hidden, targets)

    def new_cache(self, rows: int | None = None) -> Cache:
        """Return the cache before the first token; of `rows` rows, as tensors of zeros, where those are given (to begin
        a stream from other states than none)."""
        if rows is None:
            return Cache()
        position = torch.zeros(rows, dtype=torch.int64, device="cpu")
        return Cache([block.mixer.new_carry(rows) for block in self.layers], position)

    def refuse_own(self, ways: str) -> None:
        """Nothing is to be refused: this model's forward follows its `restart`, and `generate` its `reader`."""

    def layer_by_layer(self) -> BlockByBlock | None:
        if len(self.mixers) < len(self.layers):  # attention needs the tokens that are left out
            return None
        return BlockByBlock(self.backbone, self.config.residual_in_fp32)


Mamba2LM = LM  # its name when all layers were Mamba-2
