"""Shell completion."""

from click.shell_completion import BashComplete, add_completion_class

_ADD = "COMPREPLY+=($value)"
_WITHOUT_SPACE = "[[ $value == *= ]] && compopt -o nospace"


class _Bash(BashComplete):
    """Adds no space after `KEY=`, whose value follows."""

    source_template = BashComplete.source_template.replace(_ADD, f"{_ADD}; {_WITHOUT_SPACE}")


def complete_keys_without_space() -> None:
    """Use the script for bash that adds no space after `KEY=`; fish and zsh have their own rules."""
    add_completion_class(_Bash)
