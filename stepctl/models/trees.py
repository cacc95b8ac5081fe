"""Trees: nested dicts, lists and tuples whose leaves are arrays.

The path of a leaf joins the keys and positions above it: in {"encoder": [(w, b)]} the path of b is
"encoder/0/1".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stepctl.system.text import a_or_an

Tree = Any  # the leaves; containers are dicts, lists and tuples
_MAX_DEPTH = 16


def leaves(tree: Tree) -> dict[str, Any]:
    """Return the leaves by their paths. ValueError for an empty container or a key that is no name."""
    return dict(_leaves(tree, "", 0))


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return a tree with the function's value in the place of each leaf."""
    if type(tree) is dict:
        return {key: map_leaves(function, item) for key, item in tree.items()}
    if type(tree) is list:
        return [map_leaves(function, item) for item in tree]
    if type(tree) is tuple:
        return tuple(map_leaves(function, item) for item in tree)
    return function(tree)


def paths(tree: Tree, path: str = "") -> Tree:
    """Return a tree with its path in the place of each leaf."""
    if type(tree) is dict:
        return {key: paths(item, _below(path, key)) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(paths(item, _below(path, at)) for at, item in enumerate(tree))
    return path


def _leaves(tree: Tree, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    children: Iterable[tuple[object, Tree]]
    if type(tree) is dict:
        children = tree.items()
    elif type(tree) in (list, tuple):
        children = enumerate(tree)
    else:
        yield path, tree
        return
    if not tree:
        raise ValueError(f"{path or 'the whole'} is an empty {type(tree).__name__}; leave it out")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{path} is nested more than {_MAX_DEPTH} levels deep")
    for key, child in children:
        _check_key(key, path, is_dict=type(tree) is dict)
        yield from _leaves(child, _below(path, key), depth + 1)


def _check_key(key: object, path: str, *, is_dict: bool) -> None:
    if not is_dict:
        return
    where = f"{path or 'the top level'}: the key {key!r}"
    if not isinstance(key, str):
        raise ValueError(f"{where} is {a_or_an(type(key).__name__)}; keys must be text")
    if "/" in key:
        raise ValueError(f"{where} has a '/', which separates the levels of a path; rename it")
    if not key:
        raise ValueError(f"{where} is empty; give it a name")


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
