"""`stepctl`: the group of commands, and what becomes of errors."""

import contextlib
import os
import sys
import threading
import traceback
from typing import Any, NoReturn, TextIO

import click

from stepctl import __version__, comm, interrupt, launcher
from stepctl.cli.config import config
from stepctl.cli.diff import diff
from stepctl.cli.doctor import doctor
from stepctl.cli.fork import fork
from stepctl.cli.inspect import inspect
from stepctl.cli.options import WHOLE_PROCESS, say
from stepctl.cli.output import drain_output
from stepctl.cli.pipes import prepare_stdout
from stepctl.cli.plan import plan
from stepctl.cli.plot import plot
from stepctl.cli.prune import prune
from stepctl.cli.resume import resume
from stepctl.cli.runs import runs
from stepctl.cli.train import train
from stepctl.cli.verify import verify
from stepctl.errors import Exit, StepctlError

# that threads and pools of a user's module may take to end; less where a scheduler waits for the process
EXIT_SECONDS, STOPPED_EXIT_SECONDS = 60.0, 10.0
_SHARED = ("train", "resume")  # by all processes of an MPI job; the first alone does what others do


class Main(click.Group):
    """Ends a command that failed with one clear line and the error's exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except OSError as error:  # of --help and --version, which have found no room
            say(f"stepctl: {_unexpected(error)}")
            ctx.exit(Exit.NEGATIVE)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except click.ClickException as error:
            vars(error)["message"] = _plain(error.message, 1000)
            raise
        except KeyboardInterrupt:
            say("stepctl: interrupted before training began; nothing was changed")
            _fail(ctx, Exit.INTERRUPTED)
        except StepctlError as error:
            if ctx.params["debug"]:
                raise
            if not isinstance(error, comm.SaidElsewhere):
                say(f"stepctl: {_plain(str(error))}")
            _fail(ctx, error.exit_code)
        except (Exception, SystemExit) as error:  # a user's own module may raise anything
            if ctx.params["debug"]:
                raise
            say(f"stepctl: {_unexpected(error)}")
            _fail(ctx, Exit.NEGATIVE)

    def _invoke(self, ctx: click.Context) -> Any:
        """Run the command; raise KeyboardInterrupt for whatever a SIGINT before training surfaces as."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            if interrupt.received():
                raise KeyboardInterrupt from error
            raise


def _fail(ctx: click.Context, code: int) -> NoReturn:
    drain_output()  # the job's end may be this process's
    comm.end(code, failed=True)  # the other processes of the job may be waiting for this one
    ctx.exit(code)


def _unexpected(error: BaseException) -> str:
    from stepctl.problems import in_one_line, in_user_code

    where = in_user_code(error)
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename is not None else ""
        return in_one_line(f"{file}{error.strerror}{where}; mend that, and run the command again")
    text = in_one_line(" ".join(str(error).split()))
    where = in_one_line(where or _in_our_code(error))
    return f"unexpected {type(error).__name__}: {text}{where}; see more with: stepctl --debug COMMAND ..."


def _in_our_code(error: BaseException) -> str:
    """Return " (file:line)" of an error that none of the user's lines raised, and what of the user's was in use."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    registry = sys.modules.get("stepctl.registry")  # importing it here would cost more than the error
    own = "" if registry is None else registry.own_components()
    where = f"{os.path.basename(at.filename)}:{at.lineno}"
    return f" (while using {own})" if own else f" ({where})"


def _plain(message: str, longest: int = 4000) -> str:
    """Return a message whose lines can do nothing to a terminal, and have an end."""
    from stepctl.problems import in_one_line

    return "\n".join(in_one_line(line, longest) for line in message.split("\n"))


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="stepctl")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train NumPy models; stop anywhere, and resume at the exact global step, bit for bit.

    Exit codes: 0 done, 1 a negative answer or an operation that failed, 2 usage or config, 3 no usable checkpoint,
    4 the run is in use, 75 stopped before the target with a durable checkpoint (run it again), 130 interrupted
    before training began.
    """
    if ctx.invoked_subcommand not in _SHARED and not launcher.is_first():
        ctx.exit(Exit.DONE)


for command in (train, resume, fork, plan, inspect, verify, diff, prune, runs, plot, config, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    prepare_stdout()
    try:
        code = cli.main(prog_name="stepctl", obj=WHOLE_PROCESS, standalone_mode=False)
    except click.ClickException as error:
        if launcher.is_first():
            error.show(sys.stderr)
        code = error.exit_code
    except click.Abort:
        code = Exit.INTERRUPTED
    except BaseException:
        if interrupt.received():
            comm.end(Exit.INTERRUPTED, failed=True)
            sys.exit(Exit.INTERRUPTED)
        if launcher.is_rank():
            with contextlib.suppress(OSError):
                traceback.print_exc()
            drain_output()
            comm.end(Exit.NEGATIVE, failed=True)
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go_of(stream)
        drain_output()
    comm.end(code or Exit.DONE, failed=False)
    _bound_the_exit(code or Exit.DONE)
    sys.exit(code)


def _bound_the_exit(code: int) -> None:
    """Let what a user's module started hold up the exit for a bounded time.

    Python waits at its exit for threads and for the workers of multiprocessing pools. A signal to the whole process
    group may have ended a worker that held a lock of its pool: then it waits forever, with signals ignored.
    """

    def give_up() -> None:
        multiprocessing = sys.modules.get("multiprocessing")
        if multiprocessing is not None:
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(code)

    timer = threading.Timer(STOPPED_EXIT_SECONDS if code == Exit.STOPPED else EXIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()


def _let_go_of(stream: TextIO | None) -> None:
    # what nobody takes any more must not become the exit code 120 of Python's last flush
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
