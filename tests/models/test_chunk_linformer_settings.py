"""The mixer of Linformer over chunks: settings that do not fit, and the operations that it counts."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM

WIDTH = 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk-linformer:chunk=1", "a chunk of at least 2 tokens.*got chunk = 1"),
        ("chunk-linformer:rank=0", "a rank from 1 to the chunk.*rank = 0"),
        ("chunk-linformer:chunk=4,rank=5", "a rank from 1 to the chunk.*chunk = 4, rank = 5"),
        ("chunk-linformer:heads=16", "does not divide into 16 heads of even size"),
        ("linformer", "no causal form: for language take the mixer chunk-linformer"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 7, 30])
def test_operations_are_those_of_the_products(length):
    """Two for each multiplication and addition; keys that are masked are not counted."""
    d, heads, chunk, rank = 16, 2, 7, 3
    spec = f"chunk-linformer:chunk={chunk},rank={rank},heads={heads}"
    mixer = LM(ModelConfig(spec, d_model=d, n_layer=1)).layers[0].mixer
    pairs = heads * sum(t % chunk + 1 + rank * (t // chunk) for t in range(length))
    assert mixer.pairs(length) == pairs
    maps = 2 * 2 * rank * chunk * d * (length // chunk)  # of keys and of values
    assert mixer.operations(length) == 2 * 4 * d * d * length + 2 * 2 * d // heads * pairs + maps
