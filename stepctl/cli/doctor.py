"""`stepctl doctor`: what this machine has, for a bug report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import click

from stepctl.cli.options import Place
from stepctl.cli.pipes import echo
from stepctl.errors import Exit

Line = tuple[str, str]  # a label, and what it says


@click.command()
@click.option(
    "--runs", "folder", default="runs", metavar="DIR", type=Place(folder=True), help="Where runs are kept (runs)."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(folder: str, as_json: bool) -> None:
    """Show what this machine has, for a bug report: versions, CPU, BLAS, HDF5, MPI, extras, and the disk.

    In the folder where runs are kept, and in that for temporary files, what a run rests on is tried, and removed again:
    fsync, flock, rename, O_EXCL, O_APPEND; a checkpoint. Exits with 1 if something would keep runs from working.
    """
    from stepctl.doctor import examine
    from stepctl.problems import in_one_line

    found = examine(folder)
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        for label, text in _lines(found):
            echo(in_one_line(f"{label:<14}{text}"))
    if found["problems"]:
        raise click.exceptions.Exit(Exit.NEGATIVE)


def _lines(found: dict[str, Any]) -> Iterator[Line]:
    shown: dict[str, Callable[[dict[str, Any]], Iterator[Line]]] = {
        "stepctl": _software,
        "machine": _machine,
        "environment": _environment,
        "numerics": _numerics,
        "hdf5": _hdf5,
        "mpi": _mpi,
        "extras": _extras,
        "runs": _runs,
    }
    for name, show in shown.items():
        yield from [(name, f"failed: {found[name]['error']}")] if "error" in found[name] else show(found[name])
    yield from (("problem", problem) for problem in found["problems"])


def _software(part: dict[str, Any]) -> Iterator[Line]:
    yield "stepctl", part["version"]
    yield "Python", part["python"]
    yield "platform", part["platform"]


def _machine(part: dict[str, Any]) -> Iterator[Line]:
    yield "CPU", f"{part['cpu']}; {part['cpus']} CPUs, {part['usable_cpus']} for this process"
    yield "memory", f"{_size(part['memory'])}, {_size(part['available'])} available"


def _environment(part: dict[str, Any]) -> Iterator[Line]:
    variables = "  ".join(f"{name}={value}" for name, value in part["variables"].items())
    asked = "any number of threads" if part["threads"] is None else f"{part['threads']} threads"
    yield "environment", f"{variables or 'nothing set'}; asks for {asked}"


def _numerics(part: dict[str, Any]) -> Iterator[Line]:
    yield "NumPy", part["numpy"]
    for library in part["libraries"] or [{}]:
        name, kernel = library.get("internal_api", "unknown"), library.get("architecture", "unknown")
        yield (
            "BLAS",
            f"{name} {library.get('version') or ''}, kernel {kernel}, {library.get('num_threads', '?')} threads",
        )
    yield "fingerprint", "  ".join(f"{name} {value}" for name, value in part["fingerprint"].items())


def _hdf5(part: dict[str, Any]) -> Iterator[Line]:
    well = f"a checkpoint reads back to the bit ({part['milliseconds']:.0f} ms)"
    yield "HDF5", f"{part['hdf5']}, h5py {part['h5py']}; {part['reason'] or well}"


def _mpi(part: dict[str, Any]) -> Iterator[Line]:
    where = part["mpiexec"] or "not on the PATH"
    if part["library"] is None:
        yield "MPI", f"mpi4py is not installed; {part['pip']}; mpiexec: {where}"
        return
    library = " ".join(part["library"].split())
    yield "MPI", f"{library}, MPI {part['standard']}, rank {part['rank']} of {part['ranks']}; mpiexec: {where}"


def _extras(part: dict[str, Any]) -> Iterator[Line]:
    for extra, facts in part.items():
        versions = ", ".join(f"{name} {version or 'is missing'}" for name, version in facts["packages"].items())
        remedy = "" if all(facts["packages"].values()) else f"; {facts['pip']}"
        yield f"  {extra}", f"{versions}{remedy}"


def _runs(part: dict[str, Any]) -> Iterator[Line]:
    there = "" if part["folder"] == part["path"] else f" (not there yet; looked at {part['folder']})"
    yield "runs", f"{part['path']}{there}; {part['type']}, {_size(part['free'])} free"
    for trial in part["trials"]:
        how = f"fails: {trial['reason']}" if trial["reason"] else f"{trial['milliseconds']:.2f} ms"
        yield f"  {trial['name']:<28}", how


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
