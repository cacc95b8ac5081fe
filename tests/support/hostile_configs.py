"""Hostile configs: YAML that expands, nests or injects; values that overflow or have a wrong type."""

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
# sections that may not be null
REQUIRED = [
    *BASE,
    "dtype",
    "initial_step",
    "on_nonfinite",
    "check_determinism",
    "numerics",
    "distributed",
]


class Attack(NamedTuple):
    """The text of c.yaml, or a function that prepares the current folder; and the command."""

    config: str | bytes | Callable[[], object]
    arguments: tuple[str, ...] = TRAIN


def text(more: str = "", **sections: str) -> str:
    """Return a valid config, one section a line, with some sections replaced and lines appended."""
    return "".join(f"{name}: {value}\n" for name, value in (BASE | sections).items()) + more


def laughs(count: int) -> str:
    """Return mappings whose aliases expand to 2**count words."""
    names = [f"x{i}" for i in range(count + 1)]
    return "x0: &x0 lol\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names)
    )


YAML: dict[str, Attack] = {
    "a billion laughs": Attack(laughs(30)),
    "an anchor that holds itself": Attack("a: &a [*a, *a]"),
    "five thousand maps in each other": Attack("model: " + "{a: " * 5000),
    "thirty thousand lists in each other": Attack("a: " + "[" * 30_000),
    "ten thousand dashes": Attack("a:\n" + "- " * 10_000),
    "two hundred levels of a block": Attack("".join(" " * i + "a:\n" for i in range(200))),
    "questions without end": Attack("? " * 15_000),
    "merge keys": Attack(text("<<: {seed: 1}\n", model="{<<: {name: mlp}, hidden: [8]}")),
    "tags that build objects": Attack(
        text(
            seed="!!python/object/apply:os.system ['touch pwned']",
            task="!!python/name:os.system",
            model="!!python/object/new:type [z, !!python/tuple [], {}]",
            stop="!<tag:yaml.org,2002:python/module:os> x",
        ),
    ),
    "binary, set, timestamp and omap": Attack(
        text(
            seed="!!binary aGk=",
            task="!!set {a, b}",
            stop="!!timestamp 2020-01-01",
            model="!!omap [a: 1]",
        ),
    ),
    "a directive of its own": Attack("%TAG ! tag:evil,2000:\n---\nseed: !x 1\n"),
    "a thousand documents": Attack("---\nseed: 1\n" * 1000),
    "duplicates at each level": Attack(
        text(
            "seed: 1\n",
            data="{name: digits, name: csv, n_classes: 10, batch_size: 64, n_classes: 9}",
        ),
    ),
    "five thousand duplicates": Attack("a: 1\n" * 5000),
    "an unknown key beside a long quoted one": Attack(text(f"modle: 1\n'{'k' * 1000}': 1\n")),
    "a key of thirty thousand letters": Attack(text("k" * 30_000 + ": 1\n")),
    "three thousand unknown keys": Attack(text("".join(f"k{i}: 1\n" for i in range(3000)))),
    "ten thousand wrong items": Attack(text(model="{name: mlp, hidden: [" + "x," * 10_000 + "]}")),
    "ten thousand items of an unknown key": Attack("a: [" + "1," * 10_000 + "]"),
    "ten megabytes": Attack("#" * 10_000_000),
    "ten megabytes of one mapping": Attack("a: {" + "b: [1, 2], " * 900_000),
    "nothing": Attack(""),
    "UTF-16": Attack(text().encode("utf-16")),
    "UTF-16 without a mark": Attack(text().encode("utf-16-le")),
    "UTF-32": Attack(text().encode("utf-32")),
    "Latin-1": Attack(text("# caf\xe9\n").encode("latin-1")),
    "half a surrogate as UTF-8": Attack(text().encode() + b"\xed\xa0\x80: 1"),
    "an overlong slash": Attack(text().encode() + b"a\xc0\xaf: 1"),
    "half a surrogate as an escape": Attack(text('"\\ud800": 1')),
    "a mark of byte order before errors": Attack("\ufeff" + text(seed="x")),
    "carriage returns": Attack(text("foo: 1\n", seed="x").replace("\n", "\r\n")),
    "carriage returns alone": Attack(text("foo: 1\n", seed="x").replace("\n", "\r")),
    "tabs": Attack("seed: 0\ndata:\n\tname: digits\n"),
    "NUL": Attack(text(seed="0\0")),
    "a terminal's escapes": Attack(text(seed="\x1b[2J")),
    "escapes in quotes": Attack(text(model='{name: "m\\x1b[2J\\nlp"}')),
    "a key with a line end": Attack(text('"a\\nb": 1\n')),
    "a key with a terminal's escape": Attack(text('"a\\x1b]0;b\\x07": 1\n')),
    "a key that is written from right to left": Attack(text('"\\u202edees": 1\n')),
    "a character that there is not": Attack(text('"\\U00110000": 1\n')),
}

VALUES: dict[str, Attack] = {
    "integers beyond 64 bits": Attack(
        text(
            seed="18446744073709551616",
            model="{name: mlp, hidden: [-99999999999999999999]}",
            stop="{last_step: 0x1" + "0" * 30_000 + "}",
        ),
    ),
    "integers beyond what they count": Attack(
        text(
            "initial_step: -1\n",
            seed="9223372036854775808",
            stop="{last_step: 4611686018427387904}",
            data="{name: digits, batch_size: 2147483648, shards: 0}",
            model="{name: mlp, hidden: [0]}",
        ),
    ),
    "thirty thousand digits": Attack(text(seed="9" * 30_000)),
    "floats for integers": Attack(
        text("log: {every: 1e2}\n", seed="1.0", stop="{last_step: 1e99}")
    ),
    "not finite": Attack(
        text(
            seed="1e400",
            data="{name: digits, validation_fraction: .NaN}",
            optimizer="{name: sgd, learning_rate: {name: cosine, peak: .inf}, clip_norm: -.INF}",
        ),
    ),
    "not finite, in words": Attack(
        text(
            seed="Infinity",
            data="{name: digits, validation_fraction: NaN}",
            optimizer="{name: sgd, learning_rate: {name: cosine, peak: inf}, clip_norm: nan}",
        ),
    ),
    "booleans of 1.1": Attack(
        text(
            seed="no",
            model="{name: mlp, hidden: [8], layer_norm: yes}",
            optimizer="{name: sgd, learning_rate: 0.1, momentum: off, nesterov: on}",
        ),
    ),
    "numbers of 1.1": Attack(
        text(
            seed="1_000",
            model="{name: mlp, hidden: [1:30, 0b11, 0o8, +0x1]}",
            stop="{last_step: 190:20:30}",
        ),
    ),
    "digits of another script": Attack(
        text(
            seed="\u0661\u0662",
            data="{name: digits, validation_fraction: \u0660.\u0662}",
            model="{name: mlp, hidden: [\uff18]}",
        ),
    ),
    "a wrong type for each section": Attack(
        "seed: []\ndtype: {}\ninitial_step: null\ndata: digits\nmodel: [mlp]\ntask: 1\noptimizer: ~\nstop: 100\n"
        "log: true\nevaluate: 1.5\ncheckpoint: ''\non_nonfinite: 3\nnumerics: auto\n",
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
    ),
    "a wrong type for each argument": Attack(
        text(
            data="{name: digits, scale: 1}",
            task="{name: classification, x: 1}",
            model="{name: mlp, hidden: 8, activation: [relu], dropout: 1.0, layer_norm: 1}",
            optimizer="{name: adam, learning_rate: '1e-3', beta1: 2, clip_norm: {}, nosuch: 1}",
        ),
    ),
    "nothing in each section": Attack("".join(f"{name}:\n" for name in REQUIRED)),
    "more than this memory holds": Attack(
        text(model="{name: mlp, hidden: [2147483647, 2147483647]}")
    ),
    "classes without end": Attack(text(data="{name: digits, n_classes: 2147483647}")),
}
