"""Shell completion."""

import os

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
)

_BASH_ADD = "COMPREPLY+=($value)"
_BASH_ADD_QUOTED = """printf -v value %%q "$value"
            COMPREPLY+=("$value")
            [[ $value == *[=/] ]] && compopt -o nospace"""
_ZSH_ADD = "compadd -U -V unsorted -a completions"
_ZSH_ADD_OWN = """compadd -U -V unsorted -- ${completions:#*[=/]}
        compadd -U -V unsorted -S '' -- ${(M)completions:#*[=/]}
        [[ -n $PREFIX && -z $compstate[unambiguous] ]] && compstate[insert]=menu"""


class _Bash(BashComplete):
    """Quotes what it adds, with no space after `KEY=` and `FOLDER/`, which go on."""

    source_template = BashComplete.source_template.replace(_BASH_ADD, _BASH_ADD_QUOTED)


class _Zsh(ZshComplete):
    """Adds no space after `KEY=` and `FOLDER/`, which go on.

    Where the answers begin with nothing in common, zsh would delete what was typed; it gets the
    first of them instead, and the next tab the next.
    """

    source_template = ZshComplete.source_template.replace(_ZSH_ADD, _ZSH_ADD_OWN)


class _Fish(FishComplete):
    """Offers absolute paths for entries with the typed prefix, if other answers contain it.

    fish hides answers without the prefix while some have it, and it hides ./NAME.
    """

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        items = super().get_completions(args, incomplete)
        if all(_begins(item, incomplete) for item in items):
            return items
        folder = os.getcwd()
        return [
            CompletionItem(f"{folder}/{item.value}") if _begins(item, incomplete) else item
            for item in items
        ]


def _begins(item: CompletionItem, incomplete: str) -> bool:
    return str(item.value).startswith(incomplete)


def use_own_classes() -> None:
    """Use the classes of this module for their shells."""
    for own in (_Bash, _Zsh, _Fish):
        add_completion_class(own)
