"""Request by request, this library's models under lm-eval say what its stock HFLM says of the same model and tokenizer:
log-likelihoods within 1e-3, the same greedy flags, the same texts. Tokenizers of several kinds are made from scratch.
"""

import logging

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="HFLM needs it")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, BambaConfig, Mamba2Config, PreTrainedTokenizerFast

from rnn_longctx import adopt, load
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness.model import HarnessLM
from rnn_longctx.models.checkpoint.save import save

TEXT = ["The grass is green. The sky is blue. The sun is yellow.", "Here we go. There and back again, user assistant"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = ["bpe", "bpe-bos", "bpe-eos", "metaspace-bos", "wordpiece", "chat", "chat-bos"]


def tokenizer_of(kind):
    """A fast tokenizer of transformers."""
    special = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = (
            normalizers.BertNormalizer(lowercase=True),
            pre_tokenizers.BertPreTokenizer(),
        )
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
    elif kind.startswith("metaspace"):
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT * 3, trainer)
    if kind.endswith("-bos"):
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if kind == "bpe-eos":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    if kind == "bpe":  # bpe-named has a BOS, and does not add it
        del named["bos_token"]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    if kind.startswith("chat"):
        fast.chat_template = CHAT
    return fast


def model_of(tokenizer, seed=0, family="mamba2"):
    """A tiny model whose likeliest tokens vary, special ones among them."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    if family == "mamba2":
        config = Mamba2Config(num_heads=4, head_dim=16, state_size=8, n_groups=1, **size, **end)
    else:
        attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
        mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
        config = BambaConfig(intermediate_size=32, **attention, **mixer, **size, **end)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.normal_(std=0.7)
    return model


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


LONG = "The grass is green. The sky is blue. " * 8
PAIRS = [
    ("The grass is", " green."), ("The grass is ", "green."), ("The sky  ", " is blue"), ("", "The sun"), ("", " sun"),
    (LONG, " we go"), (LONG, " The sun is yellow. Here we go."), ("Here we go.\n", "There"), ("user", "assistant"),
    ("<|im_start|>user\nHere we go<|im_end|>\n<|im_start|>assistant\n", "The sky<|im_end|>"), ("<s>The sun", " is"),
    ("", "<s>The sky"), ("The sky is</s>", "The sun"), ("green", "s are"),
]  # fmt: skip
WHOLE = [("The sky is blue.",), (LONG,), (" a",), ("<s>Here we go.</s>",), ("user<|im_start|>",)]
GREEDY = {"do_sample": False, "max_gen_toks": 24}
SAID = [
    (text, GREEDY | {"until": until})
    for text in (
        "The sky is",
        "Here we go. ",
        LONG,
        "<|im_start|>user\nHere<|im_end|>\n<|im_start|>assistant\n",
        "<s>a",
    )
    for until in ([], ["s"], ["<|im_end|>", "\n"], "e", ["e", " e", "<unk>"])
]


def both(kind, seed=0, family="mamba2", **settings):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer, seed, family)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=4096, **settings)
    ours = HarnessLM(adopt(model, tokenizer=tokenizer), max_length=4096, batch_size=3, segment=16, **settings)
    return ours, theirs


def same_scores(ours, theirs, pairs=PAIRS, whole=WHOLE):
    mine, reference = (lm.loglikelihood(ask("loglikelihood", *pairs)) for lm in (ours, theirs))
    assert [v for v, _ in mine] == pytest.approx([v for v, _ in reference], abs=1e-3)
    assert [g for _, g in mine] == [g for _, g in reference]
    mine, reference = (lm.loglikelihood_rolling(ask("loglikelihood_rolling", *whole)) for lm in (ours, theirs))
    assert mine == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bpe-eos"])
def test_every_request_has_the_score_and_the_text_of_hflm(kind):
    ours, theirs = both(kind)
    same_scores(ours, theirs)
    said, reference = (lm.generate_until(ask("generate_until", *SAID)) for lm in (ours, theirs))
    assert said == reference
    assert any(said)


def test_a_hybrid_has_the_scores_and_the_texts_of_hflm():
    ours, theirs = both("chat-bos", seed=1, family="bamba")
    same_scores(ours, theirs)
    said, reference = (lm.generate_until(ask("generate_until", *SAID)) for lm in (ours, theirs))
    assert said == reference


@pytest.mark.parametrize("kind", ["bpe-named", "metaspace-bos", "chat-bos"])
@pytest.mark.parametrize("switch", [None, True, False])
def test_add_bos_token_is_hflm_s_and_a_folder_is_read_as_there(kind, switch, tmp_path):
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(tmp_path)
    model = model_of(tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=str(tmp_path), device="cpu", max_length=4096, add_bos_token=switch)
    ours = HarnessLM(adopt(model, tokenizer=str(tmp_path)), add_bos_token=switch)
    same_scores(ours, theirs)
    begins = kind.endswith("-bos") if switch is None else switch
    assert (ours.tok_encode("The sun")[0] == tokenizer.bos_token_id) == begins


def test_the_ends_of_the_model_s_config_end_an_answer():
    """Several ids, as chat models have them; one that is no special token stays in the text."""
    ours, theirs = both("chat")
    (free,) = ours.generate_until(ask("generate_until", ("The sky is", GREEDY)))
    word = ours.tok_encode(free)[4]
    marker = ours.tokenizer.convert_tokens_to_ids("<|im_end|>")
    theirs.model.generation_config.eos_token_id = [ours.tokenizer.eos_token_id, marker, word]
    said, reference = (lm.generate_until(ask("generate_until", *SAID)) for lm in (ours, theirs))
    assert said == reference
    (short,) = ours.generate_until(ask("generate_until", ("The sky is", GREEDY)))
    assert free.startswith(short.rstrip("\ufffd")) and len(short) < len(free)  # (half a character may stand last)


def test_a_prefix_token_is_hflm_s():
    tokenizer = tokenizer_of("bpe-bos")
    ours, theirs = both("bpe-bos", prefix_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert ours.prefix_token_id == theirs.prefix_token_id != tokenizer.bos_token_id
    # HFLM then takes this token for BOS: a text that begins with it has no BOS (one to be continued has), and one that
    # begins with BOS has two
    said = ("<s>", "<|im_start|>")
    same_scores(ours, theirs, *([t for t in texts if not t[0].startswith(said)] for texts in (PAIRS, WHOLE)))


def test_an_end_token_behind_a_prompt_is_neither_scored_nor_read():
    """HFLM splits `<s> context </s>` from `<s> context continuation </s>`: it scores </s> for the first token."""
    ours, _ = both("bpe-eos")
    plain, _ = both("bpe-bos")  # the same tokenizer but for that token, and so the same model
    pairs = [pair for pair in PAIRS if "<" not in "".join(pair)]
    mine, right = (lm.loglikelihood(ask("loglikelihood", *pairs)) for lm in (ours, plain))
    assert mine == right
    requests = ask("generate_until", *SAID)
    assert ours.generate_until(requests) == plain.generate_until(requests)


@pytest.mark.parametrize("pair", [("the sky", "\n"), ("", "\n"), ("", "")])
def test_a_continuation_of_no_tokens_is_refused(pair):
    """It is no answer of log-likelihood 0, as sure as can be. HFLM stops at an assertion."""
    ours, _ = both("wordpiece")
    with pytest.raises(InputError, match="adds no token"):
        ours.loglikelihood(ask("loglikelihood", pair))


def test_a_context_of_spaces_alone_is_an_empty_one():
    """Its spaces belong to what is scored, every token of it. HFLM stops at an assertion."""
    ours, _ = both("bpe")
    (spaced, empty) = ours.loglikelihood(ask("loglikelihood", (" ", "the sky"), ("", " the sky")))
    assert spaced[0] == pytest.approx(empty[0], abs=1e-4) and spaced[1] == empty[1]


def test_a_split_that_moves_text_is_said(caplog):
    """ "is" and "isn" are one token each where "is" + "n" is one: what is read then is another text, as with HFLM."""
    tokenizer = tokenizer_of("bpe")
    model = adopt(model_of(tokenizer), tokenizer=tokenizer)
    ours = HarnessLM(model)
    whole, context = ours.tok_encode("The grass"), ours.tok_encode("The gr")
    assert whole[: len(context)] != context
    ours.loglikelihood(ask("loglikelihood", ("The gr", "ass is"), ("The grass", " is")))
    assert "1 of 2 requests" in caplog.text


def test_chat_markers_are_one_id_and_a_conversation_reads_as_with_hflm():
    ours, theirs = both("chat")
    history = [{"role": "user", "content": "Here we go."}]
    text = ours.apply_chat_template(history)
    assert text == theirs.apply_chat_template(history)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHAT
    ids = ours.tok_encode(text)
    assert ids == theirs.tok_encode(text)
    start, end = ours.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == 2 and ids.count(end) == 1
    assert start not in ours.model.tokenizer.encode(text)  # a raw text is still read as it is
    (said,) = ours.generate_until(ask("generate_until", (text, GREEDY)))
    assert said == theirs.generate_until(ask("generate_until", (text, GREEDY)))[0]
    silent, _ = both("bpe")
    with pytest.raises(InputError, match="no chat template"):
        silent.apply_chat_template(history)


def test_a_saved_model_reads_prompts_as_before(tmp_path):
    tokenizer = tokenizer_of("chat-bos")
    model_of(tokenizer).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    texts = [HarnessLM(load(tmp_path / folder)) for folder in ("theirs", "ours")]
    history = [{"role": "user", "content": "Here we go."}]
    first, again = ((lm.text.begin, lm.prefix_token_id, lm.apply_chat_template(history)) for lm in texts)
    assert first == again and first[0] == [tokenizer.bos_token_id]
    assert texts[0].tokenizer_name.split()[-1] == texts[1].tokenizer_name.split()[-1]


def test_a_switch_that_cannot_be_is_refused():
    tokenizer = tokenizer_of("bpe")
    model = adopt(model_of(tokenizer), tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"add_bos_token: tokenizer .* has no BOS token"):
        HarnessLM(model, add_bos_token=True)
    with pytest.raises(InputError, match="add_bos_token: expected True, False or None, got 'yes'"):
        HarnessLM(model, add_bos_token="yes")
    model.tokenizer = ByteTokenizer()
    with pytest.raises(InputError, match="tokenizer bytes has no BOS token"):
        HarnessLM(model, add_bos_token=True)
    assert HarnessLM(model, add_bos_token=False).tok_encode("ab") == [97, 98]
