"""What a model's weights_hash stands for: the function that it computes now, and nothing else."""

import copy
import dataclasses
import time

import pytest
import torch
import transformers as hf
from adopted_families import FAMILIES, SCAN_FAMILIES, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rnn_longctx
from rnn_longctx import adopt, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint import layouts
from rnn_longctx.models.checkpoint.legacy import is_of, old_hashes
from rnn_longctx.models.hashing import BLOCK, digest
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.recurrence.ssd import SSD


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, t in tensors.items():
            self.register_buffer(name, t)


def of(*tensors):
    return digest(Holder(**{f"t{i}": t for i, t in enumerate(tensors)}))


# --- tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_any_byte_is_told(data):
    """Of tensors of odd sizes, of several blocks, of every width; whatever else they are, equal tensors are equal."""
    dtype = data.draw(st.sampled_from(DTYPES))
    size = data.draw(st.sampled_from([1, 2, 3, 7, 8, 9, 1000, BLOCK + 5, 2 * BLOCK + 1, 4 * BLOCK]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size * width,), dtype=torch.uint8)
    first, beside = of(raw.view(dtype), torch.ones(3)), torch.ones(3)
    assert first == of(raw.clone().view(dtype), beside)
    at = data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4, unique=True))
    other = raw.clone()
    other[at] ^= 1 if dtype == torch.bool else data.draw(st.integers(1, 255))
    assert of(other.view(dtype), beside) != first


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 3 * BLOCK))
def test_what_sums_could_miss(seed, size):
    """Signs turned (of two, of all); elements, blocks and tensors of a shape that change places; zeros at the end;
    another shape or type of the same bytes."""
    torch.manual_seed(seed)
    t = torch.randn(size)
    i, j = torch.randperm(size)[:2].tolist()
    flipped, swapped = t.clone(), t.clone()
    flipped[[i, j]] *= -1
    swapped[[i, j]] = t[[j, i]]
    hashes = [of(x) for x in (t, -t, flipped, torch.cat([t, torch.zeros(1)]), torch.cat([t, torch.zeros(2)]),
                              t[None], t.view(torch.int32))]  # fmt: skip
    assert len(set(hashes)) == 7 and of(swapped) != hashes[0]
    a, b, other = torch.randn(2 * BLOCK), torch.randn(2 * BLOCK), torch.randn(size)
    assert len({of(torch.cat([a, b]), other), of(torch.cat([b, a]), other), of(torch.cat([b, a, other]))}) == 3
    assert len({of(t, other), of(other, t), of(t, t), of(other, other)}) == 4


def test_strides_threads_and_where_a_tensor_begins():
    t = torch.randn(300, 700)
    row = torch.randn(300 * 700 + 1)
    row[1:] = t.flatten()  # begins at an odd 4 bytes
    assert len({of(t), of(t.t().contiguous().t()), of(row[1:].view(300, 700)), of(t.repeat(1, 2)[:, :700])}) == 1
    first = of(t)
    try:
        torch.set_num_threads(3)
        assert of(t) == first
    finally:
        torch.set_num_threads(1)
    with torch.inference_mode():
        assert of(t) == first


def test_a_digest_never_changes_with_a_version():
    """A number to compare with: files hold digests."""
    t = torch.arange(3 * BLOCK, dtype=torch.int32)
    assert of(t, t[:5].to(torch.float32), torch.tensor(True)) == "9decce939f4279d5"


# --- this library's models


def test_the_same_in_every_layout_tied_or_not(make, tmp_path):
    for tie in (True, False):
        model = make(tie_embeddings=tie, norm_eps=1e-5, dt_limit=(0.01, 0.5))
        found = {model.weights_hash, copy.deepcopy(model).weights_hash}
        for layout in layouts.LAYOUTS:
            checkpoint.save(model, tmp_path / f"{layout}{tie}", layout=layout)
            found.add(checkpoint.load(tmp_path / f"{layout}{tie}").weights_hash)
        assert len(found) == 1
    with mitigate(model, "rri"):
        assert {model.weights_hash} == found
    model.train_length, model.name, model.provenance = 7, "another", {"a": 1}
    model.train().use_state_dtype("bfloat16")
    assert {model.weights_hash} == found


def eps(model):
    model.backbone.norm_f.eps = 0.3


def mixers_eps(model):
    model.mixers[1].norm.eps = 0.3


def limit(model):
    model.mixers[0].config = dataclasses.replace(model.config, dt_limit=(0.0, 0.01))


def residual(model):
    model.config.residual_in_fp32 = False


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)


def optimizer(model):
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model.losses(model(torch.arange(20)[None]), torch.arange(1, 21)[None]).sum().backward()
    step.step()


def data(model):
    model.backbone.norm_f.weight.data.mul_(0.1)


EDITS = [eps, mixers_eps, limit, residual, untied, optimizer, data]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_told(make, edit):
    model = make()
    first = model.weights_hash
    edit(model)
    assert len({first, model.weights_hash}) == 2


def test_eps_of_a_norm_is_one_everywhere(make, monkeypatch):
    """What the digest takes from the norm is what every way to read it takes."""
    model = make(ngroups=1)
    model.mixers[0].norm.eps = 0.25
    held = []
    monkeypatch.setattr("rnn_longctx.models.mixers.base.DeferredNorm", lambda *parts: held.append(parts) or parts[0])

    class Gate:
        squares = torch.ones(1, 3, 1)

    monkeypatch.setattr(model.mixers[0].norm, "gate", lambda z: Gate())
    scan = SSD.scan
    monkeypatch.setattr(SSD, "scan", lambda *a, output_gate, **k: scan(*a, output_gate=None, **k))
    with torch.no_grad():
        model.mixers[0](torch.randn(1, 3, 24), None, WHOLE)
    assert held[0][3] == 0.25


def test_hashes_of_before(make, tmp_path):
    """Of a file that an older version wrote: taken where the weights are what they were."""
    model = make()
    before = next(old_hashes(model))
    assert is_of(before, model) and is_of(model.weights_hash, model) and before != model.weights_hash
    data(model)
    assert not is_of(before, model)
    stored = rnn_longctx.load("demo-long").provenance["init"]["weights"]  # of a file in bfloat16
    demo = rnn_longctx.load("demo")
    assert stored in old_hashes(demo) and stored == "35bd0fb23d85e021"
    demo.mixers[0].A_log.data[3] += 1e-6
    assert stored not in old_hashes(demo)


# --- models of other libraries


def test_adopted_twice_and_while_it_is_used(family, tmp_path):
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    model.save_pretrained(tmp_path)
    first, second = (adopt(hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()) for _ in range(2))
    expected = adopt(model).weights_hash
    assert first.weights_hash == second.weights_hash == expected
    with torch.no_grad(), mitigate(first, "rri"):
        cache = first.new_cache()
        first(random_ids(), cache)
        first.model.generate(random_ids(), max_new_tokens=2)
        assert first.weights_hash == expected
    first.model.train()
    first.model.config.use_cache, first.model.config._name_or_path = False, "elsewhere"
    assert first.weights_hash == expected
    adopt(first, time_step_limit_in_decode=True)
    assert (first.weights_hash != expected) == (family in SCAN_FAMILIES)  # (others have no steps)


def of_config(name, value):
    def change(model):
        setattr(model.config, name, value)

    return change


def of_modules(name, value):
    def change(model):
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)

    return change


CHANGES = {
    "mamba2": [of_modules("time_step_limit", (0.0, 0.1)), of_modules("variance_epsilon", 0.3),
               of_modules("residual_in_fp32", False)],
    "falcon_h1": [of_config("lm_head_multiplier", 0.7), of_modules("ssm_out_multiplier", 0.3),
                  of_modules("mup_vector", torch.ones(1, 1, 168))],
    "granitemoehybrid": [of_config("logits_scaling", 5.0), of_modules("residual_multiplier", 0.1)],
    "bamba": [of_modules("scaling", 0.01), of_modules("inv_freq", torch.ones(4)),
              of_modules("act", nn.GELU())],
}  # fmt: skip


@pytest.mark.parametrize(("family_name", "number"), [(f, i) for f, some in CHANGES.items() for i in range(len(some))])
@torch.no_grad()
def test_what_enters_a_forward_pass_is_told(family_name, number):
    adopted = adopt(hf.AutoModelForCausalLM.from_config(FAMILIES[family_name]()).eval())
    first, before = adopted.weights_hash, adopted.logits(adopted(random_ids().clamp(max=50)))
    CHANGES[family_name][number](adopted.model)
    assert adopted.weights_hash != first
    again = adopted.weights_hash
    assert again == adopted.weights_hash and before.isfinite().all()


class Adapted(nn.Linear):
    """As peft's layers: an adapter beside the weight, plain attributes that switch and scale it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.base_layer = base.weight, base
        self.lora_A = nn.ModuleDict({n: nn.Linear(base.in_features, 2, bias=False) for n in "ab"})
        self.scaling, self._active_adapter, self._disable_adapters = {"a": 1.0, "b": 1.0}, ["a"], False
        self.merged_adapters = []


def test_adapters_that_are_switched():
    model = hf.AutoModelForCausalLM.from_config(FAMILIES["mamba2"]()).eval()
    for mixer in model.backbone.layers:
        mixer.mixer.in_proj = Adapted(mixer.mixer.in_proj)
    adopted, found = adopt(model), []
    layer = model.backbone.layers[0].mixer.in_proj
    for name, value in (("_disable_adapters", True), ("_active_adapter", ["b"]), ("scaling", {"a": 2.0, "b": 1.0}),
                        ("merged_adapters", ["a"])):  # fmt: skip
        found.append(adopted.weights_hash)
        before = getattr(layer, name)
        setattr(layer, name, value)
        assert adopted.weights_hash not in found
        setattr(layer, name, before)
    assert len(set(found)) == 1


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = hf.AutoModelForCausalLM.from_config(FAMILIES["mamba2"]()).eval()
    plain = digest(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)).eval()
    wrapped.add_adapter("other", peft.LoraConfig(target_modules=["in_proj"], lora_alpha=3, init_lora_weights=False))
    wrapped.set_adapter("default")  # (peft names it as a word at first, and as a list of one from then on)
    on = digest(wrapped)
    with wrapped.disable_adapter():
        off = digest(wrapped)
    assert digest(wrapped) == on
    wrapped.set_adapter("other")
    other = digest(wrapped)
    wrapped.set_adapter("default")
    assert digest(wrapped) == on
    wrapped.merge_adapter()
    assert len({plain, on, off, other, digest(wrapped)}) == 5
    wrapped.unmerge_adapter()


# --- what it costs


def seconds(run, times):
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def test_on_a_cpu_it_is_little_of_an_evaluation():
    """Asked once, however many cells there are: about 3 ms of the demo on one core, where an ordinary evaluation of the
    shortest length takes seconds."""
    demo, asked = rnn_longctx.load("demo"), []
    demo.calibration = None

    class Counted(type(demo)):
        weights_hash = property(lambda self: asked.append(1) or type(demo).weights_hash.fget(self))

    model = rnn_longctx.load("demo")
    model.__class__ = Counted
    rnn_longctx.evaluate(model, ["256", "512"], ["lm:slices=1,tokens=0"], ["none", "rri"])
    assert len(asked) == 1
    assert seconds(lambda: demo.weights_hash, 5) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_370m_parameters_take_less_than_50_ms():
    """Measured with its copy to the host; and it is what a CPU says."""
    model = Mamba2LM(Mamba2Config(d_model=1024, n_layer=48, vocab_size=50288)).eval()
    expected = model.weights_hash
    model.cuda()
    assert model.weights_hash == expected
    taken = seconds(lambda: model.weights_hash, 10)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters: {1e3 * taken:.1f} ms")
    assert taken < 0.05


@pytest.mark.parametrize("family_name", ["mamba2", "bamba", "zamba2"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_leaves_only_notes_on_a_model_is_not_told(family_name, tmp_path):
    """Compiling, calling, saving, gradient checkpointing and capturing leave notes on a module, and no other one."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family_name]()).eval()
    ids, ours = random_ids(1, 12), adopt(model)
    before = ours.weights_hash
    torch.compile(model, backend="eager")
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert ours.weights_hash == before
    model.config.output_hidden_states, model.config.use_cache = True, False
    model(ids)
    rnn_longctx.generate(ours, ids, 2)
    model.generate(ids, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    assert ours.weights_hash == before
    assert adopt(hf.AutoModelForCausalLM.from_pretrained(tmp_path)).weights_hash == before
