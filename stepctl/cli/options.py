"""Options and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepctl.cli.parameter_types import Duration, Setting, StoreURL, WholeNumber
from stepctl.errors import ConfigError
from stepctl.system import files

if TYPE_CHECKING:
    from stepctl.config.model import StopConfig
    from stepctl.config.yaml import Document

F = TypeVar("F", bound=Callable[..., Any])

set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    type=Setting(with_value=True),
    metavar="KEY=VALUE",
    help="Set a config key, such as data.batch_size=32.",
)
take_over_option = click.option(
    "--take-over",
    is_flag=True,
    help="Own the mirror at once, though the process that owns it may be alive.",
)
max_time_option = click.option(
    "--max-time",
    type=Duration(),
    metavar="TIME",
    help="Stop after this time (55m, 1.5h, 1:30:00), with exit code 75.",
)


def target_options(function: F) -> F:
    """Add --num-steps and --last-step."""
    steps = WholeNumber()
    last_step = click.option(
        "--last-step", type=steps, metavar="N", help="Stop at this global step."
    )
    num_steps = click.option(
        "--num-steps", type=steps, metavar="N", help="Stop after this many steps from here."
    )
    return num_steps(last_step(function))


def mirror_options(function: F) -> F:
    """Add --mirror and --take-over."""
    mirror = click.option(
        "--mirror",
        type=StoreURL(),
        metavar="URL",
        help="Keep a copy in object storage: s3://BUCKET/PATH, gs://, az:// or file:///PATH.",
    )
    return mirror(take_over_option(function))


def set_mirror(document: Document, url: str | None) -> None:
    """Set the mirror of a config to the one of the option, if there is one."""
    if url is not None:
        document.put("mirror.url", url, "--mirror")


def verbosity_options(function: F) -> F:
    """Add --quiet and --verbose."""
    verbose = click.option(
        "-v", "--verbose", is_flag=True, help="Also show every row and saved checkpoint."
    )
    quiet = click.option(
        "-q", "--quiet", is_flag=True, help="Show only warnings and errors, no progress."
    )
    return quiet(verbose(function))


def json_option(content: str) -> Callable[[F], F]:
    """Add --json, which prints the `content`."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {content} as JSON.")


def stop_section(num_steps: int | None, last_step: int | None) -> dict[str, int]:
    """Return the target as a `stop` section of a config, empty without the options.

    ConfigError with both.
    """
    if num_steps is not None and last_step is not None:
        raise ConfigError(
            "--num-steps and --last-step: give one (steps from here, or an absolute step)"
        )
    options = {"num_steps": num_steps, "last_step": last_step}
    return {key: n for key, n in options.items() if n is not None}


def stop_config(section: dict[str, int]) -> StopConfig | None:
    """Return the section as a config; None if it is empty. Loads pydantic."""
    from stepctl.config.model import StopConfig

    return StopConfig.model_validate(section) if section else None


def set_target(document: Document, section: dict[str, int]) -> None:
    """Replace the target of a config by the one of the options, if there is one."""
    if not section:
        return
    old = document.value.get("stop")
    stop = dict(old) if isinstance(old, dict) else {}
    target = {"num_steps": None, "last_step": None} | section
    option = "--num-steps" if "num_steps" in section else "--last-step"
    document.put("stop", stop | target, option)


def refuse_missing(path: str) -> None:
    """Raise ConfigError if the path of a run or a checkpoint does not exist."""
    files.refuse_broken_link(path)
    if not files.exists(path):
        raise ConfigError(f"{path}: no such run or checkpoint; list the runs with: stepctl runs")
