"""What a person should do, in plain words: which remedy, how sure that is, the lines that use it, or the next step."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.pilot.findings import (
    ALIKE,
    Comparison,
    Row,
    above_without_document,
    alike,
    collapse,
    comparison,
    most_read,
    ranked,
    reason,
)
from rnn_longctx.eval.stats import Interval, wilson

FAR_ENOUGH = 64  # training lengths: the demo collapses at 32 to 128 of its own, by the text
Kind = Literal["none needed", "remedy", "last tokens", "insufficient", "undecided"]


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        kind: "none needed": the model does not collapse; "last tokens": nothing gains over reading the last tokens
            alone; "insufficient": no remedy holds the loss; "undecided": too little was measured.
        remedy: to be put on, or None.
        words, uncertainty: sentences.
        python, command: lines that use it; next_steps: (what, command), where no remedy suffices.
    """

    kind: Kind
    remedy: str | None
    words: list[str]
    uncertainty: list[str] = field(default_factory=list)
    python: str = ""
    command: str = ""
    next_steps: list[tuple[str, str]] = field(default_factory=list)


def recommend(frame: pd.DataFrame, about: dict[str, Any]) -> Recommendation:
    """Return the recommendation that a table carries.

    Args: about: model and text (as they were named), options (words that name the model, each option and its value),
        tokenizer (what names it), train_length, given_train_length, adopted (of another library), foldable and
        per_length: names of remedies; processor: as in `comparison`.
    """
    fall, compared = collapse(frame), comparison(most_read(frame), processor=about.get("processor"))
    longest = max((row["length"] for row in fall["lengths"]), default=0)
    if not fall["lengths"] or longest <= about["train_length"]:
        return Recommendation("undecided", None, ["Too little was measured to say anything: give a larger budget."])
    if compared is None or compared.against is None:
        return _without_comparison(fall)
    best = ranked(compared)
    advice = _of_comparison(fall, compared, best, about)
    for task, gain in above_without_document(frame, advice.remedy or "none").items():
        advice.words.append(_document_words(task, gain))
    if best:
        advice.uncertainty.extend(_elsewhere(frame, best[0], about.get("processor")))
    if fall["length"] is not None and compared.length < fall["length"]:
        at = format_length(compared.length)
        advice.uncertainty.append(
            f"Remedies were compared up to {at} only, before the model collapses: name more time."
        )
    return advice


def _of_comparison(
    fall: dict[str, Any], compared: Comparison, best: list[Row], about: dict[str, Any]
) -> Recommendation:
    bare = compared.row("none")
    assert bare is not None
    if fall["length"] is None and not _worth_it(best, bare):
        return _none_needed(fall, compared, about)
    if not best:
        return _insufficient(fall, compared, None, about)
    if fall["length"] is not None and compared.length < fall["length"] and not _worth_it(best, bare):
        return _without_comparison(fall)  # where nothing fails yet, nothing can be told apart
    chosen = best[0]
    surely_lower = chosen.saved is not None and (chosen.saved.low > 0 or not math.isfinite(bare.loss))
    if not chosen.holds or chosen.fails_at is not None or not (surely_lower or chosen.loss < bare.loss):
        return _insufficient(fall, compared, chosen, about)
    return _remedy(fall, compared, best, about) if _beats(chosen) else _last_tokens(fall, compared, chosen, about)


def _elsewhere(frame: pd.DataFrame, chosen: Row, processor: dict[str, float] | None) -> list[str]:
    """Return a doubt where a remedy that was measured on less text looked better there."""
    everything = comparison(frame, True, processor)
    same = None if everything is None else everything.row(chosen.name)
    if everything is None or same is None:
        return []
    other = everything.lowest
    if other is None or not other.loss < (1 - ALIKE) * same.loss:
        return []
    return [
        f"{other.name} had a lower loss, {other.loss:.3f} against {same.loss:.3f}, on the {other.n} stretches that it "
        "was measured on; it was not among those measured on more."
    ]


def _worth_it(best: list[Row], bare: Row) -> bool:
    """Whether the first remedy surely saves more than ALIKE of a loss that has not collapsed."""
    return bool(best) and (saved := best[0].saved) is not None and saved.low > ALIKE * bare.loss


def _beats(chosen: Row) -> bool:
    """Whether a remedy surely does more than reading the last tokens alone, for the loss or for recall; where no recall
    was measured nobody knows, and the remedy, which costs less, stands."""
    for_loss = chosen.gain is not None and chosen.gain.low > 0
    return for_loss or not chosen.recall_gain or any(gain.low > 0 for gain in chosen.recall_gain.values())


# ---- each kind


def _collapse_words(fall: dict[str, Any]) -> str:
    if fall["length"] is None:
        longest = max(row["length"] for row in fall["lengths"])
        return (
            f"On this text the model does not collapse up to {format_length(longest)} tokens, the longest measured"
            f"{_failing_words(fall, longest)}."
        )
    row = next(row for row in fall["lengths"] if row["length"] == fall["length"])
    return (
        f"On this text the model collapses at {format_length(fall['length'])} tokens: its loss there is "
        f"{row['loss']:.2f} nats a token, more than twice the highest within its training length ({fall['peak']:.2f}); "
        f"{row['failing']} of {counted(row['slices'], 'stretch', 'stretches')} of text fail by themselves"
        f"{_failing_words(fall, fall['length'] - 1)}."
    )


def _failing_words(fall: dict[str, Any], longest: int) -> str:
    """Return from where on some stretches fail by themselves, though not their mean; nothing where none does up to
    `longest` tokens."""
    for row in fall["lengths"]:
        if row["length"] <= longest and row["failing"]:
            slices = counted(row["slices"], "stretch", "stretches")
            return f"; at {format_length(row['length'])} {row['failing']} of {slices} already did"
    return ""


def _none_needed(fall: dict[str, Any], compared: Comparison, about: dict[str, Any]) -> Recommendation:
    longest = max(row["length"] for row in fall["lengths"])
    use = "use it as it is: no remedy that was measured surely lowers its loss."
    if longest < FAR_ENOUGH * about["train_length"]:
        use = (
            f"up to {format_length(longest)} tokens {use} That is not far, and many models collapse further out: "
            "name more time, or longer --lengths."
        )
    words = [_collapse_words(fall), use[0].upper() + use[1:]]
    words.append(gain_words(compared.row("none"), compared))
    python, command = lines(about, None, None)
    return Recommendation("none needed", None, [w for w in words if w], _shared_doubts(compared, None), python, command)


def _remedy(fall: dict[str, Any], compared: Comparison, best: list[Row], about: dict[str, Any]) -> Recommendation:
    chosen = best[0]
    at = format_length(compared.length)
    words = [_collapse_words(fall)]
    words.append(
        f"Use {chosen.name}: at {at} tokens its loss is {chosen.loss:.3f} instead of "
        f"{_number(compared.row('none'))}, and {chosen.over_control:.3f} times that of reading the last tokens afresh "
        f"({compared.against})."
    )
    more = _alike_words(compared), _recall_words(chosen, compared), gain_words(chosen, compared), _cost_words(chosen)
    words += [w for w in more if w]
    python, command = lines(about, chosen.name, compared.length)
    return Recommendation("remedy", chosen.name, words, _shared_doubts(compared, best), python, command)


def _last_tokens(fall: dict[str, Any], compared: Comparison, chosen: Row, about: dict[str, Any]) -> Recommendation:
    assert compared.against is not None
    words = [
        _collapse_words(fall),
        f"Give it the last {format_length(about['train_length'])} tokens only: no remedy gains anything measurable "
        f"over that, in loss or recall. Where the whole text has to be read as it comes, {chosen.name} holds the loss "
        f"({chosen.loss:.3f} at {format_length(compared.length)}), and is read once.",
    ]
    python, command = lines(about, f"recompute:last={max(2, about['train_length'] // 2 * 2)}", None)
    doubts = _shared_doubts(compared, [chosen])
    return Recommendation("last tokens", compared.against, words, doubts, python, command, next_steps(about))


def _insufficient(
    fall: dict[str, Any], compared: Comparison, chosen: Row | None, about: dict[str, Any]
) -> Recommendation:
    if chosen is None:
        nearest = "none was applicable, or none had a loss that is a number"
    else:
        nearest = (
            f"the nearest, {chosen.name}, has a loss of {chosen.loss:.3f} at {format_length(compared.length)}, "
            f"{chosen.over_control:.2f} times that of reading the last tokens afresh"
        )
    words = [_collapse_words(fall), f"No remedy that was measured suffices: {nearest}."]
    words.append(
        f"Until then give the model the last {format_length(about['train_length'])} tokens only; what mends it is one "
        "of the next steps."
    )
    python, command = lines(about, f"recompute:last={max(2, about['train_length'] // 2 * 2)}", None)
    doubts = _shared_doubts(compared, None if chosen is None else [chosen])
    return Recommendation("insufficient", compared.against, words, doubts, python, command, next_steps(about))


def _without_comparison(fall: dict[str, Any]) -> Recommendation:
    words = [_collapse_words(fall)]
    if fall["length"] is None:
        words.append("Whether a remedy would gain anything was not measured within the budget.")
    else:
        words.append(
            "No remedy was measured far enough beside its controls within the budget: run this again with a larger one."
        )
    return Recommendation("undecided", None, words, [], "", "", [])


# ---- words


def _number(row: Row | None) -> str:
    return "none known" if row is None else f"{row.loss:.3f}" if math.isfinite(row.loss) else "no number"


def _alike_words(compared: Comparison) -> str:
    """Return which remedies the losses do not tell apart, and what chose between them; nothing where they do."""
    chosen, *others = rows = alike(compared)
    if not others:
        return ""
    named = [f"{chosen.name} ({chosen.loss:.3f})"]
    named += [f"{row.name} ({row.loss:.3f}; {reason(row, rows)})" for row in others]
    return (
        f"The losses of {len(rows)} remedies are not told apart there, each within its interval or {ALIKE:.0%} of the "
        f"lowest: {', '.join(named)}. Of them the one that recalls most, then costs least, then is simplest is named."
    )


def _recall_words(chosen: Row, compared: Comparison) -> str:
    if not chosen.recall:
        return "Recall was not measured, so what it still remembers is not known."
    clauses = []
    for task, value in chosen.recall.items():
        beside = [
            f"{row.recall[task]:.2f} {'without a remedy' if row.name == 'none' else f'with {row.name}'}"
            for row in compared.rows
            if (row.name == "none" or row.name == compared.against) and task in row.recall
        ]
        clauses.append(f"{value:.2f} of {task}" + (f" ({', '.join(beside)})" if beside else ""))
    return f"It answers {'; '.join(clauses)}, over all lengths asked, which may be shorter."


def _document_words(task: str, gain: Interval) -> str:
    interval = f"95% {gain.low:+.2f} to {gain.high:+.2f}" if math.isfinite(gain.low) else "too few for an interval"
    surely = "surely answers more" if gain.low > 0 else "does not surely answer more"
    return f"Of {task} it {surely} with the document than without it ({gain.value:+.2f} of the questions, {interval})."


def gain_words(row: Row | None, compared: Comparison) -> str:
    """Return what reading everything gains over the last tokens."""
    if row is None or row.gain is None or not math.isfinite(row.gain.value):
        return ""
    gain, at = row.gain, format_length(compared.length)
    interval = f"95% {gain.low:+.3f} to {gain.high:+.3f}" if math.isfinite(gain.low) else "one stretch has no interval"
    if gain.low > 0:
        what = f"gains {gain.value:.3f} nats a token over"
    elif gain.high < 0:
        what = f"loses {-gain.value:.3f} nats a token against"
    else:
        what = f"gains nothing that can be told from zero ({gain.value:+.3f} nats a token) over"
    return f"At {at} reading everything {what} {compared.against} ({interval})."


def _cost_words(row: Row) -> str:
    if not math.isfinite(row.speed):
        return ""
    return f"It reads {row.tokens_per_second:,.0f} tokens a second, {row.speed:.2f} times as many as without."


def _shared_doubts(compared: Comparison, best: list[Row] | None) -> list[str]:
    """Return how sure a recommendation is, in sentences."""
    doubts = []
    if best:
        chosen = best[0]
        if chosen.saved is not None and math.isfinite(chosen.saved.low):
            surely = "surely" if chosen.saved.low > 0 else "not surely"
            doubts.append(f"Its loss is {surely} below that without a remedy (by {interval_text(chosen.saved)}).")
        for task, n in chosen.prompts.items():
            spread = wilson(chosen.recall[task] * n, n)
            doubts.append(
                f"A share of {task} right is known to about {(spread.high - spread.low) / 2:.2f} ({n} a length)."
            )
    rows = compared.remedies
    n = min((row.n for row in compared.rows), default=0)
    doubts.append(
        f"Losses at {format_length(compared.length)} are means over {counted(n, 'stretch', 'stretches')} of this text; "
        f"{counted(len(rows), 'remedy', 'remedies')} {'was' if len(rows) == 1 else 'were'} compared on the same ones, "
        "so the best looks a little better than it is."
    )
    doubts.append(f"Nothing is known beyond {format_length(compared.length)} tokens, nor of text of another kind.")
    return doubts


def interval_text(interval: Interval) -> str:
    return f"{interval.value:.3f} nats a token, 95% {interval.low:.3f} to {interval.high:.3f}"


# ---- what to type


def lines(about: dict[str, Any], remedy: str | None, target: int | None) -> tuple[str, str]:
    """Return the lines of Python, and the command, that use a remedy. (`repr`, as JSON writes characters beyond 16 bits
    as two, which Python does not read as one.)"""
    python = ["import rnn_longctx", "", *_loading(about)]
    if about["adopted"]:
        python.insert(0, "import transformers")
    generate = "rnn_longctx.generate(model, prompt, max_new_tokens=200)"
    python.append('prompt = open("document.txt").read()  # a document of yours')
    if remedy is None:
        python.append(f"new = {generate}")
    else:
        kinds = {part.partition(":")[0] for part in remedy.split("+")}
        aim = f", target_length={target}" if target and kinds & set(about["per_length"]) else ""
        python += [f"with rnn_longctx.mitigate(model, {remedy!r}{aim}):", f"    new = {generate}"]
    python.append("print(model.tokenizer.decode(new[0]))")
    if remedy in about["foldable"]:
        python += ["", "# or put it into the weights, which any library then reads:"]
        python += ["from rnn_longctx.models.checkpoint import save", ""]
        python += [f"rnn_longctx.fold(model, {remedy!r})", 'save(model, "mended")']
    mitigation = ["--mitigation", remedy] if remedy else []
    command = ["rnn-longctx", "generate", about["model"], *about["options"], *mitigation, "--prompt", "-"]
    return "\n".join(python), shlex.join(command) + " < document.txt"


def _loading(about: dict[str, Any]) -> list[str]:
    """Return the lines that load the model as the options on the command line say."""
    words = about["options"]
    options = dict(zip(words[::2], words[1::2]))
    arguments = {
        "tokenizer": options.get("--tokenizer"),
        "train_length": about["given_train_length"],
        "dtype": options.get("--dtype"),
        "device": options.get("--device"),
    }
    if about["adopted"]:  # a pilot reads in float32 where nothing else is asked, transformers as the checkpoint says
        dtype, device = arguments.pop("dtype") or "float32", arguments.pop("device")
        moved = f".to({device!r})" if device else ""
        lines = [
            f"theirs = transformers.AutoModelForCausalLM.from_pretrained({about['model']!r}, dtype={dtype!r}){moved}",
            f"model = rnn_longctx.adopt(theirs{_keywords(arguments)})",
        ]
    else:
        lines = [f"model = rnn_longctx.load({about['model']!r}{_keywords(arguments)})"]
    if "--state-dtype" in options:
        lines.append(f"model.use_state_dtype({options['--state-dtype']!r})")
    return lines


def _keywords(arguments: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items() if value is not None)


def next_steps(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what mends a model that no remedy mends, each with the command that begins it."""
    tokens = 8 * about["train_length"]
    longer = format_length(tokens).lower()
    settings = [f"model={about['model']}", "data=TRAINING_TEXT", f"train_length={longer}"]
    settings.append(f"data.passkey.lengths=[{min(128, tokens)},{longer}]")  # those of the config are up to 16k
    if tokens < 2048:  # what the config reads at once
        settings.append(f"passing.segment={longer}")
    if about["tokenizer"] != "bytes":  # which the config has
        settings.append(f"data.tokenizer={about['tokenizer']}")
    text = ["--text", about["text"], "--lengths", longer]
    return [
        (
            "Train it on, on long streams that hand their states on, so that it learns to forget",
            shlex.join(["rnn-longctx", "train", "configs/train/continual.yaml", "--set", *settings]),
        ),
        ("Ask how large a state a context takes", f"rnn-longctx capacity advise --context {longer}"),
        (
            "Compare it with a hybrid, whose attention layers look things up: any model that you have",
            shlex.join(["rnn-longctx", "eval", "HYBRID", *text, "--task", "lm", "--task", "passkey"]),
        ),
    ]
