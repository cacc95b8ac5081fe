"""Hostile imports, files, paths and command lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.support.hostile_configs import TRAIN, VALUES, YAML, Attack, text


def given(*options: str, **sections: str) -> Attack:
    """Return an attack by the options of `train` on a valid config."""
    return Attack(text(**sections), (*TRAIN, *options))


def module(code: str) -> Callable[[], object]:
    """Return a function that writes a user's module, and a config whose model is `bad:Model`."""

    def write() -> None:
        Path("bad.py").write_text(code)
        Path("c.yaml").write_text(text(model='{name: "bad:Model"}'))

    return write


def named(section: str, name: str, more: str = "") -> str:
    """Return a config whose component of a section is imported by a name."""
    return text(**{section: f'{{name: "{name}"{more}}}'})


TOUCH = ', command: "touch pwned"'
IMPORTS: dict[str, Attack] = {
    "os:system": Attack(named("model", "os:system")),
    **{
        f"os:system for {section}": Attack(named(section, "os:system", TOUCH))
        for section in ("data", "model", "task", "optimizer")
    },
    "os:system for a learning rate": Attack(
        text(optimizer='{name: sgd, learning_rate: {name: "os:system", command: "touch pwned"}}')
    ),
    "subprocess:Popen": Attack(
        named("optimizer", "subprocess:Popen", ', args: ["touch", "pwned"]')
    ),
    "builtins:exec": Attack(named("model", "builtins:exec", ", source: \"open('pwned', 'w')\"")),
    "types that are no components": Attack(
        text(
            data='{name: "builtins:type"}',
            model='{name: "builtins:dict"}',
            optimizer='{name: "builtins:int"}',
        ),
    ),
    "sys:exit": Attack(named("optimizer", "sys:exit", ", status: 0")),
    "a component of another family": Attack(
        named("model", "stepctl.optimizers.sgd:SGD", ", learning_rate: 0.1")
    ),
    "a model for an optimizer": Attack(
        named("optimizer", "stepctl.models.mlp:mlp", ", hidden: [3]")
    ),
    "the command line itself": Attack(named("model", "stepctl.cli.main:cli")),
    "the command line's main": Attack(named("model", "stepctl.__main__:main")),
    "names of no module": Attack(
        text(
            data='{name: "a:"}',
            model='{name: ".:x"}',
            task='{name: "..os:path"}',
            optimizer='{name: ":"}',
        ),
    ),
    "names that no module can have": Attack(
        text(
            data='{name: "no\\0:y"}',
            model='{name: "o\\ns:x\\ny"}',
            task='{name: "os:path:join"}',
            optimizer='{name: "os/../x:y"}',
        ),
    ),
    "a name of thirty thousand letters": Attack(text(model="{name: " + "m" * 30_000 + "}")),
    "a module that is no Python": Attack(module("def (")),
    "a module that exits": Attack(module("raise SystemExit(0)")),
    "a module that exits when it is looked into": Attack(
        module("def __getattr__(name):\n    raise SystemExit(0)")
    ),
    "a module that never ends calling itself": Attack(module("def again():\n    again()\nagain()")),
    "a module that complains in lines": Attack(module("raise ValueError('one\\ntwo\\x1b[2J')")),
    "a model that exits": Attack(module("def Model():\n    raise SystemExit(0)")),
}


def there(make: Callable[[str], object], name: str, **sections: str) -> Callable[[], object]:
    """Return a function that writes a config with these sections, and a special file beside it."""

    def write() -> None:
        Path("c.yaml").write_text(text(**sections))
        make(name)

    return write


def loop(name: str) -> None:
    os.symlink(name, name)


def own(path: str) -> tuple[str, ...]:
    return ("train", "--config", path)


CSV = "{name: csv, target: 0, batch_size: 2, path: %s}"
IDX = "{name: idx, batch_size: 2, images: %s, labels: %s}"
ARRAYS = "{name: arrays, batch_size: 2, path: %s}"
HDF5 = "{name: hdf5, batch_size: 2, path: %s}"
PLACES: dict[str, Attack] = {
    "a pipe for a config": Attack(there(os.mkfifo, "pipe"), own("pipe")),
    "a pipe to check": Attack(there(os.mkfifo, "pipe"), ("config", "check", "pipe")),
    "/dev/zero for a config": Attack("", own("/dev/zero")),
    "/dev/null for a config": Attack("", own("/dev/null")),
    "a folder for a config": Attack(there(os.mkdir, "d"), own("d")),
    "a link to itself for a config": Attack(there(loop, "loop"), own("loop")),
    "a path with a line end": Attack("", own("a\nb.yaml")),
    "a path with a terminal's escape": Attack("", own("a\x1b]0;b\x07.yaml")),
    "a path that is no text": Attack("", own("a\udcffb.yaml")),
    "a path with a NUL": Attack("", own("a\0b.yaml")),
    "an empty path": Attack("", own("")),
    "a path of five thousand letters": Attack("", own("a" * 5000)),
    "a pipe for data, csv": Attack(there(os.mkfifo, "pipe", data=CSV % "pipe")),
    "a pipe for data, idx": Attack(there(os.mkfifo, "pipe", data=IDX % ("pipe", "pipe"))),
    "a pipe for data, arrays": Attack(there(os.mkfifo, "pipe", data=ARRAYS % "pipe")),
    "a pipe for data, hdf5": Attack(there(os.mkfifo, "pipe", data=HDF5 % "pipe")),
    "/dev/zero for data, csv": Attack(text(data=CSV % "/dev/zero")),
    "/dev/zero for data, idx": Attack(text(data=IDX % ("/dev/zero", "/dev/zero"))),
    "/dev/zero for data, arrays": Attack(text(data=ARRAYS % "/dev/zero")),
    "/dev/zero for data, hdf5": Attack(text(data=HDF5 % "/dev/zero")),
    "a link to itself for data": Attack(there(loop, "loop", data=CSV % "loop")),
    "data whose path has a line end": Attack(text(data=CSV % '"a\\nb"')),
    "data whose path has a NUL": Attack(text(data=CSV % '"a\\0b"')),
    "a run directory with a NUL": given("--run-dir", "a\0b"),
    "a run directory of three hundred letters": given("--run-dir", "a" * 300),
    "an empty run directory": given("--run-dir", ""),
    "a pipe for a run directory": Attack(there(os.mkfifo, "pipe"), (*TRAIN, "--run-dir", "pipe")),
    "a link to itself for a run directory": Attack(
        there(loop, "loop"), (*TRAIN, "--run-dir", "loop")
    ),
    "a run of three hundred letters": Attack("", ("resume", "a" * 300)),
}

ARGUMENTS: dict[str, Attack] = {
    "--set without a value": given("--set", "seed"),
    "--set without a key": given("--set", "=1"),
    "--set of nothing": given("--set", ""),
    "three broken --set": given(
        "--set",
        "seed",
        "--set",
        "=1",
        "--set",
        "a..b=1",
    ),
    "three wrong --set and a wrong file": given(
        "--set",
        "seed=x",
        "--set",
        "model.hidden=[a]",
        "--set",
        "nosuch=1",
        task="{name: clasification}",
    ),
    "--set of a bomb": given("--set", "model.hidden=&a [*a]"),
    "--set of a tag": given("--set", "seed=!!python/object/apply:os.system ['touch pwned']"),
    "--set of two documents": given("--set", "seed=1\n---\n2"),
    "--set of more keys than one": given("--set", "seed=0\nmodel: {name: linear}"),
    "--set ten thousand deep": given("--set", "model=" + "[" * 10_000),
    "--set of a key five thousand deep": given("--set", ".".join("a" * 5000) + "=1"),
    "--set of a hundred thousand letters": given("--set", "model.hidden=[" + "1," * 50_000 + "]"),
    "--set of a key with a line end": given("--set", "se\ned=0"),
    "--set of half a surrogate": given("--set", "seed=\udcff"),
    "--set of digits of another script": given("--set", "seed=\u0661"),
    "--set through a number": given("--set", "seed.inside=1"),
    "--set past the end of a list": given("--set", "model.hidden.9=1"),
    "--set with blanks": given("--set", " seed = 3"),
    "--num-steps beyond": given("--num-steps", str(1 << 62)),
    "--num-steps of five thousand digits": given("--num-steps", "9" * 5000),
    "--num-steps of nothing": given("--num-steps", ""),
    "--num-steps of nan": given("--num-steps", "nan"),
    "--num-steps in hexadecimal": given("--num-steps", "0x10"),
    "--num-steps in another script": given("--num-steps", "\u0663"),
    "--last-step below 0": given("--last-step", "-1"),
    "both targets, and a wrong file": given(
        "--num-steps",
        "1",
        "--last-step",
        "1",
        seed="x",
    ),
    "an end before the beginning": given(
        "--last-step",
        "1",
        "--set",
        "initial_step=5",
    ),
    "a target twice": given(
        "--num-steps",
        "1",
        "--set",
        "stop.last_step=5",
    ),
    **{
        f"--max-time {value!r}": given("--max-time", value)
        for value in ("", "0", "-1", "nan", "inf", "1e400h", "\u0663h", "1h-30m")
    },
    "a word too many": given("more", "words"),
    "options after the end of options": Attack(text(), ("train", "--", "--config", "c.yaml")),
    "a command that is a terminal's escape": Attack("", ("\x1b[2J\n",)),
    "a step beyond": Attack("", ("resume", "nowhere", "--from-step", "9" * 30)),
    "a kernel that is a path": given("--set", "numerics.blas_kernel='../../etc/passwd'"),
    "more threads than there are": given("--set", "numerics.threads=2147483647"),
}

ALL = {
    name: attack
    for table in (YAML, VALUES, IMPORTS, PLACES, ARGUMENTS)
    for name, attack in table.items()
}
