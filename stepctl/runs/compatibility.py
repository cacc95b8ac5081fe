"""Checks that a checkpoint, a config, the data and this machine belong together."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, TypedDict

from pydantic import ValidationError

from stepctl.checkpoint import codec, names
from stepctl.config import yaml
from stepctl.config.changes import HOOKS, KeyChange, has_other_state, resume_policy
from stepctl.config.model import Config, validate
from stepctl.errors import CheckpointError, ConfigError, NumericsError
from stepctl.rundir.ledger import Ledger
from stepctl.runs.messages import Say
from stepctl.system import blas, shell
from stepctl.training.assembly import Assembly

RESTORE_CONFIG = "restore config.yaml, or pass {allow_change} to stepctl resume"
Changes = list[KeyChange]


class MirrorFacts(TypedDict):
    """The mirror of a segment; `epoch` is None if it could not be claimed at the start."""

    url: str
    epoch: int | None


class StartFacts(TypedDict, total=False):
    """Keys of a segment's first ledger line that not every segment has."""

    exact: bool
    inexact_because: list[str]
    version_before: str  # the stepctl that wrote the restored checkpoint
    changes: Changes
    config: dict[str, Any]  # as changed
    ranks: int
    mode: str
    set_aside: list[str]
    run_id: str
    mirror: MirrorFacts


def changed_keys(ledger: Ledger, changes: Changes) -> set[str]:
    """Return the config keys that an earlier resume changed, or that this one changes."""
    return ledger.changed_keys | {change["key"] for change in changes}


def check_locked_keys(
    file: str,
    text: str,
    plain: Mapping[str, Any],
    may_differ: Collection[str],
    remedy: str = RESTORE_CONFIG,
) -> dict[str, str]:
    """Compare a config with the config `text` of the checkpoint `file`.

    Returns a message for each locked key that differs although `may_differ` has it or a section of
    it. CheckpointError if any other locked key differs; `remedy` ends its message.
    """
    made_with = yaml.flatten(yaml.loads(text, f"{file}:/config").value)  # imports nothing
    differences = {}
    for key, value in yaml.flatten(plain).items():
        saved = made_with.get(key, value)
        if saved == value or resume_policy(key) == "live":
            continue
        # of the hooks, only this config's are imported; the checkpoint's arrays show the others
        if key == HOOKS and isinstance(saved, list) and not has_other_state(value, saved):
            continue
        if not any(yaml.is_below(key, name) for name in may_differ):
            raise CheckpointError(
                "config",
                f"{file}: saved with another config ({key}: {saved}, not {value}); "
                + remedy.format(key=key, allow_change=shell.options("--allow-change", key)),
            )
        differences[key] = f"{file} was saved with {key} {saved}; continuing with {value}"
    return differences


def counters_may_differ(may_differ: Collection[str]) -> bool:
    """Tell whether such keys decide how the optimizers' counters follow the global step."""
    return any(key.partition(".")[0] in ("task", "initial_step") for key in may_differ)


def config_for_watches(header: codec.Header, config: Config) -> Config:
    """Return a config with the sections that a checkpoint was made with, as far as watches use them.

    Its best value and patience refer to them; the run's newest config may have changed since.
    """
    made_with = yaml.loads(header.config, f"{names.file_name(header.global_step)}:/config").value
    plain = config.plain()
    sections = [name for name in ("task", "program", "stop", "evaluate", "hooks") if name in plain]
    kept = {name: made_with.get(name, plain[name]) for name in sections}
    if all(plain[section] == value for section, value in kept.items()):
        return config
    try:
        return validate(plain | kept)
    except ValidationError as error:
        raise CheckpointError(
            "config",
            f"step {header.global_step}: its config is not valid in this version of stepctl",
        ) from error


def moved_files(changes: Changes, config: Config, ledger: Ledger) -> Changes:
    """Return the changes of data paths; none if the ledger has no fingerprint of the data."""
    if ledger.data is None:
        return []
    data_files = config.data_files()
    return [change for change in changes if change["key"] in data_files]


def check_data(
    assembly: Assembly, ledger: Ledger, moved: Changes, say: Say, *, allowed: bool
) -> None:
    """Raise ConfigError if the data changed since the newest segment.

    If a change is `allowed`, all data are read and checked instead.
    """
    if ledger.data is None or assembly.has_data(ledger.data):
        return
    if allowed:
        assembly.check_data(say)
        return
    paths = "".join(
        f"{change['key']}: {change['old']} -> {change['new']}: " for change in moved[:1]
    )
    raise ConfigError(
        f"{paths}{assembly.origins}: the data differ from the ones the run was trained on, so a "
        f"resume would not be exact; restore them, or pass --allow-change {assembly.data_section} to "
        "stepctl resume"
    )


def check_numerics(recorded: str, here: blas.Numerics, say: Say, *, strict: bool) -> StartFacts:
    """Compare a checkpoint's numerics, as JSON, with this process's, and return the facts.

    NumericsError if they differ and `strict` is set.
    """
    differences = blas.numerics_differences(json.loads(recorded), here)
    if not differences:
        return {"exact": True}
    return report_inexact(differences, say, strict=strict)


def report_inexact(differences: list[str], say: Say, *, strict: bool) -> StartFacts:
    """Warn that this machine computes different bits, and return the facts; NumericsError if `strict`."""
    words = "; ".join(differences)
    if strict:
        raise NumericsError(
            f"this machine computes other bits: {words}; resume where they are the same, or drop "
            "--strict-numerics"
        )
    say(
        f"warning: no longer exact: this machine computes other bits ({words}); the ledger records "
        "it"
    )
    return {"exact": False, "inexact_because": differences}
