"""A model checker for the mirror's protocol: an explicit search through interleavings and failures.

    found = explore(Model(n_writers=2, n_commits=2, n_faults=1, n_preemptions=2))
    found.violation  # None, or the invariant that does not hold at the end of found.history

The writers run the transitions of `stepctl.mirror.protocol` themselves. Between any two of their
requests, any other writer may run; every request may fail in these ways:

- It times out: the writer gets StoreUnavailable and repeats the transition. The request takes
  effect at any later moment, or never.
- The writer is killed. The request takes effect at any later moment, or never.
- A listing is empty, or a content is damaged on the way, once in a history.

Every writer takes over at once, as if it had waited in vain for a beat: no clock has to be right.
After every request, these invariants are checked:

- A reader gets the newest acknowledged commit, or a later one that continues it.
- The commit that a reader gets is whole, and so are those that it keeps.
- A manifest that was made before there was a later epoch is whole, until it is deleted.
- A writer is refused or deposed only by another writer. Without a failure of the store, a
  transition succeeds when it is repeated.
- Two writers never own the same epoch.

The search is bounded by the number of faults and of preemptions: changes to another writer while
the one before could go on.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from stepctl.errors import CheckpointError
from stepctl.mirror import names, protocol
from stepctl.mirror.manifest import Contents, Manifest, StoredObject
from stepctl.mirror.names import Key
from stepctl.mirror.protocol import Claim
from stepctl.mirror.reading import read_newest
from stepctl.mirror.store import StoreUnavailable
from stepctl.mirror.transition import (
    Create,
    Delete,
    Get,
    List,
    Locate,
    Put,
    Request,
    Transition,
    Upload,
)
from tests.support.mirrors import make_owner

Objects = frozenset[tuple[str, bytes]]  # names and contents

_FILE = io.BytesIO()
_LEDGER = "ledger.jsonl"
_ENDED = ("done", "deposed", "refused", "killed")
_TOO_LARGE = "too large"  # the reply to a Get that raises CheckpointError


class Model(NamedTuple):
    """What is searched."""

    n_writers: int
    n_commits: int  # of each writer
    n_faults: int
    n_preemptions: int
    keep_last: int = 1
    goes_back: bool = False  # the last writer replaces the newest commit by another of its step
    newer_after_failure: bool = False  # a commit that failed is not repeated: a later step is


class Found(NamedTuple):
    """The result of a search."""

    n_states: int
    violation: str | None
    history: tuple[str, ...]  # of the violation
    outcomes: frozenset[tuple[str, ...]]  # the ends of all writers


class Violation(Exception):
    """An invariant does not hold."""


@dataclasses.dataclass(frozen=True)
class _Held:
    """A claim, with equality."""

    claim: Claim = dataclasses.field(compare=False)
    key: tuple[int, bytes]

    @classmethod
    def of(cls, claim: Claim) -> _Held:
        newest = b"" if claim.newest is None else claim.newest.to_bytes()
        return cls(claim, (claim.epoch, newest))


class _Writer(NamedTuple):
    """The state of a writer: its place in its program, and the replies to its transition."""

    stage: str = "claim"
    held: _Held | None = None
    step: int = 0  # of the commit that it makes next
    n_commits: int = 0
    replies: tuple[Any, ...] = ()
    n_restarts: int = 0  # in succession, because the transition itself found the store wanting


class _State(NamedTuple):
    objects: Objects
    writers: tuple[_Writer, ...]
    pending: tuple[Request, ...] = ()  # timed out; they may still take effect
    acknowledged: frozenset[bytes] = frozenset()  # manifests
    in_time: frozenset[str] = frozenset()  # manifests made before there was a later epoch
    deleted: frozenset[str] = frozenset()  # manifests


class _Node(NamedTuple):
    """A state on the search's stack, with how it was reached."""

    state: _State
    running: int | None  # the writer that ran last
    n_preemptions: int  # that are left
    n_faults: int
    history: tuple[Any, ...]  # the last event, and the history before it


def explore(model: Model, module: ModuleType = protocol) -> Found:
    """Search all histories of a model; `module` has the transitions."""
    return _Search(model, module).run()


class _Search:
    def __init__(self, model: Model, module: ModuleType) -> None:
        self._model = model
        self._protocol = module
        self._visited: dict[tuple[_State, int | None], list[tuple[int, int]]] = {}
        self._next_of: dict[tuple[int, _Writer], tuple[_Writer, Request | None]] = {}
        self._n_states = 0

    def run(self) -> Found:
        model = self._model
        outcomes: set[tuple[str, ...]] = set()
        writers = (_Writer(),) * model.n_writers
        first = _State(frozenset(), writers)
        stack = [_Node(first, None, model.n_preemptions, model.n_faults, ())]
        while stack:
            node = stack.pop()
            if not self._is_new(node):
                continue
            stages = tuple(writer.stage for writer in node.state.writers)
            if all(stage in _ENDED for stage in stages):
                outcomes.add(stages)
            try:
                stack.extend(self._successors(node))
            except Violation as violation:
                history = [*_events(node.history), *violation.args[1:]]
                return Found(self._n_states, violation.args[0], tuple(history), frozenset(outcomes))
        return Found(self._n_states, None, (), frozenset(outcomes))

    def _is_new(self, node: _Node) -> bool:
        """Tell whether no visit of this state had as many faults and preemptions left."""
        visits = self._visited.setdefault((node.state, node.running), [])
        left = (node.n_preemptions, node.n_faults)
        if any(other[0] >= left[0] and other[1] >= left[1] for other in visits):
            return False
        self._n_states += not visits
        visits.append(left)
        return True

    # --- the steps from a state

    def _successors(self, node: _Node) -> Iterator[_Node]:
        state = node.state
        for number, writer in enumerate(state.writers, start=1):
            if writer.stage in _ENDED or self._waits_for_equal(state, number):
                continue
            can_go_on = (
                node.running is not None and state.writers[node.running - 1].stage not in _ENDED
            )
            left = node.n_preemptions - (can_go_on and node.running != number)
            if left >= 0:
                yield from self._requests(node, number, left)
        for index, request in enumerate(state.pending):
            others = state.pending[:index] + state.pending[index + 1 :]
            after, _ = self._effect(state._replace(pending=others), request)
            event = f"the store performs {_shown(request)}, late"
            self._check(after, event)
            yield node._replace(state=after, history=(event, node.history))

    def _waits_for_equal(self, state: _State, number: int) -> bool:
        """Tell whether a writer has not started, and one before it, which is its equal, neither."""
        pair = state.writers[max(number - 2, 0) : number]
        return not self._goes_back(number) and pair == (_Writer(), _Writer())

    def _requests(self, node: _Node, number: int, n_preemptions: int) -> Iterator[_Node]:
        """Yield the states after the next request of a writer, and after its failure."""
        writer, request = self._next(number, node.state.writers[number - 1])
        assert request is not None
        event = f"writer {number}: {writer.stage}: {_shown(request)}"
        after, reply = self._effect(node.state, request)
        answered = writer._replace(replies=(*writer.replies, reply))
        yield self._move(node, number, answered, after, n_preemptions, node.n_faults, event)
        if not node.n_faults:
            return
        wrong = _wrong_reply(reply)
        if wrong is not None and node.n_faults == self._model.n_faults:
            answered = writer._replace(replies=(*writer.replies, wrong))
            lying = f"{event} gets a wrong reply"
            yield self._move(node, number, answered, after, n_preemptions, node.n_faults - 1, lying)
        pending = node.state.pending
        if not isinstance(request, Get | List):
            pending = tuple(sorted((*pending, request), key=_shown))
        after = node.state._replace(pending=pending)
        n_faults = node.n_faults - 1
        repeating = self._after_failure(writer)
        yield self._move(
            node, number, repeating, after, n_preemptions, n_faults, f"{event} times out"
        )
        killed = _Writer(stage="killed")
        yield self._move(
            node, number, killed, after, n_preemptions, n_faults, f"{event}; it is killed"
        )

    def _move(
        self,
        node: _Node,
        number: int,
        writer: _Writer,
        state: _State,
        n_preemptions: int,
        n_faults: int,
        event: str,
    ) -> _Node:
        """Return the node in which a writer has become `writer` in `state`."""
        try:
            writer, _ = self._next(number, writer)
        except Violation as violation:
            raise Violation(*violation.args, event) from None
        before = state.writers[number - 1]
        if writer.n_commits > before.n_commits:
            assert writer.held is not None
            acknowledged = state.acknowledged | {writer.held.key[1]}
            state = state._replace(acknowledged=acknowledged)
        writers = (*state.writers[: number - 1], writer, *state.writers[number:])
        state = state._replace(writers=writers)
        self._check(state, event)
        return _Node(state, number, n_preemptions, n_faults, (event, node.history))

    def _after_failure(self, writer: _Writer) -> _Writer:
        """Return the writer that repeats its transition, or its commit with newer contents."""
        if writer.stage == "commit" and self._model.newer_after_failure:
            return writer._replace(stage="upload", step=writer.step + 1, replies=())
        return writer._replace(replies=())

    # --- the store

    def _effect(self, state: _State, request: Request) -> tuple[_State, Any]:
        """Return the state after a request, and the reply."""
        objects = dict(state.objects)
        match request:
            case Get(name, max_bytes):
                content = objects.get(name)
                if content is not None and len(content) > max_bytes:
                    return state, _TOO_LARGE
                return state, content
            case List(prefix, after):
                found = [name for name in objects if name.startswith(prefix) and name > after]
                return state, tuple(sorted(found))
            case Create(name, content):
                if name in objects:
                    return state, False
                return self._written(state, name, content), True
            case Put(name, content):
                return self._written(state, name, content), None
            case Upload(name):
                return self._written(state, name, b""), None
            case Delete(name):
                objects.pop(name, None)
                state = state._replace(objects=frozenset(objects.items()))
                return self._without(state, name), None
        raise AssertionError(request)

    def _written(self, state: _State, name: str, content: bytes) -> _State:
        objects = {**dict(state.objects), name: content}
        key = names.parse_log(name)
        in_time = state.in_time
        if key is not None and key.seq and name not in state.deleted:
            epochs = [other.epoch for other in map(names.parse_log, objects) if other is not None]
            if max(epochs) == key.epoch:
                in_time |= {name}
        return state._replace(objects=frozenset(objects.items()), in_time=in_time)

    def _without(self, state: _State, name: str) -> _State:
        if names.parse_log(name) is None:
            return state
        return state._replace(in_time=state.in_time - {name}, deleted=state.deleted | {name})

    # --- the program of a writer

    def _next(self, number: int, writer: _Writer) -> tuple[_Writer, Request | None]:
        """Return a writer and its next request, after all transitions that have ended by now."""
        if writer.stage in _ENDED:
            return writer, None
        key = (number, writer)
        if key not in self._next_of:
            self._next_of[key] = self._replay(number, writer)
        return self._next_of[key]

    def _replay(self, number: int, writer: _Writer) -> tuple[_Writer, Request | None]:
        try:
            return writer, _replayed(self._transition(number, writer), writer.replies)
        except StopIteration as end:
            return self._next(number, self._ended(number, writer, end.value))
        except self._protocol.Deposed:
            return writer._replace(stage="deposed", replies=()), None
        except self._protocol.OwnedByAnother:
            return writer._replace(stage="refused", replies=()), None
        except StoreUnavailable:
            if writer.n_restarts:
                raise Violation(f"writer {number} cannot go on") from None
            return self._next(number, writer._replace(replies=(), n_restarts=1))
        except Exception as error:
            raise Violation(f"writer {number} fails: {error}") from error

    def _transition(self, number: int, writer: _Writer) -> Transition[Any]:
        made: Transition[Any]
        if writer.stage == "claim":
            made = self._protocol.claim_mirror(make_owner(number), take_over=True)
            return made
        assert writer.held is not None
        claim = writer.held.claim
        chunk = StoredObject(claim.next_key, self._digest(number, writer.step), 1)
        if writer.stage == "upload":
            made = self._protocol.upload(claim, _FILE, chunk.size, chunk.sha256)
        elif writer.stage == "commit":
            contents = self._contents(number, writer, chunk)
            made = self._protocol.commit(claim, contents, self._model.keep_last)
        else:
            made = self._protocol.collect_garbage(claim)
        return made

    def _digest(self, number: int, step: int) -> str:
        """Return the sha256 of a step's data: the same for all writers that do not go back."""
        return f"{number * self._goes_back(number):032x}{step:032x}"

    def _contents(self, number: int, writer: _Writer, chunk: StoredObject) -> Contents:
        """Return contents whose ledger shows all commits that they continue."""
        assert writer.held is not None
        newest = writer.held.claim.newest
        chunks = () if newest is None else newest.contents.files[_LEDGER]
        if self._goes_back(number) and writer.n_commits == 0:
            chunks = chunks[:-1]
        return Contents(writer.step, chunk, chunk, {_LEDGER: (*chunks, chunk)})

    def _goes_back(self, number: int) -> bool:
        return self._model.goes_back and number == self._model.n_writers

    def _ended(self, number: int, writer: _Writer, result: Any) -> _Writer:
        """Return the writer after its transition returned a result."""
        writer = writer._replace(replies=(), n_restarts=0)
        if writer.stage == "claim":
            held = _Held.of(result)
            newest = result.newest
            step = 0 if newest is None else newest.step + (not self._goes_back(number))
            return writer._replace(stage="upload", held=held, step=step)
        if writer.stage == "upload":
            return writer._replace(stage="commit")
        if writer.stage == "commit":
            n_commits = writer.n_commits + 1
            return writer._replace(stage="collect", held=_Held.of(result), n_commits=n_commits)
        if writer.n_commits == self._model.n_commits:
            return writer._replace(stage="done")
        return writer._replace(stage="upload", step=writer.step + 1)

    # --- the invariants

    def _check(self, state: _State, event: str) -> None:
        problem = self._problem(state)
        if problem is not None:
            raise Violation(problem, event)

    def _problem(self, state: _State) -> str | None:
        objects = dict(state.objects)
        newest = _read_newest(state.objects)
        for content in state.acknowledged:
            if not self._continues(newest, _manifest(content)):
                return f"the acknowledged commit {_manifest(content).key} is lost"
        if newest is not None:
            for key in (newest.key, *(kept.key for kept in newest.previous)):
                if not _is_whole(objects, names.log(key)):
                    return f"commit {key}, which a reader may need, is not whole"
        for name in state.in_time:
            if not _is_whole(objects, name):
                return f"{name} is there, but not whole"
        return self._problem_of_writers(state, objects)

    def _problem_of_writers(self, state: _State, objects: dict[str, bytes]) -> str | None:
        epochs = [writer.held.key[0] for writer in state.writers if writer.held is not None]
        if len(set(epochs)) < len(epochs):
            return "two writers own the same epoch"
        for number, writer in enumerate(state.writers, start=1):
            own = make_owner(number).to_bytes()
            if writer.stage not in ("deposed", "refused"):
                continue
            first = 1 if writer.held is None else writer.held.key[0] + 1
            if not any(_is_owner(name, first) and objects[name] != own for name in objects):
                return f"writer {number} is {writer.stage} by nobody"
        return None

    def _continues(self, newest: Manifest | None, earlier: Manifest) -> bool:
        """Tell whether a commit continues an earlier one, or was meant to replace it."""
        if newest is None:
            return False
        expected = earlier.contents.files[_LEDGER]
        found = newest.contents.files[_LEDGER]
        for index, chunk in enumerate(expected):
            if index == len(found):
                return False
            if found[index] != chunk:
                return self._goes_back(int(found[index].sha256[:32], 16))
        return True


@functools.cache
def _manifest(content: bytes) -> Manifest:
    """Return the manifest in an object's content."""
    import json

    fields = json.loads(content.split(b"\n")[2])
    return Manifest.parse(content, Key(*fields["key"]))


@functools.lru_cache(maxsize=100_000)
def _read_newest(objects: Objects) -> Manifest | None:
    """Return what a reader gets."""
    contents = dict(objects)
    transition = read_newest()
    try:
        request = next(transition)
        while True:
            if isinstance(request, List):
                reply: Any = [name for name in contents if name.startswith(request.prefix)]
            elif isinstance(request, Get):
                reply = contents.get(request.name)
            else:
                reply = "the mirror"
            request = transition.send(reply)
    except StopIteration as end:
        newest: Manifest | None = end.value
        return newest
    except (CheckpointError, StoreUnavailable):
        return None


def _is_whole(objects: dict[str, bytes], name: str) -> bool:
    """Tell whether a manifest and all its data are there."""
    if name not in objects:
        return False
    try:
        stored = _manifest(objects[name]).contents.objects()
    except CheckpointError:
        return False
    return all(one.name in objects for one in stored)


def _replayed(transition: Transition[Any], replies: tuple[Any, ...]) -> Request:
    """Return the first request without a reply; StopIteration with the result if there is none."""
    remaining = list(replies)
    probe: dict[str, bytes] = {}
    request = next(transition)
    while True:
        if _is_local(request):
            reply = _answer_locally(request, probe)
        elif remaining:
            reply = remaining.pop(0)
        else:
            return request
        if reply is _TOO_LARGE:
            request = transition.throw(CheckpointError("mirror", "it is too large"))
        else:
            request = transition.send(reply)


def _wrong_reply(reply: Any) -> Any:
    """Return a reply that a proxy may give instead, None if there is none."""
    if isinstance(reply, tuple):
        return ()
    if isinstance(reply, bytes):
        return reply[:-1]
    return None


def _is_local(request: Request) -> bool:
    """Tell whether a request is about nothing that another writer uses."""
    return isinstance(request, Locate) or names.PROBES in _shown(request)


def _is_owner(name: str, first: int) -> bool:
    """Tell whether a name is that of the owner of an epoch, `first` or later."""
    key = names.parse_log(name)
    return key is not None and key.seq == 0 and key.epoch >= first


def _answer_locally(request: Request, objects: dict[str, bytes]) -> Any:
    match request:
        case Create(name, content):
            is_new = name not in objects
            objects.setdefault(name, content)
            return is_new
        case Get(name):
            return objects.get(name)
        case Locate():
            return "the mirror"
    return None


def _shown(request: Request) -> str:
    name = getattr(request, "name", getattr(request, "prefix", ""))
    return f"{type(request).__name__} {name}"


def _events(history: tuple[Any, ...]) -> list[str]:
    events = []
    while history:
        event, history = history
        events.append(event)
    return events[::-1]
