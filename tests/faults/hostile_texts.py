"""Configs and command lines that are out to hurt, and what `stepctl` must answer: one line for each thing wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

BASE = {
    "seed": "0",
    "data": "{name: digits, batch_size: 64, validation_fraction: 0.2}",
    "model": "{name: mlp, hidden: [8]}",
    "task": "{name: classification}",
    "optimizer": "{name: sgd, learning_rate: 0.1}",
    "stop": "{last_step: 3}",
}
TRAIN = ("train", "--config", "c.yaml")
NAMES = "seed, dtype, initial_step, data, model, task, optimizer, ema, stop, log, evaluate, samples, checkpoint, "
NULLABLE = {"ema", "samples", "log", "evaluate", "checkpoint"}  # null: none, or the defaults
NEEDED = [name for name in NAMES.removesuffix(", ").split(", ") if name not in NULLABLE]
NOT_ALLOWED = "the character '\\x%02x' is not allowed; save the file as plain UTF-8 text"
TOO_DEEP = "nested deeper than 20 levels"
MISSING = [f"c.yaml:1:1: config: {name} is missing" for name in ("data", "model", "task", "optimizer", "stop")]


class Attack(NamedTuple):
    """What stands in c.yaml (or what prepares the folder), the command, and the start of each line of the answer."""

    config: str | bytes | Callable[[], object]
    lines: list[str]
    arguments: tuple[str, ...] = TRAIN


def text(more: str = "", **sections: str) -> str:
    """Return a good config, one section a line, with some sections written otherwise, and more lines."""
    return "".join(f"{name}: {value}\n" for name, value in (BASE | sections).items()) + more


def laughs(count: int) -> str:
    """Return mappings that would unfold to 2**count words."""
    names = [f"x{i}" for i in range(count + 1)]
    return "x0: &x0 lol\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names))


def doubled(count: int) -> list[str]:
    """Return the answer to `laughs`, as far as it is shown."""
    lines = ["c.yaml:1:5: anchor &x0; "]
    for i in range(1, count + 1):
        at = 3 + len(f"x{i}")
        lines += [f"c.yaml:{i + 1}:{at}: anchor &x{i}; ", f"c.yaml:{i + 1}:", f"c.yaml:{i + 1}:"]
    return [*lines[:50], f"... and {len(lines) - 50} more"]


YAML: dict[str, Attack] = {
    "a billion laughs": Attack(laughs(30), doubled(30)),
    "an anchor that holds itself": Attack(
        "a: &a [*a, *a]", ["c.yaml:1:4: anchor &a; ", "c.yaml:1:8: alias *a; ", "c.yaml:1:12: alias *a; "]
    ),
    "five thousand maps in each other": Attack("model: " + "{a: " * 5000, [f"c.yaml:1:84: {TOO_DEEP}"]),
    "thirty thousand lists in each other": Attack("a: " + "[" * 30_000, [f"c.yaml:1:23: {TOO_DEEP}"]),
    "ten thousand dashes": Attack("a:\n" + "- " * 10_000, [f"c.yaml:2:39: {TOO_DEEP}"]),
    "two hundred levels of a block": Attack(
        "".join(" " * i + "a:\n" for i in range(200)), [f"c.yaml:21:21: {TOO_DEEP}"]
    ),
    "questions without end": Attack("? " * 15_000, [f"c.yaml:1:41: {TOO_DEEP}"]),
    "merge keys": Attack(
        text("<<: {seed: 1}\n", model="{<<: {name: mlp}, hidden: [8]}"),
        ["c.yaml:3:9: merge key <<; write the keys out", "c.yaml:7:1: merge key <<; write the keys out"],
    ),
    "tags that build objects": Attack(
        text(
            seed="!!python/object/apply:os.system ['touch pwned']",
            task="!!python/name:os.system",
            model="!!python/object/new:type [z, !!python/tuple [], {}]",
            stop="!<tag:yaml.org,2002:python/module:os> x",
        ),
        [
            f"c.yaml:{place}: tag tag:yaml.org,2002:python/{tag}; plain values only"
            for place, tag in (
                ("1:7", "object/apply:os.system"),
                ("3:8", "object/new:type"),
                ("3:37", "tuple"),
                ("4:7", "name:os.system"),
                ("6:7", "module:os"),
            )
        ],
    ),
    "binary, set, timestamp and omap": Attack(
        text(seed="!!binary aGk=", task="!!set {a, b}", stop="!!timestamp 2020-01-01", model="!!omap [a: 1]"),
        [
            f"c.yaml:{place}: tag tag:yaml.org,2002:{tag}; plain values only"
            for place, tag in (("1:7", "binary"), ("3:8", "omap"), ("4:7", "set"), ("6:7", "timestamp"))
        ],
    ),
    "a directive of its own": Attack(
        "%TAG ! tag:evil,2000:\n---\nseed: !x 1\n", ["c.yaml:3:7: tag tag:evil,2000:x; plain values only"]
    ),
    "a thousand documents": Attack(
        "---\nseed: 1\n" * 1000,
        [*(f"c.yaml:{3 + 2 * i}:1: a second document; " for i in range(50)), "... and 949 more"],
    ),
    "duplicates at each level": Attack(
        text("seed: 1\n", data="{name: digits, name: csv, n_classes: 10, batch_size: 64, n_classes: 9}"),
        [
            "c.yaml:2:22: duplicate key 'name'; the first stands at c.yaml:2:8",
            "c.yaml:2:64: duplicate key 'n_classes'; the first stands at c.yaml:2:33",
            "c.yaml:7:1: duplicate key 'seed'; the first stands at c.yaml:1:1",
        ],
    ),
    "five thousand duplicates": Attack(
        "a: 1\n" * 5000, [*(f"c.yaml:{2 + i}:1: duplicate key 'a'; " for i in range(50)), "... and 4949 more"]
    ),
    "an unknown key beside a long quoted one": Attack(
        text(f"modle: 1\n'{'k' * 1000}': 1\n"),
        [f"c.yaml:7:1: modle: unknown key; did you mean 'model'?; allowed: {NAMES}", "c.yaml:8:1: kkk"],
    ),
    "a key of thirty thousand letters": Attack(
        text("k" * 30_000 + ": 1\n"), ["c.yaml:7:30001: not YAML: could not find expected ':'"]
    ),
    "three thousand unknown keys": Attack(
        text("".join(f"k{i}: 1\n" for i in range(3000))),
        [*(f"c.yaml:{7 + i}:1: k{i}: unknown key; " for i in range(50)), "... and 2950 more"],
    ),
    "ten thousand wrong items": Attack(
        text(model="{name: mlp, hidden: [" + "x," * 10_000 + "]}"),
        [*(f"c.yaml:3:{29 + 2 * i}: model.hidden.{i}: " for i in range(50)), "... and 9950 more"],
    ),
    "ten thousand items of an unknown key": Attack(
        "a: [" + "1," * 10_000 + "]", [*MISSING, "c.yaml:1:1: a: unknown key; "]
    ),
    "ten megabytes": Attack("#" * 10_000_000, ["c.yaml: longer than "]),
    "ten megabytes of one mapping": Attack("a: {" + "b: [1, 2], " * 900_000, ["c.yaml: longer than "]),
    "nothing": Attack("", ["c.yaml:1:1: a mapping of keys is needed, such as 'seed: 0'"]),
    "UTF-16": Attack(text().encode("utf-16"), ["c.yaml: not UTF-8 text: invalid start byte at byte 0"]),
    "UTF-16 without a mark": Attack(text().encode("utf-16-le"), [f"c.yaml:1:2: {NOT_ALLOWED % 0}"]),
    "UTF-32": Attack(text().encode("utf-32"), ["c.yaml: not UTF-8 text: invalid start byte at byte 0"]),
    "Latin-1": Attack(text("# caf\xe9\n").encode("latin-1"), ["c.yaml: not UTF-8 text: invalid continuation byte"]),
    "half a surrogate as UTF-8": Attack(text().encode() + b"\xed\xa0\x80: 1", ["c.yaml: not UTF-8 text: invalid "]),
    "an overlong slash": Attack(text().encode() + b"a\xc0\xaf: 1", ["c.yaml: not UTF-8 text: invalid start byte"]),
    "half a surrogate as an escape": Attack(text('"\\ud800": 1'), ["c.yaml:7:1: '\\ud800' holds half a character "]),
    "a mark of byte order before errors": Attack("\ufeff" + text(seed="x"), ['c.yaml:1:7: seed: "x" is wrong; ']),
    "carriage returns": Attack(
        text("foo: 1\n", seed="x").replace("\n", "\r\n"),
        ['c.yaml:1:7: seed: "x" is wrong; ', "c.yaml:7:1: foo: unknown key; "],
    ),
    "carriage returns alone": Attack(
        text("foo: 1\n", seed="x").replace("\n", "\r"),
        ['c.yaml:1:7: seed: "x" is wrong; ', "c.yaml:7:1: foo: unknown key; "],
    ),
    "tabs": Attack("seed: 0\ndata:\n\tname: digits\n", ["c.yaml:3:1: not YAML: found character '\\t' that cannot "]),
    "NUL": Attack(text(seed="0\0"), [f"c.yaml:1:8: {NOT_ALLOWED % 0}"]),
    "a terminal's escapes": Attack(text(seed="\x1b[2J"), [f"c.yaml:1:7: {NOT_ALLOWED % 27}"]),
    "escapes in quotes": Attack(
        text(model='{name: "m\\x1b[2J\\nlp"}'),
        ["c.yaml:3:15: model.name: no models component is called 'm\\x1b[2J\\nlp'; "],
    ),
    "a key with a line end": Attack(text('"a\\nb": 1\n'), ["c.yaml:7:1: a\\nb: unknown key; "]),
    "a key with a terminal's escape": Attack(
        text('"a\\x1b]0;b\\x07": 1\n'), ["c.yaml:7:1: a\\x1b]0;b\\x07: unknown key; "]
    ),
    "a key that is written from right to left": Attack(
        text('"\\u202edees": 1\n'), ["c.yaml:7:1: \\u202edees: unknown "]
    ),
    "a character that there is not": Attack(text('"\\U00110000": 1\n'), ["c.yaml: not YAML: "]),
}

WHOLE, NUMBER = "a whole number is needed", "a number is needed"
VALUES: dict[str, Attack] = {
    "integers beyond 64 bits": Attack(
        text(
            seed="18446744073709551616",
            model="{name: mlp, hidden: [-99999999999999999999]}",
            stop="{last_step: 0x1" + "0" * 30_000 + "}",
        ),
        [
            "c.yaml:1:7: 18446744073709551616 is too large a number",
            "c.yaml:3:29: -99999999999999999999 is too large",
            "c.yaml:6:19: 0x10000",
        ],
    ),
    "integers beyond what they count": Attack(
        text(
            "initial_step: -1\n",
            seed="9223372036854775808",
            stop="{last_step: 4611686018427387904}",
            data="{name: digits, batch_size: 2147483648, shards: 0}",
            model="{name: mlp, hidden: [0]}",
        ),
        [
            "c.yaml:1:7: seed: 9223372036854775808 is wrong; should be less than 9223372036854775808",
            "c.yaml:2:34: data.batch_size: 2147483648 is wrong; should be less than 2147483648",
            "c.yaml:2:54: data.shards: 0 is wrong; should be greater than or equal to 1",
            "c.yaml:3:29: model.hidden.0: 0 is wrong; should be greater than or equal to 1",
            "c.yaml:6:19: stop.last_step: 4611686018427387904 is wrong; should be less than 4611686018427387904",
            "c.yaml:7:15: initial_step: -1 is wrong; should be greater than or equal to 0",
        ],
    ),
    "thirty thousand digits": Attack(text(seed="9" * 30_000), ["c.yaml:1:7: a number of 30000 digits is too long"]),
    "floats for integers": Attack(
        text("log: {every: 1e2}\n", seed="1.0", stop="{last_step: 1e99}"),
        [
            "c.yaml:1:7: seed: 1.0 is wrong; " + WHOLE,
            "c.yaml:6:19: stop.last_step: 1e+99 is wrong; " + WHOLE,
            "c.yaml:7:14: log.every: 100.0 is wrong; " + WHOLE,
        ],
    ),
    "not finite": Attack(
        text(
            seed="1e400",
            data="{name: digits, validation_fraction: .NaN}",
            optimizer="{name: sgd, learning_rate: {name: cosine, peak: .inf}, clip_norm: -.INF}",
        ),
        [
            "c.yaml:1:7: 1e400 is not a finite number",
            "c.yaml:2:43: .NaN is not a finite number",
            "c.yaml:5:60: .inf is not a finite number",
            "c.yaml:5:78: -.INF is not a finite number",
        ],
    ),
    "not finite, in words": Attack(
        text(
            seed="Infinity",
            data="{name: digits, validation_fraction: NaN}",
            optimizer="{name: sgd, learning_rate: {name: cosine, peak: inf}, clip_norm: nan}",
        ),
        [
            'c.yaml:1:7: seed: "Infinity" is wrong; ' + WHOLE,
            'c.yaml:2:43: data.validation_fraction: "NaN" is wrong; ',
            'c.yaml:5:60: optimizer.learning_rate.peak: "inf" is wrong; ' + NUMBER,
            'c.yaml:5:77: optimizer.clip_norm: "nan" is wrong; ' + NUMBER,
        ],
    ),
    "booleans of 1.1": Attack(
        text(
            seed="no",
            model="{name: mlp, hidden: [8], layer_norm: yes}",
            optimizer="{name: sgd, learning_rate: 0.1, momentum: off, nesterov: on}",
        ),
        [
            'c.yaml:1:7: seed: "no" is wrong; ' + WHOLE,
            'c.yaml:3:45: model.layer_norm: "yes" is wrong; true or false',
            'c.yaml:5:54: optimizer.momentum: "off" is wrong; ' + NUMBER,
            'c.yaml:5:69: optimizer.nesterov: "on" is wrong; true or false is needed',
        ],
    ),
    "numbers of 1.1": Attack(
        text(seed="1_000", model="{name: mlp, hidden: [1:30, 0b11, 0o8, +0x1]}", stop="{last_step: 190:20:30}"),
        [
            f"c.yaml:{place} is wrong; {WHOLE}"
            for place in (
                '1:7: seed: "1_000"',
                '3:29: model.hidden.0: "1:30"',
                '3:35: model.hidden.1: "0b11"',
                '3:41: model.hidden.2: "0o8"',
                '3:46: model.hidden.3: "+0x1"',
                '6:19: stop.last_step: "190:20:30"',
            )
        ],
    ),
    "digits of another script": Attack(
        text(
            seed="\u0661\u0662",
            data="{name: digits, validation_fraction: \u0660.\u0662}",
            model="{name: mlp, hidden: [\uff18]}",
        ),
        [
            'c.yaml:1:7: seed: "\u0661\u0662" is wrong; ',
            'c.yaml:2:43: data.validation_fraction: "\u0660.\u0662" is wrong; ',
            'c.yaml:3:29: model.hidden.0: "\uff18" is wrong; ',
        ],
    ),
    "a wrong type for each section": Attack(
        "seed: []\ndtype: {}\ninitial_step: null\ndata: digits\nmodel: [mlp]\ntask: 1\noptimizer: ~\nstop: 100\n"
        "log: true\nevaluate: 1.5\ncheckpoint: ''\non_nonfinite: 3\nnumerics: auto\n",
        [
            "c.yaml:1:7: seed: []",
            "c.yaml:2:8: dtype: {}",
            "c.yaml:3:15: initial_step: null",
            "c.yaml:4:7: data: ",
            "c.yaml:5:8: model: ",
            "c.yaml:6:7: task: 1",
            "c.yaml:7:12: optimizer: null",
            "c.yaml:8:7: stop: 100",
            "c.yaml:9:6: log: true",
            "c.yaml:10:11: evaluate: 1.5",
            'c.yaml:11:13: checkpoint: ""',
            "c.yaml:12:15: on_nonfinite: 3",
            'c.yaml:13:11: numerics: "auto"',
        ],
    ),
    "a wrong type for each key": Attack(
        text(
            "log: {every: null, offset: -1}\nevaluate: {every: '1'}\nnumerics: {threads: 0, blas_kernel: 1}\n",
            data="{name: [digits], batch_size: '64', shards: 1.5, validation_fraction: true, n_classes: {}}",
            model="{name: 1, hidden: 8}",
            task="{name: null}",
            optimizer="{name: true}",
            stop="{last_step: '5'}",
        ),
        [
            f"c.yaml:{place}"
            for place in (
                "2:14: data.name: ",
                "2:36: data.batch_size: ",
                "2:50: data.shards: ",
                "2:76: data.validation_fraction: ",
                "2:93: data.n_classes: ",
                "3:15: model.name: ",
                "4:14: task.name: ",
                "5:19: optimizer.name: ",
                "6:19: stop.last_step: ",
                "7:14: log.every: ",
                "7:28: log.offset: ",
                "8:19: evaluate.every: ",
                "9:21: numerics.threads: ",
                "9:37: numerics.blas_kernel: ",
            )
        ],
    ),
    "a wrong type for each argument": Attack(
        text(
            data="{name: digits, scale: 1}",
            task="{name: classification, x: 1}",
            model="{name: mlp, hidden: 8, activation: [relu], dropout: 1.0, layer_norm: 1}",
            optimizer="{name: adam, learning_rate: '1e-3', beta1: 2, clip_norm: {}, nosuch: 1}",
        ),
        [
            f"c.yaml:{place}: "
            for place in (
                "2:22: data.scale",
                "3:28: model.hidden",
                "3:43: model.activation",
                "3:60: model.dropout",
                "3:77: model.layer_norm",
                "4:30: task.x",
                "5:40: optimizer.learning_rate",
                "5:55: optimizer.beta1",
                "5:69: optimizer.clip_norm",
                "5:73: optimizer.nosuch",
            )
        ],
    ),
    "nothing in each section": Attack(
        "".join(f"{name}:\n" for name in NEEDED),
        [f"c.yaml:{i}:{len(name) + 2}: {name}: null is wrong; " for i, name in enumerate(NEEDED, 1)],
    ),
    "more than this memory holds": Attack(
        text(model="{name: mlp, hidden: [2147483647, 2147483647]}"), ["model: mlp: "]
    ),
    "classes without end": Attack(
        text(data="{name: digits, n_classes: 2147483647}"), ["model and batch do not fit in memory ("]
    ),
}
