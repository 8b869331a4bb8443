"""The reference of what is registered by name, of configs and of the table of results, from the code."""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
import textwrap
import tokenize
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from prose import attributes, docstring, escaped, table

from rnn_longctx.eval.bench.base import BENCHES
from rnn_longctx.eval.results import KEY, VALUE
from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.spec import Range, tunable
from rnn_longctx.tasks import TASKS

# What a person writes in YAML, or gives to a function: a title, and a dataclass; those of its fields follow.
CONFIGS = {
    "Evaluation": ["rnn_longctx.eval.question.EvalConfig"],
    "Models": ["rnn_longctx.models.config.ModelConfig", "rnn_longctx.models.mixers.mamba2.Mamba2Config"],
    "Training": ["rnn_longctx.train.config.TrainConfig"],
    "Comparisons": ["rnn_longctx.eval.compare.config.CompareConfig", "rnn_longctx.eval.compare.growth.GrowthConfig"],
    "Capacity": ["rnn_longctx.eval.capacity.config.CapacityConfig"],
    "lm-eval": ["rnn_longctx.eval.harness.run.HarnessConfig"],
    "Retrofit": ["rnn_longctx.train.retrofit.RetrofitConfig"],
    "Sensors": [
        "rnn_longctx.sensors.fit.FitConfig",
        "rnn_longctx.sensors.model.SensorConfig",
        "rnn_longctx.sensors.adapt.AdaptConfig",
    ],
}
# What each column of results.csv holds.
COLUMNS = {
    "model": "name of the model",
    "weights_hash": "stands for what the model computes: tensors, their types, adapters, hooks, settings",
    "mitigation": "canonical text of the remedy, `none` without one",
    "calibration": "the text that a remedy was calibrated on",
    "task": "canonical text of the task; `lm` is the loss of a text",
    "text": "name of the text",
    "text_hash": "hash of what the text holds",
    "tokenizer": "name of the tokenizer",
    "length": "tokens",
    "depth": "where in the context the answer stands, 0 its beginning and 1 its end; empty for all depths together",
    "metric": "what `value` is: `nats_per_token`, `accuracy`, ...",
    "batch": "rows side by side",
    "dtype": "type of the weights, and how products were rounded",
    "backend": "the implementation of the recurrence",
    "device": "what it was measured on",
    "seed": "of the examples",
    "state_dtype": "what the state is rounded to between calls; empty: float32, or float64 with float64 weights",
    "plugins": "hash of the source of all plugins that were loaded",
    "value": "the number",
    "stderr": "its standard error",
    "n": "slices or prompts",
    "samples": "one number a slice or prompt, in their order, so that rows on the same text pair by position",
    "train_length": "tokens",
    "seconds": "of the whole cell",
    "tokens_per_second": "of reading",
    "first_token_seconds": "to the first token of an answer",
    "next_token_seconds": "of each further one",
    "peak_bytes": "most memory in use",
    "version": "of this package",
    "tokens_read": "of each slice or prompt, the mean over them",
    "chance": "what a guess would score",
}


def remedies() -> str:
    """Return a section a remedy: what it does, its parameters, and what may be done with it."""
    return "\n\n".join(_remedy(name, REMEDIES[name]) for name in REMEDIES)


def _remedy(name: str, kind: Any) -> str:
    needs = ", ".join(sorted(need.name.lower().replace("_", " ") for need in kind.needs)) or "nothing"
    facts = [f"Needs: {needs}."]
    facts += ["A control."] if kind.control else []
    facts += [f"May be folded into the weights: {kind.foldable}."] if kind.foldable else []
    facts += ["`rnn-longctx calibrate` searches it."] if kind.search else []
    facts += ["Depends on the length that is to be read."] if kind.per_length else []
    return "\n\n".join([f"## {name}", _module(kind), parameters(kind), " ".join(facts)])


def mixers() -> str:
    """Return a section a mixer: its equations, and its parameters."""
    return "\n\n".join(
        "\n\n".join([f"## {name}", _module(MIXERS[name]), parameters(MIXERS[name].Config)]) for name in MIXERS
    )


def recurrences() -> str:
    """Return a section a recurrence."""
    return "\n\n".join(f"## {name}\n\n{docstring(type(RECURRENCES[name]))}" for name in RECURRENCES)


def tasks() -> str:
    """Return a section a task: what is asked, and its parameters."""
    return "\n\n".join("\n\n".join([f"## {name}", docstring(TASKS[name]), parameters(TASKS[name])]) for name in TASKS)


def benches() -> str:
    """Return a section a bench, with its options."""
    parts = []
    for name in BENCHES:
        run = BENCHES[name].run
        rows = [
            [f"`{p.name}`", "" if p.default is p.empty else f"`{p.default}`", escaped(_said(p.annotation))]
            for p in inspect.signature(run, eval_str=True).parameters.values()
        ]
        options = table(["parameter", "unless given", ""], rows) if rows else ""
        parts.append("\n\n".join([f"## {name}", docstring(run), options]))
    return "\n\n".join(parts)


def _said(annotation: Any) -> str:
    return str(next(iter(getattr(annotation, "__metadata__", ())), ""))


def configs() -> str:
    """Return a section a kind of config, and in it a table a dataclass."""
    parts = []
    for title, kinds in kinds_of_configs().items():
        parts.append(f"## {title}")
        for kind in kinds:
            parts += [f"### {kind.__name__}", docstring_of_config(kind), parameters(kind)]
    return "\n\n".join(part for part in parts if part)


def kinds_of_configs() -> dict[str, list[type]]:
    """Return the dataclasses of each title, each once, with those that its fields may hold behind it."""
    seen: set[type] = set()
    found: dict[str, list[type]] = {}
    for title, places in CONFIGS.items():
        found[title] = []
        open_ = [pkgutil.resolve_name(place) for place in places]
        while open_:
            kind = open_.pop(0)
            if kind not in seen:
                seen.add(kind)
                found[title].append(kind)
                hints = get_type_hints(kind)
                open_ += [inner for f in fields(kind) for inner in _dataclasses(hints[f.name])]
    return found


def _dataclasses(hint: Any) -> list[type]:
    """Return the dataclasses of this package in a type."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint] if hint.__module__.startswith("rnn_longctx") else []
    return [kind for inner in get_args(hint) for kind in _dataclasses(inner)]


def docstring_of_config(kind: type) -> str:
    """Return what a config's docstring says before its attributes, which stand in its table."""
    return docstring(kind).partition("**Attributes**")[0].strip()


def result_table() -> str:
    """Return the columns of results.csv."""
    rows = [[f"`{name}`", "key" if name in KEY else "measured", COLUMNS[name]] for name in (*KEY, *VALUE)]
    return table(["column", "", "what it holds"], rows)


def _module(kind: type) -> str:
    """Return the docstring of the module of a class, where it tells of that class alone; else the class's own."""
    module = importlib.import_module(kind.__module__)
    alone = len([v for v in vars(module).values() if isinstance(v, type) and _named(v, module)]) == 1
    return docstring(module) if alone else docstring_of_config(kind)


def _named(kind: type, module: Any) -> bool:
    """Return whether a class of a module is one that is registered by a name."""
    return kind.__module__ == module.__name__ and bool(vars(kind).get("name"))


def parameters(kind: type) -> str:
    """Return the parameters of a dataclass as a table: default, meaning, and what they may be tuned over."""
    meanings = attributes(kind)
    comments = comments_of(kind)
    over = tunable(kind)
    rows = []
    for f in fields(kind):  # type: ignore[arg-type]
        meaning = meanings.get(f.name) or escaped(comments.get(f.name, ""))
        if f.name in over:
            meaning += f" {'Tuned' if meaning else 'tuned'} over {_range(over[f.name])}."
        rows.append([f"`{f.name}`", _default(f), meaning.strip()])
    return table(["parameter", "unless given", ""], rows) if rows else "It has no parameters."


def _range(over: Any) -> str:
    if isinstance(over, Range):
        return f"{over.low:g} to {over.high:g}"
    return ", ".join(map(str, over))


def _default(f: Field[Any]) -> str:
    if f.default is not MISSING:
        return f"`{f.default}`"
    if f.default_factory is MISSING:
        return "(needed)"
    text = f"{f.default_factory()}"
    return f"`{text}`" if len(text) < 60 else "see there"


def comments_of(kind: type) -> dict[str, str]:
    """Return what the comments beside, or on the line above, the fields of a dataclass say."""
    source = textwrap.dedent(inspect.getsource(kind))
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt"):
            beside[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        name = line.strip().partition(":")[0]
        if name in names and line.startswith("    ") and not line.startswith("     "):
            above = source.splitlines()[number - 2].strip().startswith("#")
            text = beside.get(number) or (beside.get(number - 1, "") if above else "")
            found.setdefault(name, text)
    return found
