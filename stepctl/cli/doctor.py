"""`stepctl doctor`: report on this machine."""

from collections.abc import Callable, Iterator
from typing import Any

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import Exit
from stepctl.system.text import in_one_line

Facts = dict[str, Any]  # a part of the report
Lines = Iterator[tuple[str, str]]  # a label and its text


@click.command()
@click.option(
    "--runs",
    "folder",
    default="runs",
    metavar="DIR",
    type=Place(folder=True),
    help="The folder of the runs (default: runs).",
)
@json_option("the report")
def doctor(folder: str, as_json: bool) -> None:
    """Report on this machine, for a bug report.

    The report has versions, CPU, BLAS and its kernels, numba, HDF5, MPI, extras, and the disk. In
    DIR and in the folder for temporary files, the operations that a run depends on are tried and
    their files removed: fsync, flock, rename, O_EXCL, O_APPEND, and a checkpoint. Exit 1 if a
    problem would prevent runs.
    """
    from stepctl.doctor.machine import examine

    report = examine(folder)
    if as_json:
        echo_json(report)
    else:
        for label, text in _lines(report):
            echo(in_one_line(f"{label:<14}{text}"))
    if report["problems"]:
        raise click.exceptions.Exit(Exit.NEGATIVE)


def _lines(report: Facts) -> Lines:
    sections: dict[str, Callable[[Facts], Lines]] = {
        "stepctl": _software,
        "machine": _machine,
        "environment": _environment,
        "numerics": _numerics,
        "kernels": _kernels,
        "compiled": _compiled,
        "hdf5": _hdf5,
        "mpi": _mpi,
        "extras": _extras,
        "runs": _runs,
    }
    for name, lines_of in sections.items():
        part = report[name]
        if "error" in part:
            yield name, f"failed: {part['error']}"
        else:
            yield from lines_of(part)
    for problem in report["problems"]:
        yield "problem", problem


def _software(part: Facts) -> Lines:
    yield "stepctl", part["version"]
    yield "Python", part["python"]
    yield "platform", part["platform"]


def _machine(part: Facts) -> Lines:
    yield "CPU", f"{part['cpu']}; {part['cpus']} CPUs, {part['usable_cpus']} for this process"
    yield "memory", f"{_size(part['memory'])}, {_size(part['available'])} available"


def _environment(part: Facts) -> Lines:
    variables = "  ".join(f"{name}={value}" for name, value in part["variables"].items())
    threads = "any number of threads"
    if part["threads"] is not None:
        threads = f"{part['threads']} threads"
    yield "environment", f"{variables or 'nothing set'}; asks for {threads}"


def _numerics(part: Facts) -> Lines:
    yield "NumPy", part["numpy"]
    for library in part["libraries"] or [{}]:
        name = library.get("internal_api", "unknown")
        version = library.get("version") or ""
        kernel = library.get("architecture", "unknown")
        threads = library.get("num_threads", "?")
        yield "BLAS", f"{name} {version}, kernel {kernel}, {threads} threads"
    yield "fingerprint", "  ".join(f"{name} {value}" for name, value in part["fingerprint"].items())


def _kernels(part: Facts) -> Lines:
    from stepctl.system.blas import KERNEL_VARIABLE

    times = ", ".join(
        f"{milliseconds:.2f} ms with {kernel}"
        for kernel, milliseconds in part["milliseconds"].items()
    )
    product = " x ".join(map(str, part["shape"]))
    advice = ""
    faster = part["faster"]
    if faster is not None:
        advice = (
            f"; faster here: --set numerics.blas_kernel={faster}, or, for scripts too, "
            f"export {KERNEL_VARIABLE}={faster}"
        )
    yield "BLAS kernels", f"a product of {product}: {times}{advice}"


def _compiled(part: Facts) -> Lines:
    if part["numba"] is None:
        yield "compiled", f"no: numba is not installed, updates run in NumPy; {part['pip']}"
        return
    if part["reason"] is not None:
        yield "compiled", f"no: numba {part['numba']}: {part['reason']}; updates run in NumPy"
        return
    kept = f"kept in {part['cache']}"
    if part["cache"] is None:
        kept = "no private cache folder; every run compiles again"
    seconds = part["milliseconds"] / 1000
    yield (
        "compiled",
        f"numba {part['numba']}: updates of long runs, with NumPy's bits ({seconds:.1f} s); {kept}",
    )


def _hdf5(part: Facts) -> Lines:
    outcome = part["reason"]
    if outcome is None:
        outcome = f"a checkpoint reads back to the bit ({part['milliseconds']:.0f} ms)"
    yield "HDF5", f"{part['hdf5']}, h5py {part['h5py']}; {outcome}"


def _mpi(part: Facts) -> Lines:
    mpiexec = f"mpiexec: {part['mpiexec'] or 'not on the PATH'}"
    if part["library"] is None:
        yield "MPI", f"mpi4py is not installed; {part['pip']}; {mpiexec}"
        return
    library = " ".join(part["library"].split())
    rank = f"rank {part['rank']} of {part['ranks']}"
    yield "MPI", f"{library}, MPI {part['standard']}, {rank}; {mpiexec}"


def _extras(part: Facts) -> Lines:
    for name, extra in part.items():
        packages = extra["packages"]
        versions = [f"{package} {version or 'is missing'}" for package, version in packages.items()]
        text = ", ".join(versions)
        if None in packages.values():
            text += f"; {extra['pip']}"
        yield f"  {name}", text


def _runs(part: Facts) -> Lines:
    place = part["path"]
    if part["folder"] != place:
        place += f" (does not exist yet; checked {part['folder']})"
    yield "runs", f"{place}; {part['type']}, {_size(part['free'])} free"
    for trial in part["trials"]:
        outcome = f"fails: {trial['reason']}"
        if trial["reason"] is None:
            outcome = f"{trial['milliseconds']:.2f} ms"
        yield f"  {trial['name']:<28}", outcome


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "?"
    if n_bytes < 1e8:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / 1e9:.1f} GB"
