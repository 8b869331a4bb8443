"""The main job on a small model: what lm and passkey mean, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import make_model, value

from rnn_longctx import evaluate
from rnn_longctx.data import ByteTokenizer, load_text, tokens
from rnn_longctx.errors import InputError
from rnn_longctx.eval import Job, Measuring, parse_task
from rnn_longctx.eval.jobs import recall
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.tables.leaderboard import leaderboard
from rnn_longctx.eval.tables.sheets import sheets
from rnn_longctx.measure.stream import stream_losses
from rnn_longctx.mitigations import REMEDIES, Plan, Remedy
from rnn_longctx.mitigations.base import same_everywhere
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.restart import Crop, Restart
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS
from rnn_longctx.tasks.passkey import Passkey, passkey_batch
from rnn_longctx.tasks.words import Words


def test_a_short_text_has_few_slices(model, text, caplog):
    """At short lengths as many as do not overlap, and a word where `slices` asks for more than that."""
    whole, lengths = load_text(text), (64, 100, 401, 2500)
    frame = evaluate(model, lengths, ["lm:slices=2"], text=text)
    for length in lengths:
        n = int(value(frame, length)["n"])
        starts = sorted(whole.start(i) for i in range(n))
        overlap = min(np.diff([*starts, starts[0] + len(whole)])) < length + 1
        assert overlap == (length == 2500) and n == max(2, whole.distinct(length + 1, 128))
    (said,) = caplog.messages
    assert said.startswith("text file:text.txt is short: of the 2 slices read it has 1 of 2500 tokens")


def test_a_line_a_task_where_there_is_no_terminal(model, text, capsys):
    task = "lm:slices=2,tokens=0"
    evaluate(model, [64], [task], ["none", "rri"], text=text)
    assert capsys.readouterr() == ("", "")
    evaluate(model, [64], [task], ["none", "rri"], text=text, progress=True)
    out, said = capsys.readouterr()
    assert not out and said.splitlines() == ["  0% none, lm", " 50% rri:alpha=0.9999,beta=0.75, lm"]


def test_several_texts_are_read_and_prompts_asked_once(model, text, unseen, tmp_path):
    """As one call a text would have it; a remedy without a loss is named once and is no error on the second text."""
    tasks, remedies = ["lm:slices=2,tokens=0", "passkey:n=2"], ["none", "decimate", "rri"]
    frame = evaluate(model, [100, 200], tasks, remedies, text=[text, unseen, text], out=str(tmp_path))
    apart = [evaluate(model, [100, 200], tasks, remedies, text=t) for t in (text, unseen)]
    losses = pd.concat(part[part.task == "lm"] for part in apart)
    place = ["text", "mitigation", "metric", "length"]
    kept = frame[frame.task == "lm"].set_index(place).sort_index().value
    assert kept.to_dict() == losses.set_index(place).sort_index().value.to_dict() and kept.index.is_unique
    assert len(frame[frame.task == "passkey"]) == len(apart[0][apart[0].task == "passkey"])
    board = leaderboard(frame)
    assert set(board.text) == {load_text(t).name for t in (text, unseen)} and set(board.passkey.dropna()) <= {0.0, 1.0}
    with pytest.raises(InputError, match="no text at nowhere"):
        evaluate(model, [100], tasks, text=[text, "nowhere"])
    for seed in (-1, "a", None):
        with pytest.raises(InputError, match="seed: expected a whole number, at least 0"):
            evaluate(model, [100], tasks, text=text, seed=seed)
    for what, wrong in (("tasks", {"tasks": 5}), ("mitigations", {"mitigations": 5})):
        with pytest.raises(InputError, match=f"{what}: expected one such as .*, or a list of them; got 5"):
            evaluate(model, [100], text=text, **wrong)
    with pytest.raises(InputError, match="expected a path, got int 5"):
        evaluate(model, [100], ["lm"], text=text, out=5)
    with pytest.raises(InputError, match="at least one text"):
        evaluate(model, [100], tasks, text=[])


@pytest.mark.gpu
def test_memory_is_a_remedys_own(text):
    """The peak of one remedy is not that of the one before it."""
    model = make_model().to("cuda")
    task = "lm:slices=2,tokens=0"
    frame = evaluate(model, [2000], [task], ["none", "window:tokens=900", "rri"], text=text)
    longest = frame[(frame.metric == "nats_per_token") & (frame.length == 2000)]  # (and its training length)
    peaks = longest.set_index("mitigation").peak_bytes
    assert peaks["rri:alpha=0.9999,beta=0.75"] < peaks["window:tokens=900"]


def test_lm_is_the_mean_over_the_second_half_of_fixed_slices(model, text):
    frame = evaluate(model, [64, 100, 401], ["lm:slices=3,tokens=1000"], text=text)
    whole = load_text(text)
    for length in (64, 100, 401):
        n = max(3, 1000 // length)
        expected = []
        for i in range(n):
            ids = torch.from_numpy(tokens(whole, ByteTokenizer(), i, length + 1)[0])[None]
            with torch.no_grad():
                losses = model.losses(model(ids[:, :-1]), ids[:, 1:])[0]
            expected.append(losses[length // 2 :].double().mean().item())
        row = value(frame, length)
        assert row.n == n and row.samples == pytest.approx(expected, abs=1e-5)
        assert row.value == pytest.approx(np.mean(expected), abs=1e-5)
        assert value(frame, length, "nats_per_byte").value == pytest.approx(row.value)
    quarter = value(frame, 64, "nats_per_token_peak")
    assert quarter.value >= value(frame, 64).value - 1e-6 and quarter.n == 15


def test_a_length_does_not_depend_on_the_others(model, text):
    alone = evaluate(model, [100], ["lm:slices=2,tokens=400"], text=text)
    among = evaluate(model, [64, 100, 256, 1000], ["lm:slices=2,tokens=400"], text=text, batch=1)
    assert value(alone, 100).samples == pytest.approx(value(among, 100).samples, abs=1e-5)


def test_several_remedies_and_the_one_already_on(model, text):
    from rnn_longctx import mitigate

    with mitigate(model, "rri:alpha=0.9,beta=0.5"):
        inside = evaluate(model, [64, 128], ["lm:slices=2,tokens=0"], text=text)
    both = evaluate(
        model,
        [64, 128],
        ["lm:slices=2,tokens=0"],
        ["none", "rri:alpha=0.9,beta=0.5", "rri:beta=0.5,alpha=0.9"],
        text=text,
    )
    assert set(both.mitigation) == {"none", "rri:alpha=0.9,beta=0.5"}
    mine = value(inside, 128, mitigation="rri:alpha=0.9,beta=0.5")
    assert mine.value == pytest.approx(value(both, 128, mitigation="rri:alpha=0.9,beta=0.5").value, abs=1e-6)
    assert mine.value != value(both, 128).value


def test_passkey_counts_exact_answers(model, monkeypatch):
    """A model that says the key of even prompts only is right half of the time, at every depth it is right at."""
    prompts = {p.ids.tobytes(): (i, p) for i, p in enumerate(passkey_batch(ByteTokenizer(), 128, 20, 0))}

    def replies(measuring, task, examples, losses):
        known = [prompts[e.prompt.tobytes()] for e in examples]
        texts = [p.answer + "." if i % 2 == 0 else "12" + p.answer for i, p in known]
        return [ByteTokenizer().encode(text) for text in texts], (0.1, 0.01)

    monkeypatch.setattr(recall, "generated", replies)
    frame = evaluate(model, [128], ["passkey:n=20"])
    whole = frame[frame.depth.isna()].iloc[0]
    assert (whole.value, whole.n) == (0.5, 20) and whole.samples == [1.0, 0.0] * 10
    depths = frame[frame.depth.notna()].set_index("depth").value
    assert list(depths.index) == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert set(depths) == {0.0, 1.0}


def answers_of(model, prompts):
    """What the model says after each prompt."""
    replies, _ = recall.generated(Measuring(model), Passkey(), [prompt.example() for prompt in prompts])
    return [ByteTokenizer().decode(reply.tolist()).strip() for reply in replies]


def test_passkey_generates_greedily_from_the_prompt(model):
    prompts = passkey_batch(ByteTokenizer(), 150, 4, 3)
    answers = answers_of(model, prompts)
    for prompt, answer in zip(prompts, answers):
        ids = torch.from_numpy(prompt.ids)[None]
        with torch.no_grad():
            for _ in range(7):  # a space, five digits and what shows that there is no sixth
                ids = torch.cat([ids, model.logits(model(ids)[:, -1:]).argmax(-1)], 1)
        assert ByteTokenizer().decode(ids[0, 150:]).strip() == answer


def test_a_passkey_is_never_said_in_rows_without_a_token():
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8, vocab_size=300, tie_embeddings=False))
    model.tokenizer = ByteTokenizer()
    with torch.no_grad():
        model.lm_head.weight[256:] *= 100
        model.lm_head.weight[:33], model.lm_head.weight[127:256] = 0, 0  # what it says begins with a letter or a sign
    prompts = passkey_batch(ByteTokenizer(), 150, 3, 3)
    answers = answers_of(model.eval(), prompts)
    with torch.no_grad():
        likeliest = [int(model.logits(model(torch.from_numpy(p.ids)[None])[0, -1])[:256].argmax()) for p in prompts]
    assert [answer[:1] for answer in answers] == [chr(token) for token in likeliest]


def test_a_remedy_that_depends_on_the_length_gets_a_pass_per_length(model, text, monkeypatch):
    class ByLength(Remedy):
        name = "by-length"
        per_length = True

        def plan(self, model, target_length=None, text=None):
            return Plan(same_everywhere(model, ScanPolicy(gain=1.0 / target_length)))

    monkeypatch.setitem(REMEDIES._known, "by-length", ByLength)
    frame = evaluate(model, [64, 128], ["lm:slices=2,tokens=0"], ["by-length"], text=text)
    for length in (64, 128):
        for mixer in model.mixers:
            mixer.policy = ScanPolicy(gain=1.0 / length)
        ids = torch.from_numpy(tokens(load_text(text), ByteTokenizer(), 0, length + 1)[0])[None]
        with torch.no_grad():
            loss = model.losses(model(ids[:, :-1]), ids[:, 1:])[0, length // 2 :].mean().item()
        assert value(frame, length, mitigation="by-length").samples[0] == pytest.approx(loss, abs=1e-5)


def test_bad_input_is_refused_before_anything_is_read(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Mamba2LM, "read", lambda *a, **k: pytest.fail("the model was read"))
    for arguments, message in [
        (([10_000], ["lm"]), "has 6000 bytes"),
        (([0], ["lm"]), "length"),
        (("64,-5", ["lm"]), "length"),
        (([64], ["ml"]), 'did you mean "lm"'),
        (([64], ["lm:slice=3"]), 'did you mean "slices"'),
        (([64], ["passkey"]), "at least"),
        (([128], ["lm"], ["state-nrm"]), 'did you mean "state-norm"'),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(model, *arguments, text=text)
    with pytest.raises(InputError, match="no text at"):
        evaluate(model, [64], ["lm"], text=str(tmp_path / "nowhere"))
    monkeypatch.undo()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        evaluate(model, [64], ["lm"], text=text, out=str(blocked / "x"))


def test_cost_columns_are_of_their_length(model, text):
    frame = evaluate(model, [64, 3000], ["lm:slices=1,tokens=0"], text=text)
    short, long = value(frame, 64), value(frame, 3000)
    assert 0 < short.seconds <= long.seconds and short.tokens_per_second == pytest.approx(64 / short.seconds)


def test_a_passkey_answer_is_read_whole(model, monkeypatch):
    """Digits may be cut into tokens anyhow; five right ones followed by a sixth are wrong."""
    right = Passkey().says
    assert right("34847 and more", "34847") and not right("348471", "34847")
    assert not right("", "34847") and not right("x34847", "34847")
    assert Words().says("apple.", "apple") and not Words().says("apples", "apple")
    asked = []

    class Pairs(ByteTokenizer):  # repeated digits are one token, others several
        def encode(self, data):
            raw = data if isinstance(data, str) else data.decode()
            return super().encode("8" if raw.strip() == "88888" else raw)

    model.tokenizer = Pairs()
    read = recall.continuation
    monkeypatch.setattr(recall, "continuation", lambda *a: (asked.append(1) or t for t in read(*a)))
    evaluate(model, [200], ["passkey:n=1"])
    assert len(asked) >= 6


def test_tasks_have_canonical_texts():
    assert str(parse_task("lm:slices=2")) == str(parse_task(str(parse_task("lm:slices=2"))))
    assert isinstance(parse_task("passkey:max=8k,n=7,least=1"), Job) and parse_task("passkey:max=8k").max == 8192
    assert set(TASKS) >= {"passkey", "multikey", "words", "mqar", "forgetting-mqar", "induction", "listops", "labelled"}
    for name, task in TASKS.items():
        text = (task.examples or (name,))[0]
        job = parse_task(text)
        assert (job.kind, job.task, parse_task(str(job))) == ("accuracy", parse(text, TASKS, "task"), job)
    assert parse_task("lm").kind == "loss"


def test_passkeys_in_another_haystack_and_wording(model, text, tmp_path):
    template = tmp_path / "plain.yaml"
    template.write_text('header: ""\nkey: "<{0}>"\nquestion: "Which?"\n')
    asked = ["passkey:n=2", f"passkey:n=2,haystack={text}", f"words:n=2,haystack={text},template={template}"]
    frame = evaluate(model, "120,150", asked, text=text, out=str(tmp_path / "r"))
    whole = frame[frame.depth.isna()]
    labels = sorted(whole.task.unique())
    assert len(whole) == 6 and labels[:2] == ["passkey", "passkey-in-text.txt"]
    assert labels[2].startswith("words-in-text.txt-as-plain-") and [s.task for s in sheets(frame)] == labels
    assert set(whole[whole.task != "passkey"].text_hash) == {load_text(text).hash}
    assert parse_task(f"multikey:haystack={text}").label == "multikey4-in-text.txt"
    for wrong, said in (("missing.yaml", "cannot read config"), (text, "is not valid YAML|expected a mapping")):
        with pytest.raises(InputError, match=said):
            parse_task(f"passkey:template={wrong}")


def test_passes_that_differ_in_length_alone_are_told_apart(model, text, unseen, capsys):
    asked = ["none", "token-filter"]
    evaluate(model, [96, 128], "lm:slices=1,tokens=0", asked, text=text, calibration_text=unseen, progress=True)
    said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().err.splitlines() if ", lm" in line]
    assert said[0] == "none, lm" and len(said) == len(set(said)) == 4
    assert [line.rpartition(", ")[2] for line in said[1:]] == ["lm at 64", "lm at 96", "lm at 128"]


def test_every_row_has_the_tokens_that_were_read(model, text, tmp_path):
    """Of each slice or prompt, whatever of it a control reads again or leaves out."""
    controls = ["none", "reset:every=64,overlap=8", "recompute:last=64"]
    frame = evaluate(model, [100, 300], ["lm:slices=2,tokens=0", "passkey:n=2"], controls, text=text, out=tmp_path)
    assert set(frame["task"]) == {"lm", "passkey"} and set(frame["mitigation"]) == set(controls)
    assert (frame["tokens_read"] == frame["length"]).all()


@pytest.mark.parametrize("control", [None, Restart(64), Restart(50, 30), Restart(32, 32), Crop(64, 8)], ids=str)
def test_losses_are_those_of_one_whole_pass(model, text, control):
    """Of the positions of each length, whatever lies between them; under a control that is not read."""
    asked, slices, read = [64, 100, 700], 3, []
    model.restart, model.train_length = control, 64
    measuring = Measuring(model, text=text, segment=150, progress=read.append)
    task = LossOverLength(slices=slices, tokens=0)
    cost, rows = task.cost(measuring, asked), list(task.run(measuring, asked))

    ids = np.stack([tokens(load_text(text), model.tokenizer, i, 701)[0] for i in range(slices)])
    with torch.inference_mode():
        losses = torch.cat([some for _, some in stream_losses(model, torch.from_numpy(ids))], 1).double()
    for n in asked:
        (row,) = (row for row in rows if row["metric"] == "nats_per_token" and row["length"] == n)
        assert row["samples"] == pytest.approx(losses[:, n // 2 : n].mean(1).tolist(), abs=1e-5)
    (peak,) = (row for row in rows if row["metric"] == "nats_per_token_peak")
    quarters = losses[:, :64].unflatten(1, (4, 16)).mean(2)
    assert peak["samples"] == pytest.approx(quarters[:, quarters.mean(0).argmax()].tolist(), abs=1e-5)

    assert sum(read) == cost
    left_out = 0 if control is None or isinstance(control, Crop) else control.block_start(351) - 100
    assert cost == slices * (700 - left_out)
