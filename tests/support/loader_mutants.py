"""The loader with one of its checks removed, found by walking its syntax tree."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# module -> the functions and classes that a load uses; each module uses those before it
ROOTS = {
    "stepctl.state.generators": {"decode_bit_generator", "decode_random_state"},
    "stepctl.state.values": {"is_key"},
    "stepctl.state.value_decoder": {"decode"},
    "stepctl.state.program_state": {"restore"},
    "stepctl.checkpoint.user_block": {"open_verified"},
    "stepctl.checkpoint.walk": {"Walk"},
    "stepctl.checkpoint.codec": {"Reader", "restore"},
}
# Checks of the disk: no hostile file triggers them; tests/promises/test_unreadable.py does.
OF_THE_DISK = ("is_unavailable", "read_error")
# Checks of the program's own arrays, which are not in the file: tests/runs/test_loop_exact.py.
OF_THE_PROGRAM = ("array.base",)
FLAGS = {"O_NOFOLLOW", "O_NONBLOCK"}  # of open, that keep something out

Change = Callable[[], None]


@dataclass(frozen=True)
class Check:
    """A check of the loader, by the module and the number at which it is found."""

    module: str
    number: int
    words: str

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}: {self.words}"


def checks() -> list[Check]:
    """Return every check of the loader."""
    return [
        Check(module, number, words)
        for module in ROOTS
        for number, (words, _) in enumerate(_changes(_parsed(module), module))
    ]


def load(check: Check | None) -> None:
    """Replace the loader's modules by ones without the check."""
    for name in ROOTS:
        tree = _parsed(name)
        if check is not None and check.module == name:
            _, change = list(_changes(tree, name))[check.number]
            change()
        module = types.ModuleType(name)
        module.__file__ = str(_path(name))
        sys.modules[name] = module
        package, _, short_name = name.rpartition(".")
        setattr(importlib.import_module(package), short_name, module)
        exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), vars(module))


def _path(module: str) -> Path:
    package, _, name = module.rpartition(".")
    (folder,) = importlib.import_module(package).__path__
    return Path(folder) / f"{name}.py"


def _parsed(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text())


def _changes(tree: ast.Module, module: str) -> Iterator[tuple[str, Change]]:
    for function in _functions(tree, ROOTS[module]):
        for words, change in _changes_of(function):
            if any(part in words for part in (*OF_THE_DISK, *OF_THE_PROGRAM)):
                continue
            yield f"{function.name}: {words}", change


def _functions(tree: ast.Module, wanted: set[str]) -> Iterator[ast.FunctionDef]:
    """Yield the functions that the wanted names are, hold, or lead to."""
    known = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    found = set()
    queue = sorted(wanted)
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
        if isinstance(node, ast.If) and (
            _refuses(node.body) or (predicate and _returns_false(node.body))
        ):
            yield f"if {ast.unparse(node.test)}", _setting(node, "test", ast.Constant(False))
            yield from _operands(node.test)
        elif isinstance(node, ast.If) and _refuses(_last_else(node)):
            yield from _operands(node.test)
            if _refuses(node.orelse):
                yield f"if {ast.unparse(node.test)} ... else", _setting(node, "orelse", [])
        elif (
            isinstance(node, ast.Return) and predicate and not isinstance(node.value, ast.Constant)
        ):
            yield ast.unparse(node), _setting(node, "value", ast.Constant(True))
            yield from _operands(node.value)
        elif isinstance(node, ast.ExceptHandler) and _refuses(node.body):
            assert node.type is not None
            yield f"except {ast.unparse(node.type)}", _setting(node, "body", [ast.Raise()])
        elif _is_call_of_check(node):
            yield ast.unparse(node), _setting(node, "value", ast.Constant(None))
        elif isinstance(node, ast.Try) and any(_refuses(handler.body) for handler in node.handlers):
            yield from _calls(node.body)
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.right, ast.Attribute)
            and node.right.attr in FLAGS
        ):
            yield ast.unparse(node.right), _setting(node, "right", ast.Constant(0))


def _is_call_of_check(node: ast.AST) -> bool:
    """Tell whether a statement calls a function that refuses what it is given."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    return name != "_refuse" and name.lstrip("_").startswith(("refuse", "check"))


def _calls(body: list[ast.stmt]) -> Iterator[tuple[str, Change]]:
    """Yield the removal of each statement that is executed for the error it may raise."""
    for number, statement in enumerate(body):
        if isinstance(statement, ast.Expr):
            yield ast.unparse(statement), _setting(body, number, ast.Pass())


def _refuses(body: list[ast.stmt]) -> bool:
    """Tell whether a block ends in a refusal."""
    last = body[-1] if body else None
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return isinstance(last.value.func, ast.Attribute) and last.value.func.attr == "_refuse"
    return isinstance(last, ast.Raise) and last.exc is not None


def _returns_false(body: list[ast.stmt]) -> bool:
    return (
        isinstance(body[0], ast.Return)
        and isinstance(body[0].value, ast.Constant)
        and body[0].value.value is False
    )


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
                yield (
                    f"{ast.unparse(operand)}  in  {ast.unparse(node)}",
                    _setting(node.values, number, neutral),
                )


def _setting(target: Any, key: str | int, value: object) -> Change:
    if isinstance(key, int):
        return lambda: target.__setitem__(key, value)
    return lambda: setattr(target, key, value)
