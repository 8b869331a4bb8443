"""What a model says after prompts, and whether that is right: saying it and judging it in one pass agree."""

import numpy as np
import torch

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.measure.answers import begins_with, would_say
from rnn_longctx.models.generate import generate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


def model_and_prompts():
    torch.set_num_threads(1)
    lm = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).double()
    torch.nn.init.normal_(lm.lm_head.weight)  # likeliest tokens that differ
    return lm, torch.randint(256, (3, 40))


def test_a_model_would_say_what_it_says():
    lm, prompts = model_and_prompts()
    said = generate(lm, prompts, 6).numpy()
    replies = [said[0], said[1][:3], said[2].copy()]  # whole, shorter, and wrong at its last token
    replies[2][-1] ^= 1
    for segment in (4096, 7):
        assert would_say(lm, prompts, replies, ByteTokenizer(), segment).tolist() == [True, True, False]


def test_rows_that_stand_for_no_token_are_never_said():
    lm, prompts = model_and_prompts()
    with torch.no_grad():
        lm.lm_head.weight[200:] = 0
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 200  # type: ignore[misc]
    tokenizer.eos_id = None  # (the rest of an answer that says it is padded, whatever the model would say)
    lm.tokenizer = tokenizer
    said = generate(lm, prompts, 4).numpy()
    assert int(said.max()) < 200 and would_say(lm, prompts, list(said), tokenizer).all()
    assert not would_say(lm, prompts, [np.full(4, 220)] * 3, tokenizer).any()


def test_an_answer_is_the_digits_that_a_text_begins_with():
    assert begins_with(" 12345. And more", "12345") and begins_with("12345", "12345")
    for text in ("123456", "1234", "it is 12345", "", "12346"):
        assert not begins_with(text, "12345")
    assert begins_with("apple, pear", "apple", r"\w") and not begins_with("apples", "apple", r"\w")
