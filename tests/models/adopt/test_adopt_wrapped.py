"""Models inside other models: our reading equals the wrapper's own forward, or adopt refuses in one line."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from adopted_families import FAMILIES, NEAR, RRI, own_logits, random_ids, read_as_its_own, streamed
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rnn_longctx
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import active, handles_on, mitigate
from rnn_longctx.models.adopt.adopting import adopt, adopted
from rnn_longctx.models.generate import generate

pytestmark = pytest.mark.usefixtures("eager")


class Scale(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def _parametrized(model):
    for m in list(model.modules()):
        if hasattr(m, "A_log"):
            nn.utils.parametrize.register_parametrization(m.in_proj, "weight", Scale())
            nn.utils.parametrize.register_parametrization(m, "A_log", Scale())
    return model


def _weight_norm(model):
    for m in list(model.modules()):
        if hasattr(m, "A_log"):
            nn.utils.parametrizations.weight_norm(m.in_proj)
            nn.utils.parametrizations.weight_norm(m.conv1d)
    return model


def _compiled_mixers(model):
    for block in model.base_model.layers:
        for name, m in list(block.named_children()):
            if hasattr(m, "A_log"):
                setattr(block, name, torch.compile(m, backend="eager"))
    return model


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model


def _prepared(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True).prepare(model)


def _dispatched(model):
    return pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, main_device="cpu")


def _data_parallel(model):
    if torch.cuda.is_available():
        pytest.skip("it takes the model to a GPU, and the test reads on the CPU")
    return nn.DataParallel(model)


PASS_ON = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled in place": _compiled_in_place,
    "compiled mixers": _compiled_mixers,
    "DataParallel": _data_parallel,
    "AveragedModel": AveragedModel,
    "Sequential": nn.Sequential,
    "several": lambda m: nn.Sequential(_data_parallel(torch.compile(m, backend="eager"))),
    "parametrized": _parametrized,
    "weight norm": _weight_norm,
    "accelerate's prepare": _prepared,
    "accelerate's dispatch_model": _dispatched,
}


@pytest.mark.parametrize("wrap", PASS_ON.values(), ids=PASS_ON.keys())
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_what_passes_everything_on_is_read_as_its_own_forward(build, family, wrap):
    ours = read_as_its_own(wrap(build(family)))
    assert isinstance(ours.model, hf.PreTrainedModel) and adopt(ours.model) is ours


@pytest.mark.slow
def test_compiled_and_run_so(build):
    with torch.compiler.set_stance("default"):
        read_as_its_own(torch.compile(build("mamba"), backend="eager"))


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(build, one_rank):
    read_as_its_own(nn.parallel.DistributedDataParallel(build("bamba")))


def test_weights_over_ranks_are_refused(build, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(build("mamba2"), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="spread over ranks"):
        adopt(model)


def test_adopted_first_and_wrapped_afterwards(build):
    model = build("bamba")
    ours = adopt(model)
    wrapped = AveragedModel(nn.Sequential(torch.compile(model, backend="eager")))  # which makes a copy
    assert adopted(wrapped) is not ours and adopted(wrapped).model is not model
    assert adopt(nn.Sequential(model)) is ours and adopted(nn.Sequential(model)) is ours
    read_as_its_own(wrapped)
    read_as_its_own(nn.Sequential(model))


def test_a_text_model_inside_another(build):
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )

    def made(family):
        config = hf.LlavaConfig(vision_config=vision, text_config=FAMILIES[family](), image_token_index=96)
        return hf.LlavaForConditionalGeneration(config).eval()

    model = made("bamba")
    nn.init.normal_(model.lm_head.weight)
    read_as_its_own(model)
    # FalconH1 multiplies its logits, and Llava around it does not
    with pytest.raises(InputError, match=r"scales its logits.* read with its own forward"):
        generate(made("falcon_h1"), random_ids(), 2)


@torch.no_grad()
def test_without_a_head(build):
    model, ids = build("bamba").base_model, random_ids(2, 14)
    ours, before = adopt(model), model(ids).last_hidden_state
    torch.testing.assert_close(torch.cat([*ours.stream(ids, segment=5)], 1), before, **NEAR)
    with pytest.raises(InputError, match="no head for logits"):
        generate(model, ids, 2)
    classes = hf.JambaForSequenceClassification(FAMILIES["jamba"]()).eval()
    plain = classes(ids).logits
    with mitigate(classes, RRI):
        assert (classes(ids).logits - plain).abs().max() > 0
    with pytest.raises(InputError, match="no head for logits"):
        generate(classes, ids, 2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_half_precision_and_autocast(build, family):
    model, ids = build(family), random_ids(2, 14)
    ours = adopt(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours.logits(ours(ids)), model(ids, use_cache=False).logits.float(), rtol=0, atol=0)
    model.bfloat16()
    torch.testing.assert_close(ours.logits(ours(ids)), model(ids, use_cache=False).logits.float(), rtol=0, atol=0)


class Wrap(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.m = model

    def forward(self, ids):
        return self.m(ids).logits


class ValueHead(nn.Module):  # as trl's
    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.v_head = model, nn.Linear(32, 1)

    def forward(self, ids):
        out = self.pretrained_model(ids, output_hidden_states=True)
        return out.logits, None, self.v_head(out.hidden_states[-1])


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(Wrap, "m"), (ValueHead, "pretrained_model"), (lambda m: nn.Sequential(m, nn.Identity()), "0"),
     (lambda m: nn.ModuleList([m]), "0"), (lambda m: Wrap(Wrap(m)), "m.m")],
    ids=["module", "value head", "sequence", "list", "twice"],
)  # fmt: skip
def test_wrappers_that_are_not_known_are_refused(build, wrap, inside):
    model = wrap(build("mamba2"))
    for call in (lambda: adopt(model), lambda: mitigate(model, RRI), lambda: generate(model, random_ids(), 2),
                 lambda: rnn_longctx.evaluate(model, 8)):  # fmt: skip
        with pytest.raises(InputError, match=rf"give the model inside it, MODEL\.{inside}$"):
            call()
    assert active(model)[0] == "none"
    read_as_its_own(model.get_submodule(inside))


def test_what_is_no_module_but_holds_one(build):
    class Pipeline:
        model = build("mamba2")

    with pytest.raises(InputError, match=r"expected a model, got Pipeline .*: give the model inside it, its \.model"):
        adopt(Pipeline())


class Doubled(hf.Mamba2ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def _doubled(model):
    model.__class__ = Doubled
    return model


def _replaced(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def _mixed(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    accelerate.state.AcceleratorState._reset_state(True)
    return prepared


class Alone(nn.Module):
    """A model of another's own, of transformers' mixers."""

    def __init__(self, model):
        super().__init__()
        self.embed, self.layers = model.backbone.embeddings, model.backbone.layers

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.layers:
            h = block(h)
        return (h,)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "why"),
    [(_doubled, "has a forward of its own"), (_replaced, "was replaced"), (_mixed, "keep_fp32_wrapper=False"),
     (Alone, "no MambaLMHeadModel, nor a model of transformers")],
)  # fmt: skip
def test_another_forward_takes_remedies_and_is_not_read(build, change, why):
    """Our reading knows nothing of what it does, whether it was adopted before or afterwards."""
    model, ids = build("mamba2"), random_ids(2, 14)
    adopt(model)
    model = change(model)
    before = own_logits(model, ids)
    with mitigate(model, RRI):
        assert (own_logits(model, ids) - before).abs().max() > 1e-5
    assert torch.equal(own_logits(model, ids), before)
    with pytest.raises(InputError, match=f"{why}.*read with its own forward"):
        generate(model, ids, 2)


def test_a_layer_that_is_there_twice_is_refused(build):
    model = build("mamba2")
    model.other = build("mamba2")
    with pytest.raises(InputError, match=r"more than once .*: an adapter that keeps a copy"):
        adopt(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_copied_and_pickled_with_what_is_on_it(build, family):
    model, ids = build(family), random_ids(2, 14)
    before = own_logits(model, ids)
    with mitigate(model, RRI):
        changed = own_logits(model, ids)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(nn.Sequential(model))]
        for twin in twins:
            assert adopted(twin).model is not model and torch.equal(own_logits(twin, ids), changed)
            torch.testing.assert_close(streamed(adopted(twin), ids, [5, 9])[0], changed, **NEAR)
            for handle in handles_on(twin):
                handle.remove()
            assert torch.equal(own_logits(twin, ids), before)
        assert torch.equal(own_logits(model, ids), changed)
    plain = pickle.loads(pickle.dumps(model))
    read_as_its_own(plain)


def test_gradient_checkpointing(build):
    model, ids = build("bamba"), random_ids(2, 14)
    model.gradient_checkpointing_enable()
    read_as_its_own(model)
    model.train()
    expected = adopt(build("bamba"))  # another, only to be read in the same way
    assert generate(expected, ids, 2).shape == generate(model, ids, 2).shape == (2, 2) and model.training
    ours = adopt(model)
    with pytest.raises(InputError, match="keeps no cache where gradient checkpointing is on"):
        ours(ids)


@torch.no_grad()
def test_a_wrapper_of_our_own_model(make):
    own, ids = make(), torch.randint(61, (2, 30))
    before = own.weights_hash
    for wrapped in (torch.compile(own, backend="eager"), AveragedModel(own), nn.Sequential(nn.Sequential(own))):
        inner = wrapped.module if isinstance(wrapped, AveragedModel) else own
        with mitigate(wrapped, "recompute:last=8"):
            assert active(inner)[0] == active(wrapped)[0] == "recompute:last=8"
            expected = generate(inner, ids, 5)
            assert torch.equal(generate(wrapped, ids, 5), expected)
        assert active(inner)[0] == "none" and inner.restart is None
    with pytest.raises(InputError, match=r"MODEL\.m$"):
        generate(Wrap(own), ids, 2)
    assert own.weights_hash == before
