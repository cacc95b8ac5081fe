"""More that is out to hurt: what a config imports, odd files and paths, and the words of a command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hostile_texts import TOO_DEEP, TRAIN, VALUES, YAML, Attack, text


def given(*options: str, lines: list[str], **sections: str) -> Attack:
    """Return an attack by options on a good config."""
    return Attack(text(**sections), lines, (*TRAIN, *options))


def usage(command: str, line: str) -> list[str]:
    """Return the answer to a command line that is not understood."""
    return [f"Usage: stepctl {command}", f"Try 'stepctl {command}", "", f"Error: {line}"]


def module(code: str) -> Callable[[], object]:
    """Return what writes a module of the user's, and a config whose model is `bad:Model` in it."""

    def write() -> None:
        Path("bad.py").write_text(code)
        Path("c.yaml").write_text(text(model='{name: "bad:Model"}'))

    return write


def named(section: str, name: str, more: str = "") -> str:
    """Return a config with a component imported by this name."""
    return text(**{section: f'{{name: "{name}"{more}}}'})


TOUCH = ', command: "touch pwned"'
IMPORTS: dict[str, Attack] = {
    "os:system": Attack(
        named("model", "os:system"), ["c.yaml:3:15: model.name: cannot use 'os:system': it is no Model; "]
    ),
    **{
        f"os:system for {section}": Attack(
            named(section, "os:system", TOUCH), [f"c.yaml:{at}: {section}.name: cannot use 'os:system': it is no "]
        )
        for section, at in (("data", "2:14"), ("model", "3:15"), ("task", "4:14"), ("optimizer", "5:19"))
    },
    "os:system for a learning rate": Attack(
        text(optimizer='{name: sgd, learning_rate: {name: "os:system", command: "touch pwned"}}'),
        ["c.yaml:5:46: optimizer.learning_rate.name: cannot use 'os:system': it is no Schedule; "],
    ),
    "subprocess:Popen": Attack(
        named("optimizer", "subprocess:Popen", ', args: ["touch", "pwned"]'),
        ["c.yaml:5:19: optimizer.name: cannot use 'subprocess:Popen': it is no Optimizer; "],
    ),
    "builtins:exec": Attack(
        named("model", "builtins:exec", ", source: \"open('pwned', 'w')\""),
        ["c.yaml:3:15: model.name: cannot use 'builtins:exec': it is no Model; "],
    ),
    "types that are no components": Attack(
        text(data='{name: "builtins:type"}', model='{name: "builtins:dict"}', optimizer='{name: "builtins:int"}'),
        [
            "c.yaml:2:14: data.name: cannot use 'builtins:type': ",
            "c.yaml:3:15: model.name: cannot use 'builtins:dict': ",
            "c.yaml:5:19: optimizer.name: cannot use 'builtins:int': ",
        ],
    ),
    "antigravity:fly": Attack(
        named("model", "antigravity:fly"),
        ["c.yaml:3:15: model.name: cannot use 'antigravity:fly': module 'antigravity' has no "],
    ),
    "sys:exit": Attack(
        named("optimizer", "sys:exit", ", status: 0"),
        ["c.yaml:5:19: optimizer.name: cannot use 'sys:exit': it is no Optimizer; "],
    ),
    "a component of another family": Attack(
        named("model", "stepctl.optimizers.sgd:SGD", ", learning_rate: 0.1"),
        ["c.yaml:3:15: model.name: cannot use 'stepctl.optimizers.sgd:SGD': "],
    ),
    "a model for an optimizer": Attack(
        named("optimizer", "stepctl.models.mlp:mlp", ", hidden: [3]"),
        ["c.yaml:5:19: optimizer.name: cannot use 'stepctl.models.mlp:mlp': "],
    ),
    "the command line itself": Attack(named("model", "stepctl.cli.main:cli"), ["c.yaml:3:15: model.name: "]),
    "the command line's main": Attack(named("model", "stepctl.__main__:main"), ["c.yaml:3:"]),
    "names of no module": Attack(
        text(data='{name: "a:"}', model='{name: ".:x"}', task='{name: "..os:path"}', optimizer='{name: ":"}'),
        [
            "c.yaml:2:14: data.name: cannot use 'a:': ",
            "c.yaml:3:15: model.name: cannot use '.:x': ",
            "c.yaml:4:14: task.name: cannot use '..os:path': ",
            "c.yaml:5:19: optimizer.name: cannot use ':': ",
        ],
    ),
    "names that no module can have": Attack(
        text(
            data='{name: "no\\0:y"}',
            model='{name: "o\\ns:x\\ny"}',
            task='{name: "os:path:join"}',
            optimizer='{name: "os/../x:y"}',
        ),
        [
            "c.yaml:2:14: data.name: cannot use 'no\\x00:y': ",
            "c.yaml:3:15: model.name: cannot use 'o\\ns:x\\ny': ",
            "c.yaml:4:14: task.name: cannot use 'os:path:join': ",
            "c.yaml:5:19: optimizer.name: cannot use 'os/../x:y'",
        ],
    ),
    "a name of thirty thousand letters": Attack(
        text(model="{name: " + "m" * 30_000 + "}"), ["c.yaml:3:15: model.name: no models component is called 'mmm"]
    ),
    "a module that is no Python": Attack(
        module("def ("), ["c.yaml:3:15: model.name: cannot use 'bad:Model': invalid "]
    ),
    "a module that exits": Attack(module("raise SystemExit(0)"), ["c.yaml:3:15: model.name: cannot use 'bad:Model'"]),
    "a module that exits when it is looked into": Attack(
        module("def __getattr__(name):\n    raise SystemExit(0)"), ["c.yaml:3:15: model.name: cannot use 'bad:Model'"]
    ),
    "a module that never ends calling itself": Attack(
        module("def again():\n    again()\nagain()"), ["c.yaml:3:15: model.name: cannot use 'bad:Model': maximum "]
    ),
    "a module that complains in lines": Attack(
        module("raise ValueError('one\\ntwo\\x1b[2J')"), ["c.yaml:3:15: model.name: cannot use 'bad:Model': one"]
    ),
    "a model that exits": Attack(module("def Model():\n    raise SystemExit(0)"), ["c.yaml:3:8: model: bad:Model"]),
}


def there(make: Callable[[str], object], name: str, **sections: str) -> Callable[[], object]:
    """Return what makes something odd of this name beside a config with these sections."""

    def write() -> None:
        Path("c.yaml").write_text(text(**sections))
        make(name)

    return write


def loop(name: str) -> None:
    os.symlink(name, name)


def own(path: str) -> tuple[str, ...]:
    return ("train", "--config", path)


IRREGULAR = "not a regular file; copy its content into one"
TOO_LONG = f"'{'a' * 60}': File name too long; give another path."
CSV = "{name: csv, target: 0, batch_size: 2, path: %s}"
IDX = "{name: idx, batch_size: 2, images: %s, labels: %s}"
ARRAYS, HDF5 = "{name: arrays, batch_size: 2, path: %s}", "{name: hdf5, batch_size: 2, path: %s}"
PLACES: dict[str, Attack] = {
    "a pipe for a config": Attack(there(os.mkfifo, "pipe"), [f"pipe: cannot be read: {IRREGULAR}"], own("pipe")),
    "a pipe to check": Attack(
        there(os.mkfifo, "pipe"), [f"pipe: cannot be read: {IRREGULAR}"], ("config", "check", "pipe")
    ),
    "/dev/zero for a config": Attack("", [f"/dev/zero: cannot be read: {IRREGULAR}"], own("/dev/zero")),
    "/dev/null for a config": Attack("", [f"/dev/null: cannot be read: {IRREGULAR}"], own("/dev/null")),
    "a folder for a config": Attack(there(os.mkdir, "d"), ["d: cannot be read: Is a directory; "], own("d")),
    "a link to itself for a config": Attack(
        there(loop, "loop"), usage("train", "Invalid value for '--config': 'loop': "), own("loop")
    ),
    "a path with a line end": Attack("", ["a\\nb.yaml: cannot be read: No such file "], own("a\nb.yaml")),
    "a path with a terminal's escape": Attack(
        "", ["a\\x1b]0;b\\x07.yaml: cannot be read: No such file "], own("a\x1b]0;b\x07.yaml")
    ),
    "a path that is no text": Attack("", ["a\\udcffb.yaml: cannot be read: No such file"], own("a\udcffb.yaml")),
    "a path with a NUL": Attack(
        "", usage("train", "Invalid value for '--config': 'a\\x00b.yaml': embedded null byte; "), own("a\0b.yaml")
    ),
    "an empty path": Attack("", usage("train", "Invalid value for '--config': it is empty; give a path."), own("")),
    "a path of five thousand letters": Attack(
        "", usage("train", f"Invalid value for '--config': {TOO_LONG}"), own("a" * 5000)
    ),
    "a pipe for data, csv": Attack(
        there(os.mkfifo, "pipe", data=CSV % "pipe"), [f"HERE/pipe: cannot be read as CSV: {IRREGULAR}"]
    ),
    "a pipe for data, idx": Attack(
        there(os.mkfifo, "pipe", data=IDX % ("pipe", "pipe")), [f"HERE/pipe: cannot be read as IDX: {IRREGULAR}"]
    ),
    "a pipe for data, arrays": Attack(
        there(os.mkfifo, "pipe", data=ARRAYS % "pipe"),
        [f"HERE/pipe: cannot be read as a NumPy archive (.npz): {IRREGULAR}"],
    ),
    "a pipe for data, hdf5": Attack(
        there(os.mkfifo, "pipe", data=HDF5 % "pipe"), [f"HERE/pipe: cannot be read as HDF5: {IRREGULAR}"]
    ),
    "/dev/zero for data, csv": Attack(text(data=CSV % "/dev/zero"), [f"/dev/zero: cannot be read as CSV: {IRREGULAR}"]),
    "/dev/zero for data, idx": Attack(
        text(data=IDX % ("/dev/zero", "/dev/zero")), [f"/dev/zero: cannot be read as IDX: {IRREGULAR}"]
    ),
    "/dev/zero for data, arrays": Attack(
        text(data=ARRAYS % "/dev/zero"), [f"/dev/zero: cannot be read as a NumPy archive (.npz): {IRREGULAR}"]
    ),
    "/dev/zero for data, hdf5": Attack(
        text(data=HDF5 % "/dev/zero"), [f"/dev/zero: cannot be read as HDF5: {IRREGULAR}"]
    ),
    "a link to itself for data": Attack(
        there(loop, "loop", data=CSV % "loop"), ["HERE/loop: cannot be read as CSV: Too many levels "]
    ),
    "data whose path has a line end": Attack(text(data=CSV % '"a\\nb"'), ["HERE/a\\nb: no such file; "]),
    "data whose path has a NUL": Attack(
        text(data=CSV % '"a\\0b"'), ["c.yaml:2:51: data.path: 'HERE/a\\x00b' is no path "]
    ),
    "a run directory with a NUL": given(
        "--run-dir",
        "a\0b",
        lines=usage("train", "Invalid value for '--run-dir': 'a\\x00b': embedded null byte; give another path."),
    ),
    "a run directory of three hundred letters": given(
        "--run-dir", "a" * 300, lines=usage("train", f"Invalid value for '--run-dir': {TOO_LONG}")
    ),
    "an empty run directory": given(
        "--run-dir", "", lines=usage("train", "Invalid value for '--run-dir': it is empty; give a path.")
    ),
    "a pipe for a run directory": Attack(
        there(os.mkfifo, "pipe"), ["pipe: not a directory to keep a run in: "], (*TRAIN, "--run-dir", "pipe")
    ),
    "a link to itself for a run directory": Attack(
        there(loop, "loop"), usage("train", "Invalid value for '--run-dir': 'loop': "), (*TRAIN, "--run-dir", "loop")
    ),
    "a run of three hundred letters": Attack(
        "", usage("resume", f"Invalid value for 'RUN': {TOO_LONG}"), ("resume", "a" * 300)
    ),
}

RANGE = "is not in the range 0<=x<=4611686018427387903."
KEY_VALUE = "give KEY=VALUE, such as optimizer.learning_rate=1e-3"
NO_TIME = "is no time above 0 and up to 1000000000 s; give one such as "
ARGUMENTS: dict[str, Attack] = {
    "--set without a value": given("--set", "seed", lines=[f"--set seed: {KEY_VALUE}"]),
    "--set without a key": given("--set", "=1", lines=[f"--set =1: {KEY_VALUE}"]),
    "--set of nothing": given("--set", "", lines=[f"--set : {KEY_VALUE}"]),
    "three broken --set": given(
        "--set",
        "seed",
        "--set",
        "=1",
        "--set",
        "a..b=1",
        lines=[f"--set seed: {KEY_VALUE}", f"--set =1: {KEY_VALUE}", f"--set a..b=1: {KEY_VALUE}"],
    ),
    "three wrong --set and a wrong file": given(
        "--set",
        "seed=x",
        "--set",
        "model.hidden=[a]",
        "--set",
        "nosuch=1",
        task="{name: clasification}",
        lines=[
            "c.yaml:4:14: task.name: no tasks component is called 'clasification'; did you mean 'classification'?",
            '--set seed:1:1: seed: "x" is wrong; ',
            '--set model.hidden:1:2: model.hidden.0: "a" is wrong; ',
            "--set nosuch: nosuch: unknown key; ",
        ],
    ),
    "--set of a bomb": given(
        "--set",
        "model.hidden=&a [*a]",
        lines=["--set model.hidden:1:1: anchor &a; ", "--set model.hidden:1:5: alias *a; "],
    ),
    "--set of a tag": given(
        "--set",
        "seed=!!python/object/apply:os.system ['touch pwned']",
        lines=["--set seed:1:1: tag tag:yaml.org,2002:python/object/apply:os.system; "],
    ),
    "--set of two documents": given("--set", "seed=1\n---\n2", lines=["--set seed:2:1: a second document; "]),
    "--set of more keys than one": given(
        "--set", "seed=0\nmodel: {name: linear}", lines=["--set seed:2:6: not YAML: "]
    ),
    "--set ten thousand deep": given("--set", "model=" + "[" * 10_000, lines=[f"--set model:1:21: {TOO_DEEP}"]),
    "--set of a key five thousand deep": given("--set", ".".join("a" * 5000) + "=1", lines=["--set a.a"]),
    "--set of a hundred thousand letters": given(
        "--set", "model.hidden=[" + "1," * 50_000 + "]", lines=["--set model.hidden: longer than "]
    ),
    "--set of a key with a line end": given(
        "--set", "se\ned=0", lines=["--set se\\ned: se\\ned: unknown key; did you mean 'seed'?"]
    ),
    "--set of half a surrogate": given(
        "--set", "seed=\udcff", lines=["--set seed:1:1: the character '\\udcff' is not "]
    ),
    "--set of digits of another script": given(
        "--set", "seed=\u0661", lines=['--set seed:1:1: seed: "\u0661" is wrong; ']
    ),
    "--set through a number": given("--set", "seed.inside=1", lines=['c.yaml:1:7: seed: {"inside": 1} is wrong; ']),
    "--set into a list": given("--set", "model.hidden.0=1", lines=['c.yaml:3:28: model.hidden: {"0": 1} is wrong; ']),
    "--set with blanks": given("--set", " seed = 3", lines=["--set  seed :  seed : unknown key; did you mean 'seed'?"]),
    "--num-steps beyond": given(
        "--num-steps",
        str(1 << 62),
        lines=usage("train", f"Invalid value for '--num-steps': 4611686018427387904 {RANGE}"),
    ),
    "--num-steps of five thousand digits": given(
        "--num-steps", "9" * 5000, lines=usage("train", "Invalid value for '--num-steps': '999")
    ),
    "--num-steps of nothing": given("--num-steps", "", lines=usage("train", "Invalid value for '--num-steps': ''")),
    "--num-steps of nan": given("--num-steps", "nan", lines=usage("train", "Invalid value for '--num-steps': 'nan'")),
    "--num-steps in hexadecimal": given("--num-steps", "0x10", lines=usage("train", "Invalid value for '--num-steps'")),
    "--num-steps in another script": given(
        "--num-steps", "\u0663", lines=usage("train", "Invalid value for '--num-steps'")
    ),
    "--last-step below 0": given(
        "--last-step", "-1", lines=usage("train", f"Invalid value for '--last-step': -1 {RANGE}")
    ),
    "both targets, and a wrong file": given(
        "--num-steps",
        "1",
        "--last-step",
        "1",
        seed="x",
        lines=["--num-steps and --last-step: give one (steps from here, or an absolute step)"],
    ),
    "an end before the beginning": given(
        "--last-step", "1", "--set", "initial_step=5", lines=["stop.last_step: 1 is below initial_step 5; raise it"]
    ),
    "a target twice": given("--num-steps", "1", "--set", "stop.last_step=5", lines=["--num-steps: stop: give either "]),
    **{
        f"--max-time {value!r}": given(
            "--max-time", value, lines=usage("train", f"Invalid value for '--max-time': {value!r} {NO_TIME}")
        )
        for value in ("", "0", "-1", "nan", "inf", "1e400h", "\u0663h", "1h-30m")
    },
    "a word too many": given("more", "words", lines=usage("train", "Got unexpected extra argument (words)")),
    "options after the end of options": Attack(
        text(), usage("train", "Got unexpected extra argument (c.yaml)"), ("train", "--", "--config", "c.yaml")
    ),
    "a command that is a terminal's escape": Attack(
        "", ["Usage: stepctl ", "Try 'stepctl ", "", "Error: No such command '\\x1b[2J\\n"], ("\x1b[2J\n",)
    ),
    "a step beyond": Attack("", ["nowhere: no run is there "], ("resume", "nowhere", "--from-step", "9" * 30)),
    "a kernel that is a path": given(
        "--set", "numerics.blas_kernel='../../etc/passwd'", lines=["numerics.blas_kernel: NumPy was loaded with "]
    ),
    "more threads than there are": given(
        "--set", "numerics.threads=2147483647", lines=["numerics.threads: this BLAS "]
    ),
}

ALL = {name: attack for table in (YAML, VALUES, IMPORTS, PLACES, ARGUMENTS) for name, attack in table.items()}
