"""Several keys, and words that are counted."""

import pytest
from made_prompts import multikey_batch, words_batch

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError


def test_more_keys_and_words():
    tokenizer = ByteTokenizer()
    for prompt in multikey_batch(tokenizer, 900, 12, seed=3, keys=4):
        text = tokenizer.decode(prompt.ids.tolist())
        assert len(prompt.ids) == 900 and text.count("Remember it.") == 4 and text.count(prompt.answer) == 2
        label = text.rpartition("The ")[2].split()[0]
        assert f"The {label} passkey is {prompt.answer}." in text[prompt.position :]
        assert text[prompt.position :].startswith(f"\nThe {label} passkey")
    for prompt in words_batch(tokenizer, 1500, 5, seed=3):
        text = tokenizer.decode(prompt.ids.tolist())
        assert len(prompt.ids) == 1500 and f"The secret word is {prompt.answer}." in text[prompt.position :]
    with pytest.raises(InputError, match="takes at least"):
        multikey_batch(tokenizer, 200, 1, seed=0)
    with pytest.raises(InputError, match="2 to 8 keys"):
        multikey_batch(tokenizer, 2000, 1, seed=0, keys=9)
