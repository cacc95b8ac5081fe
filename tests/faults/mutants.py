"""The loader with one of its checks taken out: found by walking its source, loaded in place of the real one."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "stepctl.checkpoint"
ROOTS = {"userblock": {"open_verified"}, "walk": {"Walk"}, "codec": {"Reader", "restore"}}  # each uses those before it
# What a check asks of the disk and not of a file: no file of a corpus tells of it; tests/test_unreadable.py does.
OF_THE_DISK = ("is_unavailable", "read_error")
FLAGS = {"O_NOFOLLOW", "O_NONBLOCK"}  # of open, that keep something out

Change = Callable[[], None]


@dataclass(frozen=True)
class Check:
    """A check of the loader, by the module and the number at which it is found."""

    module: str
    number: int
    words: str

    def __str__(self) -> str:
        return f"{self.module}: {self.words}"


def checks() -> list[Check]:
    """Return every check of the loader."""
    return [
        Check(module, number, words)
        for module in ROOTS
        for number, (words, _) in enumerate(_changes(_parsed(module), module))
    ]


def load(check: Check | None) -> None:
    """Put the loader's modules anew into place, with the check taken out."""
    package = importlib.import_module(PACKAGE)
    for name in ROOTS:
        tree = _parsed(name)
        if check is not None and check.module == name:
            _, change = list(_changes(tree, name))[check.number]
            change()
        module = types.ModuleType(f"{PACKAGE}.{name}")
        module.__file__ = str(_path(name))
        sys.modules[module.__name__] = module
        setattr(package, name, module)
        exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), vars(module))


def _path(module: str) -> Path:
    (folder,) = importlib.import_module(PACKAGE).__path__
    return Path(folder) / f"{module}.py"


def _parsed(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text())


def _changes(tree: ast.Module, module: str) -> Iterator[tuple[str, Change]]:
    for function in _functions(tree, ROOTS[module]):
        for words, change in _changes_of(function):
            if any(part in words for part in OF_THE_DISK):
                continue
            yield f"{function.name}: {words}", change


def _functions(tree: ast.Module, wanted: set[str]) -> Iterator[ast.FunctionDef]:
    """Yield the functions that the wanted names are, hold, or lead to."""
    known = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found, queue = set(), sorted(wanted)
    while queue:
        name = queue.pop()
        if name in known and name not in found:
            found.add(name)
            queue += [node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in found:
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef))


def _changes_of(function: ast.FunctionDef) -> Iterator[tuple[str, Change]]:
    predicate = isinstance(function.returns, ast.Name) and function.returns.id == "bool"
    for node in ast.walk(function):
        if isinstance(node, ast.If) and (_refuses(node.body) or (predicate and _returns_false(node.body))):
            yield f"if {ast.unparse(node.test)}", _setting(node, "test", ast.Constant(False))
            yield from _operands(node.test)
        elif isinstance(node, ast.If) and _refuses(_last_else(node)):
            yield from _operands(node.test)
            if _refuses(node.orelse):
                yield f"if {ast.unparse(node.test)} ... else", _setting(node, "orelse", [])
        elif isinstance(node, ast.Return) and predicate and not isinstance(node.value, ast.Constant):
            yield ast.unparse(node), _setting(node, "value", ast.Constant(True))
            yield from _operands(node.value)
        elif isinstance(node, ast.ExceptHandler) and _refuses(node.body):
            yield f"except {ast.unparse(node.type)}", _setting(node, "body", [ast.Raise()])
        elif isinstance(node, ast.Try) and any(_refuses(handler.body) for handler in node.handlers):
            for number, statement in enumerate(node.body):
                if isinstance(statement, ast.Expr):  # called for what it raises
                    yield ast.unparse(statement), _setting(node.body, number, ast.Pass())
        elif isinstance(node, ast.BinOp) and isinstance(node.right, ast.Attribute) and node.right.attr in FLAGS:
            yield ast.unparse(node.right), _setting(node, "right", ast.Constant(0))


def _refuses(body: list[ast.stmt]) -> bool:
    """Tell whether a block ends in a refusal."""
    last = body[-1] if body else None
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return isinstance(last.value.func, ast.Attribute) and last.value.func.attr == "_refuse"
    return isinstance(last, ast.Raise) and last.exc is not None


def _returns_false(body: list[ast.stmt]) -> bool:
    return isinstance(body[0], ast.Return) and isinstance(body[0].value, ast.Constant) and body[0].value.value is False


def _last_else(node: ast.If) -> list[ast.stmt]:
    while len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        node = node.orelse[0]
    return node.orelse


def _operands(test: ast.expr | None) -> Iterator[tuple[str, Change]]:
    """Yield each part of a condition, to be taken out of it."""
    for node in ast.walk(test) if test is not None else ():
        if isinstance(node, ast.BoolOp):
            for number, operand in enumerate(node.values):
                neutral = ast.Constant(isinstance(node.op, ast.And))
                yield f"{ast.unparse(operand)}  in  {ast.unparse(node)}", _setting(node.values, number, neutral)


def _setting(target: object, key: str | int, value: object) -> Change:
    if isinstance(key, int):
        return lambda: target.__setitem__(key, value)
    return lambda: setattr(target, key, value)
