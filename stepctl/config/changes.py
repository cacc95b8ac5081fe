"""Changes of a config on a resume: which keys changed, and whether a resume may change them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypedDict

from stepctl.config import registry
from stepctl.config.model import Config, NumericsConfig, top_level_field
from stepctl.config.yaml import differing_keys, flatten, is_below
from stepctl.errors import ConfigError
from stepctl.system.shell import options
from stepctl.system.text import did_you_mean

HOOKS = "hooks"  # the key whose policy depends on the hooks' classes


class KeyChange(TypedDict):
    """A dotted key with its old and new value; None where the key is absent."""

    key: str
    old: Any
    new: Any


def find_changes(old: Config, new: Config) -> list[KeyChange]:
    """Return every key whose value differs."""
    before = flatten(old.plain())
    after = flatten(new.plain())
    return [
        KeyChange(key=key, old=before.get(key), new=after.get(key))
        for key in differing_keys(before, after)
    ]


def refuse_unknown_keys(allowed: Iterable[str], *configs: Config) -> None:
    """Raise ConfigError if an `--allow-change` names no key or section of the configs."""
    keys = sorted({key for config in configs for key in flatten(config.plain())})
    for name in allowed:
        if not any(is_below(key, name) for key in keys):
            raise ConfigError(f"--allow-change {name}: no such key{did_you_mean(name, keys)}")


def refuse_locked_changes(
    changes: Iterable[KeyChange], allowed: Iterable[str], *, in_script: bool = False
) -> None:
    """Raise ConfigError if a locked key changed that no `--allow-change` names or includes.

    A script (`in_script`) has no such option.
    """
    sections = [*allowed]
    problems = []
    for change in changes:
        key = change["key"]
        old = change["old"]
        if any(is_below(key, name) for name in sections):
            continue
        if is_locked_change(key, old, change["new"]):
            remedy = f"pass {options('--allow-change', key)} to stepctl resume"
            if in_script:
                remedy = "start a new run in another directory"
            problems.append(
                f"{key}: {old} -> {change['new']} would change the result, so a resume refuses it; "
                f"keep {old}, or {remedy}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def is_locked_change(key: str, old: Any, new: Any) -> bool:
    """Tell whether a change of a dotted key needs --allow-change."""
    if key != HOOKS:
        return resume_policy(key) == "locked"
    return has_other_state(old, new) or has_other_state(new, old)


def has_other_state(hooks: Iterable[dict[str, Any]], others: Collection[Any]) -> bool:
    """Tell whether a hook with state is not among the others.

    Hooks that are not among the others are imported; those that cannot be imported count as hooks
    with state.
    """
    return any(
        registry.overrides("hook", spec["name"], "state") for spec in hooks if spec not in others
    )


def resume_policy(key: str) -> str:
    """Return the resume policy of a dotted key: "live", "locked", or for hooks both."""
    section, _, name = key.partition(".")
    field = top_level_field(section)
    assert field is not None
    assert isinstance(field.json_schema_extra, dict)
    policy = field.json_schema_extra["resume"]
    if section == "numerics" and name:  # a section with keys of both kinds
        own = NumericsConfig.model_fields[name].json_schema_extra
        if isinstance(own, dict):
            policy = own["resume"]
    return str(policy)
