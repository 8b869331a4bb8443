"""What every remedy is held to, on small models of every kind, on the CPU.

    from rnn_longctx.testing.remedies import check_remedy
    check_remedy("forget-faster:factor=1.5")  # registered before, as by rnn_longctx.register

A check raises AssertionError with a line that says what does not hold. Nothing here needs pytest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, Remedy, active, mitigate, parse_remedy
from rnn_longctx.mitigations.base import REMEDIES
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.policy import PLAIN

TRAIN_LENGTH, TARGET_LENGTH = 32, 72  # tokens
ALPHABET = "abcdefghijklmnopqrstuvwxyz "  # of the text that is calibrated on


def check_remedy(text: str, seed: int = 0, kinds: Iterable[str] | None = None) -> None:
    """Hold a remedy, as `name:key=value,...`, to everything, on models of all kinds (`KINDS`) or of some. It must be
    applicable to one of them."""
    check_text(text)
    applicable = False
    for kind in KINDS if kinds is None else kinds:
        model = KINDS[kind](seed)
        if is_applicable(text, model):
            applicable = True
            check_on_and_off(text, model, seed)
            check_cuts(text, model, seed)
    assert applicable, f"{text} is applicable to no kind of model, so that nothing was checked"


def examples(kind: type[Remedy]) -> list[str]:
    """Return the settings of a remedy that it is held to: the usual ones and its own examples; its bare name where it
    has neither."""
    return list(dict.fromkeys((*kind.usual(TRAIN_LENGTH), *kind.examples))) or [kind.name]


def check_text(text: str) -> None:
    """The canonical text of a remedy reads back as the same remedy, and its class is found by its name."""
    remedy = parse_remedy(text)
    canonical = str(remedy)
    again = parse_remedy(canonical)
    assert again == remedy, f"{canonical} reads back as {again!r}, not as {remedy!r}"
    assert str(again) == canonical, f"{canonical} reads back as {again}"
    assert hash(again) == hash(remedy), f"{canonical} has another hash when it is read back: is it a frozen dataclass?"
    for single in remedy.parts:
        assert REMEDIES[single.name] is type(single), f"{single.name} is another class in the registry"
        try:
            parse_remedy(f"{single.name}:no_such_parameter=1")
        except InputError:
            continue
        raise AssertionError(f"{single.name} takes a parameter that it does not have")


def is_applicable(text: str, model: LanguageModel) -> bool:
    """Return whether a remedy can be put on a model; where it cannot, NotApplicable must say why, on one line."""
    try:
        _on(text, model).remove()
    except NotApplicable as error:
        reason = str(error)
        names = tuple(single.name for single in parse_remedy(text).parts)
        assert reason.startswith(names), f"the reason does not begin with the remedy's name: {reason}"
        assert "\n" not in reason, f"the reason takes several lines: {reason}"
        assert active(model) == ("none", None), f"{text} is not applicable to {model.name}, and is on it"
        return False
    return True


def check_on_and_off(text: str, model: LanguageModel, seed: int = 0) -> None:
    """A model reads bit for bit as before once the remedy is off, on again as it did under it, and is worked out alike
    twice."""
    ids = _ids(model, seed, rows=2)
    before = _read(model, ids)
    handle = _on(text, model)
    under, on = _read(model, ids), active(model)[0]
    assert on == str(handle.remedy) or not handle.remedy.parts, f"{text} is on, and the model says {on}"
    handle.remove()
    assert active(model) == ("none", None), f"{text} is off, and the model says {active(model)}"
    assert all(mixer.policy == PLAIN for mixer in model.mixers), f"{text} is off, and leaves a policy behind"
    assert model.restart is None and model.reader is None, f"{text} is off, and leaves a way to read behind"
    assert all(layer.yarn is None for layer in model.rotary), f"{text} is off, and leaves scaled positions behind"
    assert torch.equal(_read(model, ids), before), f"{text} is off, and {model.name} reads otherwise than before"
    handle.put()
    assert torch.equal(_read(model, ids), under), f"{text} is on again, and {model.name} reads otherwise than under it"
    handle.remove()
    with _on(text, model) as other:
        policies, expected = other.plan.policies, handle.plan.policies
        assert policies == expected, f"{text} is worked out otherwise the second time"
        assert len(policies) == len(model.mixers), (
            f"{text} gives {len(policies)} policies to {len(model.mixers)} layers"
        )


def check_cuts(text: str, model: LanguageModel, seed: int = 0) -> None:
    """How a stream is cut into calls changes nothing but rounding."""
    draw = random.Random(seed)
    ids = _ids(model, seed, rows=2)
    close = 1e-5 if model.own_forward else 1e-8  # (parts of transformers compute in float32 whatever the model is in)
    with _on(text, model):
        whole = _read(model, ids)
        for _ in range(2):
            cuts = sorted(draw.sample(range(1, TARGET_LENGTH), draw.randint(1, 5)))
            read = _read(model, ids, [0, *cuts, TARGET_LENGTH])
            off = float((read - whole).abs().max())
            assert off <= close, f"{text}: a stream of {model.name} cut at {cuts} is off by {off:.1e}"


@torch.no_grad()
def _read(model: LanguageModel, ids: Tensor, cuts: list[int] | None = None) -> Tensor:
    """Return the logits of a stream that is read in pieces, all at once without `cuts`; for one that reads prompts in a
    way of its own, the logits after the last token, from segments as long as the first piece."""
    cuts = cuts or [0, ids.shape[1]]
    if model.reader is not None:
        return prefill(model, ids, segment=cuts[1])[0]
    cache = model.new_cache()
    return torch.cat([model.logits(model(ids[:, a:b], cache)) for a, b in zip(cuts, cuts[1:])], 1)


def _on(text: str, model: LanguageModel) -> Any:
    return mitigate(model, text, target_length=TARGET_LENGTH, text=calibration_text())


def _ids(model: LanguageModel, seed: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, min(256, model.vocab_size), (rows, TARGET_LENGTH), generator=generator)


def calibration_text() -> Text:
    """Return a text of random letters, for remedies that are calibrated."""
    letters = random.Random(1).choices(ALPHABET, k=8000)
    return Text("letters", "".join(letters).encode())


# --- models, of every kind that there is


def own_model(seed: int = 0) -> LanguageModel:
    """Return a model of this library, of 3 Mamba-2 layers, some of whose heads hardly forget, in float64."""
    return _own(
        Mamba2Config(d_model=32, n_layer=3, headdim=16, d_state=8, A_init=(1e-3, 1.0), A_log_uniform=True), seed
    )


def model_of(mixer: str | list[str], seed: int = 0) -> LanguageModel:
    """Return a model of this library, of 2 layers of other mixers, as `name:key=value`, in float64."""
    return _own(ModelConfig(mixer, d_model=32, n_layer=2, vocab_size=256), seed)


def _own(config: Any, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    model = LM(config).double().eval()
    model.name, model.train_length, model.tokenizer = "own", TRAIN_LENGTH, ByteTokenizer()
    return model


def adopted_model(family: str, seed: int = 0, **sizes: Any) -> LanguageModel:
    """Return a model of transformers, adopted, in float64; family and sizes: of its config."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(vocab_size=256, pad_token_id=0, eos_token_id=None, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    return adopt(theirs, name=family, tokenizer=ByteTokenizer(), train_length=TRAIN_LENGTH)


_MAMBA2 = {
    "hidden_size": 32,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 1,
    "num_hidden_layers": 2,
    "chunk_size": 8,
}
_MAMBA1 = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
_BAMBA = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
}

KINDS: dict[str, Callable[[int], LanguageModel]] = {
    "own": own_model,
    "given gates": lambda seed: model_of("gla:heads=2", seed),
    "delta rule": lambda seed: model_of("rwkv7:headdim=16", seed),
    "attention alone": lambda seed: model_of("sliding-window:heads=2,window=16", seed),
    "full attention": lambda seed: model_of("full-attention:heads=2", seed),
    "adopted Mamba-2": lambda seed: adopted_model("Mamba2", seed, **_MAMBA2),
    "adopted Mamba-1": lambda seed: adopted_model("Mamba", seed, **_MAMBA1),
    "hybrid": lambda seed: adopted_model("Bamba", seed, **_BAMBA),
}
