"""Python's garbage collector while a command starts.

The imports and the lines of a ledger make hundreds of thousands of objects that stay. Searching
them again and again takes a third of the time of a short command.
"""

import gc

import click

from stepctl.cli.interrupts import WHOLE_PROCESS


def suspend_collection() -> None:
    """Disable the garbage collector until `settle`, if the process runs only this command."""
    if click.get_current_context().find_root().obj is WHOLE_PROCESS:
        gc.disable()


def settle() -> None:
    """Enable the garbage collector, without the objects that exist now. Call before user code runs."""
    if click.get_current_context().find_root().obj is WHOLE_PROCESS:
        gc.freeze()
        gc.enable()
