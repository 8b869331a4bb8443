"""How much a person must know of this project to change it, as figures of its source:

    python benchmarks/counts.py                                # of the checkout that this file is in
    python benchmarks/counts.py --root DIR --journeys          # of another; with what three commands run and import
    python benchmarks/counts.py --list                         # and every place that was counted, file:line
    python benchmarks/counts.py --journeys --out FILE.csv      # rows appended: commit, what, value

Counted are the package's .py files (`rnn_longctx` through its links, each file once; no tests, docs, configs or
benchmarks), by their syntax trees. A name is followed through imports, aliases and re-exports to the class that it
means. It knows folders and base classes, not files, so that it works while code moves:

- model class: in rnn_longctx/models/, a torch Module, a class that has `mixers`, what inherits from these, a Protocol,
  and a class named ...Mixer; and torch's Module and transformers' PreTrainedModel.
- a task's class: a subclass of `Task` or `Job`. The base itself does not count: whether an argument is a task or its
  text is asked of input, not of a kind of task.
- Triton file: it has a function decorated with triton.jit.
- grammar names: found, asked, given, kept, own, part, mine, told, said, made, wanted as names of variables (each use),
  attributes, arguments, keywords and functions.
- a file names a remedy, mixer or task: it has the class, its import, or a string that is the class's or the registered
  name (or begins with it and a colon). A name that is an ordinary word ("window") is found in other meanings too.
- import circle: modules that import each other, inside functions and under TYPE_CHECKING included. `from a import b`
  is an import of a.b where that is a module, else of a; the parent packages that Python loads beside are not counted.
"""

from __future__ import annotations

import argparse
import ast
import csv
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import counts_run
from counts_source import PACKAGE, Class, Project, Source, registered

GRAMMAR = {"found", "asked", "given", "kept", "own", "part", "mine", "told", "said", "made", "wanted"}
TASK_BASES = {"Task", "Job", "Measuring"}
MIXER_BASES = {"Mixer", "Recurrent", "RecurrentMixer"}
ARGUMENTS = "functions of more than 8 arguments, outside kernels/"
ARGUMENTS_LESS = "functions of more than 8 arguments, outside kernels/ and Triton files"
ON_MODEL = "isinstance on a model, outside models/"
ASKED_MODEL = "hasattr, or getattr with a default, on a model, outside models/"
ON_TASK = "isinstance on a task"
COMPARED = "comparisons of a task with a task's name"
MENTIONS = "lines that mention Mamba2LM, outside models/"
WORDS = "uses of grammar names"
SKIPS = "# fmt: skip"
TITLES = (ARGUMENTS, ARGUMENTS_LESS, ON_MODEL, ASKED_MODEL, ON_TASK, COMPARED, MENTIONS, WORDS, SKIPS)
Places = defaultdict[str, list[str]]  # of each count, what was counted: file:line


def arguments(project: Project, places: Places) -> None:
    """All arguments of functions and lambdas: positional, keyword-only, *args and **kwargs, without self and cls."""
    for s in project.sources.values():
        for node in ast.walk(s.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or s.of_kernels:
                continue
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
            if len(names) - (names[:1] in (["self"], ["cls"])) > 8:
                for title in (ARGUMENTS, *[ARGUMENTS_LESS] * (not s.of_triton)):
                    places[title].append(f"{s.path}:{node.lineno} {getattr(node, 'name', 'lambda')}")


def kinds(project: Project, places: Places) -> None:
    """Where code asks which kind a model or a task is: by class, by attribute, or by a task's name."""
    tasks = set(project.below(TASK_BASES))
    task_names = {registered(project, c) for c in tasks} - {None}
    for s in project.sources.values():
        outside = not s.within("models")
        for node in ast.walk(s.tree):
            titles = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                classes = set(project.named(s, node.args[1]))
                titles += [ON_MODEL] * (outside and bool(classes & project.model_classes))
                titles += [ON_TASK] * bool(classes & tasks)
            elif isinstance(node, ast.Call) and (ast.unparse(node.func), len(node.args)) in (
                ("hasattr", 2),
                ("getattr", 3),
            ):
                model = ast.unparse(node.args[0]).rpartition(".")[2] in ("model", "lm")
                titles += [ASKED_MODEL] * (outside and model)
            elif isinstance(node, ast.Compare):
                strings = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
                of_task = re.search(r"""\btask(_name)?['"]?\]?$""", ast.unparse(node.left))  # sheet.task, frame["task"]
                titles += [COMPARED] * (of_task is not None and bool(strings & task_names))
            for title in titles:
                places[title].append(f"{s.path}:{getattr(node, 'lineno', 0)} {ast.unparse(node)}")


def words(project: Project, places: Places) -> None:
    """Lines that mention Mamba2LM; identifiers that say grammar and not content; lines kept from the formatter."""
    for s in project.sources.values():
        for i, text in enumerate(s.text.splitlines(), 1):
            if re.search(r"\bMamba2LM\b", text) and not s.within("models"):
                places[MENTIONS].append(f"{s.path}:{i}")
            if "# fmt: skip" in text:
                places[SKIPS].append(f"{s.path}:{i}")
        for node in ast.walk(s.tree):
            # of names, attributes, arguments and keywords, functions and handlers
            for word in GRAMMAR.intersection(getattr(node, key, None) for key in ("id", "attr", "arg", "name")):
                places[WORDS].append(f"{s.path}:{getattr(node, 'lineno', 0)} {word}")


def naming(project: Project, places: Places) -> list[tuple[str, float]]:
    """Files that name each remedy, mixer and task: about what it takes to add one. Left out are `none`, the controls,
    and classes that no name chooses (compositions, files)."""
    mixers = [c for c in project.below(MIXER_BASES) if project.sources[c[0]].within("models")]
    mixers += [c for c in project.classes if c[0].startswith(f"{PACKAGE}.models.mixers.") and registered(project, c)]
    groups = {
        "remedy": project.below({"Remedy"}),
        "mixer": mixers or [c for c in project.classes if c[1] == "Mamba2"],  # before mixers had a base
        "task": project.below(TASK_BASES),
    }
    rows: list[tuple[str, float]] = []
    for group, classes in groups.items():
        counts = []
        for c in dict.fromkeys(classes):
            name = registered(project, c) or ("mamba2" if c[1] == "Mamba2" else None)
            control = any(re.match(r"control\b.*= True", ast.unparse(line)) for line in project.classes[c].body)
            if name and name != "none" and not control:
                files = sorted(s.path for s in project.sources.values() if names_it(project, s, c, name))
                places[f"files that name the {group} {name}"] += files
                counts.append(len(files))
        if counts:
            rows.append((f"files that name a {group}: how many of these", len(counts)))
            rows.append((f"files that name a {group}: mean", round(statistics.mean(counts), 2)))
            rows.append((f"files that name a {group}: most", max(counts)))
    return rows


def names_it(project: Project, s: Source, c: Class, name: str) -> bool:
    by_string = any(text in (name, c[1]) or text.startswith(f"{name}:") for text in s.strings)
    return by_string or any(project.meaning(s, word) == c for word in s.names)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of two and more (Tarjan)."""
    index, low, stack, out = dict[str, int](), dict[str, int](), list[str](), list[list[str]]()

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(edges[v]):
            if w not in index:
                visit(w)
            if w in stack:
                low[v] = min(low[v], low[w])
        if low[v] == index[v]:
            component = stack[stack.index(v) :]
            del stack[stack.index(v) :]
            if len(component) > 1:
                out.append(sorted(component))

    for v in sorted(edges):
        if v not in index:
            visit(v)
    return sorted(out, key=len, reverse=True)


def importing(project: Project, places: Places) -> list[tuple[str, float]]:
    """Circles of modules, and of what lies in one folder (or file) of the package."""
    modules: dict[str, set[str]] = {m: set() for m in project.sources}
    for s in project.sources.values():
        for module, name in s.imports:
            target = f"{module}.{name}" if f"{module}.{name}" in modules else module
            if target in modules and target != s.module:
                modules[s.module].add(target)
    areas: dict[str, set[str]] = {".".join(m.split(".")[:2]): set() for m in modules}
    for m, targets in modules.items():
        area = ".".join(m.split(".")[:2])
        areas[area] |= {".".join(t.split(".")[:2]) for t in targets} - {area}
    rows: list[tuple[str, float]] = []
    for what, edges in (("modules", modules), ("packages", areas)):
        components = circles(edges)
        places[f"import circles of {what}"] += [f"{len(c)}: {', '.join(c)}" for c in components]
        rows.append((f"import circles of {what}", len(components)))
        rows.append((f"{what} that are in an import circle", sum(map(len, components))))
    return rows


def commit(root: Path) -> str:
    """The commit of a checkout, with + where the package differs from it."""
    git = ["git", "-C", str(root)]
    done = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    if done.returncode or not (root / ".git").exists():
        return "unknown"
    folders = [name for name in (PACKAGE, "eval", "probes", "mitigations") if (root / name).exists()]
    changed = subprocess.run([*git, "status", "--porcelain", "--", *folders], capture_output=True, text=True).stdout
    return done.stdout.strip() + "+" * bool(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of the source: see the top of the file.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    parser.add_argument("--journeys", action="store_true", help="run three commands, and say what they run and import")
    parser.add_argument("--list", action="store_true", help="every place that was counted")
    parser.add_argument("--out", type=Path, help="a CSV file that rows are appended to")
    options = parser.parse_args()
    root = options.root.resolve()
    if not (root / PACKAGE).is_dir():
        sys.exit(f"--root: expected a checkout with a folder {PACKAGE}, got {options.root}")
    project, places = Project(root), defaultdict[str, list[str]](list, {title: [] for title in TITLES})
    rows: list[tuple[str, float]] = [("files", len(project.sources))]
    rows.append(("lines", sum(s.text.count("\n") for s in project.sources.values())))
    for count in (arguments, kinds, words):
        count(project, places)
    rows += [(title, len(places[title])) for title in TITLES]
    rows += [*naming(project, places), *importing(project, places)]
    rows += counts_run.everything(root) if options.journeys else []
    if options.list:
        for what, lines in places.items():
            print(f"{what}: {len(lines)}", *(f"    {line}" for line in lines), sep="\n")
    width = max(len(what) for what, _ in rows)
    print(*(f"{what:<{width}}  {value:>8,}" for what, value in rows), sep="\n")
    if options.out:
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("commit", "what", "value")] * new)
            writer.writerows((commit(root), what, value) for what, value in rows)


if __name__ == "__main__":
    main()
