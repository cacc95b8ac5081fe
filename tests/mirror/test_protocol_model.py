"""The protocol under every interleaving and failure, within the bounds of each model.

The checker itself is tested: without any one rule of the protocol, it finds a history in which a
commit is lost, or a writer is refused without need.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from stepctl.mirror import names, protocol, reading, transition
from stepctl.mirror.names import Key
from tests.support.mirror_model import Found, Model, explore

ALONE = Model(n_writers=1, n_commits=2, n_faults=2, n_preemptions=0, newer_after_failure=True)
SMALL = Model(n_writers=2, n_commits=1, n_faults=1, n_preemptions=1)
KEEPING = Model(n_writers=2, n_commits=2, n_faults=1, n_preemptions=0, keep_last=2)
TWO_COMMITS = Model(n_writers=2, n_commits=2, n_faults=0, n_preemptions=2)
BACK = Model(2, 2, n_faults=0, n_preemptions=2, keep_last=2, goes_back=True)
MODELS = {
    "one writer": Model(1, 3, n_faults=2, n_preemptions=0, keep_last=2),
    "one writer, newer contents after a failure": ALONE,
    "two writers": SMALL,
    "two writers, two commits": TWO_COMMITS,
    "two writers, one after the other": KEEPING,
    "three writers": Model(3, 1, n_faults=0, n_preemptions=1),
    "a run that goes back": BACK,
}
LARGE_MODELS = {
    "one writer, four faults": Model(1, 3, 4, 0, keep_last=2),
    "two writers, two commits": Model(2, 2, 1, 3),
    "two writers, two faults": Model(2, 1, 2, 2, newer_after_failure=True),
    "three writers": Model(3, 1, 1, 2),
    "a run that goes back": Model(2, 2, 1, 3, keep_last=2, goes_back=True),
    "three commits": Model(2, 3, 1, 2, keep_last=2),
}


def report(found: Found) -> str:
    return "\n".join([str(found.violation), *found.history])


explored = functools.cache(explore)


@pytest.mark.training
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_protocol_is_safe(model: Model, figure: Callable[[str, int], None]) -> None:
    found = explored(model)
    assert found.violation is None, report(found)
    figure("states of the mirror's protocol", found.n_states)
    assert ("done",) * model.n_writers in found.outcomes


@pytest.mark.training
def test_writers_are_deposed_refused_and_killed_in_the_search() -> None:
    stages = {stage for outcome in explored(SMALL).outcomes for stage in outcome}
    assert stages == {"done", "deposed", "refused", "killed"}


@pytest.mark.faults
@pytest.mark.parametrize("model", LARGE_MODELS.values(), ids=LARGE_MODELS)
def test_the_protocol_is_safe_in_large_models(
    model: Model, figure: Callable[[str, int], None]
) -> None:
    found = explore(model)
    assert found.violation is None, report(found)
    figure("states of the mirror's protocol", found.n_states)


# --- the rules of the protocol

CREATE = "        if created:\n            return True\n"
LOOK = """\
    keys = yield from read_log(manifest.key, after=names.owner(claim.epoch))
    if keys[-1].epoch > claim.epoch:
        raise (yield from _deposed(claim))
"""
EARLY_LOOK = LOOK.replace("manifest.key", "Key(claim.epoch, 0)").replace(
    "after=names.owner", "after=names.beat"
)
ATTEMPTS = "    for _ in range(_ATTEMPTS):\n        name = names.log(manifest.key)\n"
READ_NEWEST = "    newest = yield from read_newest(announce, expected=Key(epoch, 0))\n"
FIRST_LISTING = "    keys = yield from read_log()\n    epoch"
DELETE_MANIFESTS = "    for key in old:\n        yield Delete(names.log(key))\n"
DELETE_DATA = "    for name in unused:\n        yield Delete(name)\n"
AGAIN = (
    "        content = yield from get(name, max_bytes)  # the damage may be the transmission's\n"
)
CREATE_OWNER = "    if (yield from create(names.owner(epoch), owner.to_bytes())):\n        return\n"

LOST = "the acknowledged commit .* is lost"
PARTIAL = "which a reader may need, is not whole"

Edit = tuple[ModuleType, str, str]

# For each rule: the edits of the source that break it, what is found then, and in which model.
RULES: dict[str, tuple[list[Edit], str, Model]] = {
    "a listing must contain what is known to be there": (
        [
            (protocol, READ_NEWEST, READ_NEWEST.replace(", expected=Key(epoch, 0)", "")),
            (reading, "elif keys or not (yield from exists(names.owner(1))):", "else:"),
        ],
        LOST,
        SMALL,
    ),
    "what is damaged is read again": (
        [(reading, AGAIN, "        raise\n")],
        LOST,
        KEEPING,
    ),
    "a commit looks for a successor": (
        [(protocol, LOOK, "")],
        LOST,
        SMALL,
    ),
    "it looks when its manifest is there, not before": (
        [(protocol, LOOK, ""), (protocol, ATTEMPTS, EARLY_LOOK + ATTEMPTS)],
        LOST,
        SMALL,
    ),
    "a claim reads the newest commit when its owner is there, not before": (
        [
            (protocol, READ_NEWEST, ""),
            (protocol, FIRST_LISTING, f"    newest = yield from read_newest()\n{FIRST_LISTING}"),
        ],
        LOST,
        SMALL,
    ),
    "an owner is created only if absent": (
        [
            (
                protocol,
                CREATE_OWNER,
                CREATE_OWNER.replace("yield from create", "yield Put").replace("if (", "if not ("),
            )
        ],
        "two writers own the same epoch",
        SMALL,
    ),
    "an object that exists is read back: it may be another's": (
        [(transition, CREATE, CREATE.replace("created", 'created or name.startswith("log/")'))],
        "two writers own the same epoch",
        SMALL,
    ),
    "an object that exists is read back: it may be one's own": (
        [
            (transition, CREATE, "        return created\n"),
            (protocol, "    if other != owner:\n        raise", "    raise"),
        ],
        "writer 1 is refused by nobody",
        ALONE,
    ),
    "a commit whose name is taken by an earlier attempt gets another": (
        [
            (
                protocol,
                "        if (yield from create(name, content)):\n            break\n",
                "        yield from create(name, content)\n        break\n",
            )
        ],
        LOST,
        ALONE,
    ),
    "a commit keeps no commit of a later step": (
        [(protocol, " if one.step < step]", "]")],
        "is there, but not whole",
        BACK,
    ),
    "the collector deletes nothing that is kept": (
        [(protocol, " and key not in kept]", "]")],
        PARTIAL,
        BACK,
    ),
    "the collector deletes manifests before their data": (
        [(protocol, DELETE_MANIFESTS, ""), (protocol, DELETE_DATA, DELETE_DATA + DELETE_MANIFESTS)],
        "is there, but not whole",
        ALONE,
    ),
    "the collector deletes no data of later commits": (
        [(protocol, " and parsed[0] <= newest", "")],
        PARTIAL,
        TWO_COMMITS,
    ),
}


def broken(edits: list[Edit]) -> ModuleType:
    """Return a copy of the protocol's module with edits, there or in the functions it imports."""
    modules = (transition, reading, protocol)
    sources = {module: Path(str(module.__file__)).read_text() for module in modules}
    for module, old, new in edits:
        assert sources[module].count(old) == 1, f"{module.__name__}: {old!r}"
        sources[module] = sources[module].replace(old, new)
    copies: dict[str, ModuleType] = {}
    for module, source in sources.items():
        copies[module.__name__] = _executed(module, source, copies)
    return copies[protocol.__name__]


def _executed(module: ModuleType, source: str, imported: dict[str, ModuleType]) -> ModuleType:
    """Return a copy of a module whose functions call those of the copies that it imports."""
    copy = ModuleType(module.__name__)
    exec(compile(source, str(module.__file__), "exec"), vars(copy))
    for name, value in list(vars(copy).items()):
        if isinstance(value, type):
            if value.__module__ == transition.__name__:
                setattr(copy, name, getattr(transition, name))  # requests keep their classes
        elif isinstance(value, FunctionType) and value.__module__ in imported:
            setattr(copy, name, getattr(imported[value.__module__], name))
    return copy


@pytest.mark.training
@pytest.mark.parametrize(("edits", "violation", "model"), RULES.values(), ids=RULES)
def test_no_rule_can_be_dropped(edits: list[Edit], violation: str, model: Model) -> None:
    found = explore(model, broken(edits))
    assert found.violation is not None
    assert re.search(violation, found.violation), report(found)


def test_data_is_not_named_by_its_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that is deposed may delete what its successor has just uploaded again."""
    first = Key(1, 1)
    monkeypatch.setattr(names, "data", lambda key, sha256: f"{names.DATA}{first}-{sha256}")
    found = explore(TWO_COMMITS)
    assert found.violation is not None
    assert re.search(PARTIAL, found.violation), report(found)
