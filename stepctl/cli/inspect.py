"""`stepctl inspect`: show the contents of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stepctl.cli.options import json_option, refuse_missing
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import printable
from stepctl.system import store_url
from stepctl.system.terminal import say
from stepctl.system.text import align_columns, counted, in_one_line

if TYPE_CHECKING:
    from stepctl.reports.inspect import ArrayContents, CheckpointContents, Inspection, MirrorState

_NO_ARRAY = "-"  # a pattern that matches no path
_MAX_TEXT = 100  # characters of a value
_HEADS = ("path", "shape", "dtype", "count", "min", "max", "mean", "std", "non_finite")


@click.command()
@click.argument("path", metavar="PATH", type=Place(run=True))
@json_option("the contents")
@click.option(
    "--path",
    "pattern",
    default="*",
    metavar="PATTERN",
    help="Show only arrays such as 'params/*', and values such as 'values/accepted'.",
)
@click.option("--step", "step_only", is_flag=True, help="Print only the global step.")
def inspect(path: str, as_json: bool, pattern: str, step_only: bool) -> None:
    """Show the contents of a checkpoint.

    For a run: of its newest good checkpoint, with its newest segment (one train or resume: the
    global steps it covers, and why it ended), and the run and step that it was forked from. PATH may
    be the URL of a mirror: of its newest checkpoint, which is downloaded, unless --step is given.
    """
    if store_url.is_url(path):
        _inspect_mirror(path, pattern, as_json=as_json, step_only=step_only)
        return
    from stepctl.reports.sandboxed import inspect_path
    from stepctl.system.sandbox import Sandbox

    refuse_missing(path)
    if step_only:
        pattern = _NO_ARRAY
    with Sandbox() as sandbox:
        import stepctl.config.yaml  # for the output, loaded while the child starts  # noqa: F401

        inspection = sandbox.call(inspect_path, path, pattern)
    for message in inspection["messages"]:
        say(message)
    if step_only:
        echo(inspection["contents"]["global_step"])
    else:
        _print_inspection(inspection, pattern, as_json)


def _inspect_mirror(url: str, pattern: str, *, as_json: bool, step_only: bool) -> None:
    from stepctl.mirror.store import open_store
    from stepctl.reports import mirror

    store = open_store(url)
    newest = mirror.newest_commit(store)
    if step_only:
        echo(newest.step)
        return
    described = mirror.describe(store, newest)
    inspection = mirror.inspect_mirrored(store, newest, pattern)
    if as_json:
        echo_json({**inspection["contents"], "mirror": described})
        return
    kept = ", ".join(map(str, [described["step"], *described["kept_steps"]]))
    state = "which has ended" if described["released"] else "which may be alive"
    echo(f"{url}  commit {described['epoch']}-{described['seq']}  steps {kept}")
    echo(f"contents    {counted(described['objects'], 'object')}, {described['bytes']:,} bytes")
    echo(f"owner       {described['owner']}, {state}")
    _print_inspection(inspection, pattern, as_json)


def _print_inspection(inspection: Inspection, pattern: str, as_json: bool) -> None:
    from stepctl.config import yaml

    contents = inspection["contents"]
    texts = inspection["value_texts"]
    if not contents["arrays"] and not texts:
        say(f"no array path matches {pattern!r}; a pattern looks like 'params/*'")
    if as_json:
        echo_json(contents)
    else:
        _print_contents(contents, texts, yaml.dumps(contents["config"]))


def _print_contents(contents: CheckpointContents, texts: dict[str, str], config: str) -> None:
    run = printable(contents["run"])
    creator = printable(contents["created_by"])
    echo(f"{contents['file']}  global step {contents['global_step']}  run {run}  by {creator}")
    echo(f"sha256      {contents['sha256']}")
    echo(f"counters    {'  '.join(f'{name} {n}' for name, n in contents['counters'].items())}")
    if contents["relations"] is not None:
        echo(f"relations   {_describe_relations(contents['relations'])}")
    numerics = "  ".join(f"{name} {value}" for name, value in contents["numerics"].items())
    echo(f"numerics    {printable(numerics)}")
    if contents["values"] is None:
        echo(f"parameters  {contents['parameters']:,}")
        _print_columns(contents["config"].get("data"))
    _print_run(contents)
    if contents["arrays"] or not texts:
        echo()
        rows = [_HEADS, *(_cells(array) for array in contents["arrays"])]
        for line in align_columns(rows, left=(0,)):
            echo(line)
    if texts:
        echo("\nvalues")
        lines = [[printable(key), in_one_line(text, _MAX_TEXT)] for key, text in texts.items()]
        for line in align_columns(lines, left=(0, 1)):
            echo(f"  {line}")
    echo("\nconfig")
    for line in config.splitlines():
        echo(f"  {printable(line)}")


def _print_columns(data: object) -> None:
    """Print the columns and the classes of a task's data, if the config names them."""
    from stepctl.reports.columns import described_columns, listed

    if not isinstance(data, dict):
        return
    columns = described_columns(data)
    if columns:
        echo(f"columns     {listed(columns)}")
    class_names = data.get("class_names")
    if isinstance(class_names, list):
        echo(f"classes     {listed(class_names)}")


def _print_run(contents: CheckpointContents) -> None:
    segment = contents.get("segment")
    if segment is not None:
        steps = f"from step {segment['from']} to {segment['to']}, target {segment['target']}"
        end = "running or killed"
        if segment["reason"] is not None:
            end = f"ended {segment['ended']}: {segment['reason']}"
        echo(printable(f"segment     {segment['number']}  {steps}  {end}"))
    mirror = contents.get("mirror")
    if mirror is not None:
        echo(printable(f"mirror      {_describe_mirror(mirror)}"))
    parent = contents.get("parent")
    if parent is not None:
        step = f"at step {parent['step']}  sha256 {parent['sha256']}"
        echo(printable(f"forked from {parent['run']}  {step}"))
        for change in parent["changes"]:
            values = f"{change.get('old')} -> {change.get('new')}"
            echo(printable(f"            {change['key']}: {values}"))


def _describe_mirror(mirror: MirrorState) -> str:
    if mirror["step"] is None:
        text = f"{mirror['url']}  no step yet"
    elif mirror["behind_steps"]:
        text = f"{mirror['url']}  step {mirror['step']}, {mirror['behind_steps']} steps behind"
    else:
        text = f"{mirror['url']}  step {mirror['step']}, the newest"
    if mirror["error"] is not None:
        text += f" ({mirror['error']})"
    return text


def _describe_relations(relations: dict[str, bool]) -> str:
    wrong = [name for name, is_consistent in relations.items() if not is_consistent]
    if wrong:
        return f"{', '.join(wrong)}: inconsistent with global_step"
    return f"{', '.join(relations)}: consistent with global_step"


def _cells(array: ArrayContents) -> list[str]:
    return [
        printable(array["path"]),
        str(tuple(array["shape"])),
        array["dtype"],
        *(_number(array[name]) for name in ("count", "min", "max", "mean", "std", "non_finite")),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
