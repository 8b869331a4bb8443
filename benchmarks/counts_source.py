"""The package's sources as syntax trees, and what a name in one of them means: for counts.py."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "rnn_longctx"
Class = tuple[str, str]  # module and name; an empty module: of another library


@dataclass
class Source:
    module: str
    path: str  # in the repository
    text: str
    tree: ast.Module
    folder: bool  # an __init__.py
    names: dict[str, Class] = field(default_factory=dict)  # what names of this file were imported or defined as
    imports: list[tuple[str, str | None]] = field(default_factory=list)  # module, name in it

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports.append((alias.name, None))
            elif isinstance(node, ast.ImportFrom):
                home = self.module.split(".")[: len(self.module.split(".")) - node.level + self.folder]
                base = ".".join([*home, *([node.module] if node.module else [])]) if node.level else node.module or ""
                for alias in node.names:
                    self.imports.append((base, alias.name))
                    self.names[alias.asname or alias.name] = (base, alias.name)
        self.names |= {node.name: (self.module, node.name) for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def within(self, area: str) -> bool:
        return f"{self.module}.".startswith(f"{PACKAGE}.{area}.")

    @cached_property
    def of_kernels(self) -> bool:
        return "kernels" in Path(self.path).parts[:-1]

    @cached_property
    def of_triton(self) -> bool:
        functions = [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]
        return any(ast.unparse(d).startswith("triton.jit") for node in functions for d in node.decorator_list)

    @cached_property
    def strings(self) -> set[str]:
        """Its literals, without docstrings."""
        prose = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}
        constants = [x for x in ast.walk(self.tree) if isinstance(x, ast.Constant) and id(x) not in prose]
        return {x.value for x in constants if isinstance(x.value, str)}


class Project:
    """The sources of a checkout, and what a name in one of them means."""

    def __init__(self, root: Path):
        self.root, self.sources = root, dict[str, Source]()
        seen = set[Path]()
        for folder, below, files in os.walk(root / PACKAGE, followlinks=True):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
                if (real := path.resolve()) not in seen:
                    seen.add(real)
                    parts = path.relative_to(root).with_suffix("").parts
                    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                    text = path.read_text(encoding="utf-8")
                    place = str(real.relative_to(root.resolve()))
                    self.sources[module] = Source(module, place, text, ast.parse(text), parts[-1] == "__init__")
        self.classes: dict[Class, ast.ClassDef] = {
            (s.module, node.name): node
            for s in self.sources.values() for node in ast.walk(s.tree) if isinstance(node, ast.ClassDef)
        }  # fmt: skip

    def meaning(self, source: Source, name: str) -> Class:
        """The class that a name of a source stands for, through aliases and re-exports."""
        module, word = source.names.get(name, (source.module, name))
        for _ in range(9):
            if (module, word) in self.classes or module not in self.sources:
                break
            module, word = self.sources[module].names.get(word, ("", word))
        return (module, word) if module in self.sources else ("", word)

    def named(self, source: Source, node: ast.expr) -> Iterator[Class]:
        """The classes that an expression names, as the second argument of `isinstance` does."""
        if isinstance(node, ast.Name):
            yield self.meaning(source, node.id)
        elif isinstance(node, ast.Attribute):
            yield next((c for c in self.classes if c[1] == node.attr and node.attr in self.unique), ("", node.attr))
        elif isinstance(node, ast.Subscript):  # Registry[Task]
            yield from self.named(source, node.value)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    yield from self.named(source, child)

    @cached_property
    def unique(self) -> set[str]:
        return {name for name, n in Counter(name for _, name in self.classes).items() if n == 1}

    @cached_property
    def bases(self) -> dict[Class, set[Class]]:
        """Of every class, all that it inherits from."""
        direct = {c: {b for base in node.bases for b in self.named(self.sources[c[0]], base)}
                  for c, node in self.classes.items()}  # fmt: skip

        def above(c: Class) -> set[Class]:
            return set().union(*({b} | above(b) for b in direct.get(c, set()) - {c}))

        return {c: above(c) for c in self.classes}

    def below(self, names: set[str]) -> list[Class]:
        """The classes that inherit from one of these."""
        return [c for c, above in self.bases.items() if any(name in names for _, name in above)]

    @cached_property
    def model_classes(self) -> set[Class]:
        defined = {c for c in self.classes if self.sources[c[0]].within("models")}
        modules = {c for c in defined if ("", "Module") in self.bases[c]}
        holders = {c for c in defined if "mixers" in attributes(self.classes[c])}
        family = {c for c in defined if self.bases[c] & (modules | holders)} | modules | holders
        more = {c for c in defined if ("", "Protocol") in self.bases[c] or c[1].endswith("Mixer")}
        return family | more | {("", "Module"), ("", "PreTrainedModel")}


def attributes(node: ast.ClassDef) -> set[str]:
    """Names of a class's methods and properties, and of what they set on self."""
    names = {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)}
    return names | {line.name for line in node.body if isinstance(line, ast.FunctionDef)}


def registered(project: Project, c: Class) -> str | None:
    """The name that a class is chosen by: `name` or `kind` in its body, or what its decorator registers it as."""
    node = project.classes[c]
    values = [
        d.args[0] for d in node.decorator_list if isinstance(d, ast.Call) and d.args and "register" in ast.unparse(d)
    ]
    for line in node.body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                pairs = list(zip(target.elts, line.value.elts))
            else:
                pairs = [(target, line.value)]
            keys = ("name", "kind") if ".models." in c[0] else ("name",)  # elsewhere a kind is no name
            values += [value for key, value in pairs if ast.unparse(key) in keys]
    return next((x.value for x in values if isinstance(x, ast.Constant) and isinstance(x.value, str) and x.value), None)
