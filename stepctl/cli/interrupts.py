"""Signals that arrive before training begins."""

import signal

import click

from stepctl.system import interrupt, process_signals

WHOLE_PROCESS = object()  # `obj` of the click context, where the process runs only the command


def hold_signals() -> None:
    """Keep the signals that stop or save pending until training handles them; SIGINT still raises.

    Ask `interrupt.was_received` before training: an exception of a signal handler is lost in a
    callback from C.
    """
    numbers = process_signals.not_ignored()
    handlers = {number: signal.getsignal(number) for number in numbers}
    held = set(numbers) - {signal.SIGINT}
    old_mask = process_signals.block(held)
    interrupt.install_handler()

    def restore() -> None:
        process_signals.unblock(held - old_mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        interrupt.clear()

    root = click.get_current_context().find_root()
    if root.obj is not WHOLE_PROCESS:
        root.call_on_close(restore)
