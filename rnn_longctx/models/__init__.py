"""Models behind one layer interface: `model.mixers`, each with a `policy` and a carry that lives in the cache."""

from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import Reader
from rnn_longctx.models.lm import LM, Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.restart import Restart

__all__ = ["LM", "Cache", "Carry", "Mamba2Config", "Mamba2LM", "Reader", "Restart"]
