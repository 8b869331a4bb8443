"""Imports run one way (docs/develop/architecture.md), over the syntax tree: those inside functions and those for
types alone count as well."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST = frozenset(
    (
        "errors",
        "config",
        "spec",
        "registry",
        "files",
        "devices",
        "progress",
        "loggers",
        "version",
        "lazy",
        "plain",
        "ranks",
    )
)
# Each room, and the rooms that it may know beside itself and the first row.
ROOMS: dict[str, tuple[str, ...]] = {
    "data": (),
    "tasks": ("data",),
    "recurrence": (),
    "models": ("recurrence", "data"),
    "measure": ("models", "recurrence", "tasks", "data"),
    "mitigations": ("measure", "models", "recurrence", "tasks", "data"),
    "probes": ("mitigations", "measure", "models", "recurrence", "tasks", "data"),
    "train": ("mitigations", "measure", "models", "recurrence", "tasks", "data"),
    "sensors": ("train", "probes", "mitigations", "measure", "models", "recurrence", "tasks", "data"),
    "plugins": ("mitigations", "models", "recurrence", "tasks"),
    "testing": ("mitigations", "measure", "models", "recurrence", "tasks", "data"),
    "eval": ("plugins", "train", "probes", "mitigations", "measure", "models", "recurrence", "tasks", "data"),
    "cli": (
        "plugins",
        "eval",
        "sensors",
        "train",
        "probes",
        "mitigations",
        "measure",
        "models",
        "recurrence",
        "tasks",
        "data",
    ),
}
ENTRY = {"rnn_longctx", "rnn_longctx.train.__main__"}  # the public names; what launchers start
OPTIONAL = (
    "mamba_ssm",
    "causal_conv1d",
    "fla",
    "lm_eval",
    "accelerate",
    "datasets",
    "peft",
    "wandb",
    "tensorboard",
    "optuna",
)
TABLES = ("rnn_longctx.eval.tables.", "rnn_longctx.eval.show.")


def modules() -> dict[str, Path]:
    places = {"rnn_longctx": ROOT / "rnn_longctx"}
    places |= {f"rnn_longctx.{name}": ROOT / name for name in ("mitigations", "probes", "eval")}
    out = {}
    for prefix, folder in places.items():
        for file in folder.rglob("*.py"):
            inside = file.relative_to(folder).with_suffix("").parts
            if prefix == "rnn_longctx" and inside[0] in ("mitigations", "probes", "eval"):
                continue  # a link to a folder above
            out[".".join((prefix, *(name for name in inside if name != "__init__")))] = file
    return out


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imported(tree: ast.AST) -> list[str]:
    """The modules that a tree imports, wherever: `from package import name` is package.name where that is a module."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            out += [name if name in MODULES else node.module for name in names]
    return out


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: no functions, nothing for types alone."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Cut().visit(ast.parse(ast.unparse(tree)))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(set(MODULES) - ENTRY))
def test_a_module_knows_only_the_rooms_before_its_own(name):
    here = room(name)
    assert here in FIRST or here in ROOMS, f"{name} is in no room: say here what it may know"
    allowed = {*FIRST, here, *ROOMS.get(here, ())}
    if here in FIRST:
        allowed = set(FIRST)
    known = {other for other in imported(TREES[name]) if other.partition(".")[0] == "rnn_longctx"}
    wrong = sorted(other for other in known if other != "rnn_longctx" and room(other) not in allowed)
    assert not wrong, f"{name} imports {', '.join(wrong)}"
    assert "rnn_longctx" not in known or here == "cli", f"{name} imports the names of all rooms"


def circles() -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    edges = {name: [o for o in imported(tree) if o in MODULES and o != name] for name, tree in TREES.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                out.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return out


def test_no_circle():
    assert not circles()


def test_optional_packages_are_imported_where_they_are_used():
    eager = {name: {o.partition(".")[0] for o in imported(at_import(tree))} for name, tree in TREES.items()}
    for package in OPTIONAL:
        users = [name for name, known in eager.items() if package in known]
        assert len(users) < 2, f"{package} is imported by {', '.join(users)} as they are imported"


def test_tables_and_pictures_know_no_torch():
    """Not through what they import either: a table can be drawn where there is no model."""

    def reaches(name: str, seen: set[str]) -> str | None:
        for other in imported(at_import(TREES[name])):
            if other.partition(".")[0] in ("torch", "transformers"):
                return f"{name} imports {other}"
            if other in MODULES and other not in seen:
                seen.add(other)
                if why := reaches(other, seen):
                    return f"{name} imports {other}; {why}"
        return None

    for name in sorted(MODULES):
        if name.startswith(TABLES):
            assert (why := reaches(name, {name})) is None, why


def test_a_wrong_import_is_seen():
    inside = "def f():\n    from rnn_longctx.cli import main\n"
    tree = ast.parse(inside + "if TYPE_CHECKING:\n    import rnn_longctx.eval.run\n")
    assert imported(tree) == ["rnn_longctx.cli", "rnn_longctx.eval.run"] and not imported(at_import(tree))
