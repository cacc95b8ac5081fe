"""`stepctl`: the group of commands, the messages of errors, and the exit of the process."""

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
from typing import Any, NoReturn

import click

from stepctl import __version__
from stepctl.cli.completion import use_own_classes
from stepctl.cli.config import config
from stepctl.cli.diff import diff
from stepctl.cli.doctor import doctor
from stepctl.cli.evaluate import evaluate
from stepctl.cli.export import export
from stepctl.cli.fork import fork
from stepctl.cli.init import init
from stepctl.cli.inspect import inspect
from stepctl.cli.interrupts import WHOLE_PROCESS
from stepctl.cli.output import prepare_stdout
from stepctl.cli.output_queue import drain_output
from stepctl.cli.plan import plan
from stepctl.cli.plot import plot
from stepctl.cli.predict import predict
from stepctl.cli.prune import prune
from stepctl.cli.pull import pull
from stepctl.cli.push import push
from stepctl.cli.resume import resume
from stepctl.cli.runs import runs
from stepctl.cli.sample import sample
from stepctl.cli.train import train
from stepctl.cli.verify import verify
from stepctl.distributed import comm, launcher
from stepctl.errors import Exit, StepctlError
from stepctl.system import interrupt
from stepctl.system.terminal import say
from stepctl.system.text import in_one_line

# within which threads and pools of a user's module must end
EXIT_SECONDS = 60.0
STOPPED_EXIT_SECONDS = 10.0  # where a scheduler waits for the process
_REQUEST_SECONDS = 1.0  # that the exit waits for requests to a store
_MAX_LINE = 4000  # characters of a message
_MAX_USAGE_LINE = 1000
_ALL_RANKS = ("train", "resume")  # the commands that every rank of an MPI job runs


class Main(click.Group):
    """Turns an error of a command into one line on stderr and the error's exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except OSError as error:  # --help and --version, with stdout on a full disk
            say(f"stepctl: {_describe_unexpected(error)}")
            ctx.exit(Exit.NEGATIVE)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except click.ClickException as error:
            vars(error)["message"] = _escape_lines(error.message, _MAX_USAGE_LINE)
            raise
        except KeyboardInterrupt:
            say("stepctl: interrupted; nothing was changed")
            _fail(ctx, Exit.INTERRUPTED)
        except StepctlError as error:
            if ctx.params["debug"]:
                raise
            if not isinstance(error, comm.ReportedByRankZero):
                say(f"stepctl: {_escape_lines(str(error), _MAX_LINE)}")
            _fail(ctx, error.exit_code)
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            if ctx.params["debug"]:
                raise
            say(f"stepctl: {_describe_unexpected(error)}")
            _fail(ctx, Exit.NEGATIVE)

    def _invoke(self, ctx: click.Context) -> Any:
        """Run the command; any error that a SIGINT caused becomes a KeyboardInterrupt."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            if interrupt.was_received():
                raise KeyboardInterrupt from error
            raise


def _fail(ctx: click.Context, code: int) -> NoReturn:
    drain_output()  # `finalize` may end this process
    comm.finalize(code, failed=True)  # the other ranks may be waiting for this one
    ctx.exit(code)


def _describe_unexpected(error: BaseException) -> str:
    from stepctl.system.user_code import user_location

    where = user_location(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.strerror}{where}"
        if error.filename is not None:
            place = f"{error.filename}: {place}"
        return in_one_line(f"{place}; fix that and run the command again")
    text = in_one_line(" ".join(str(error).split()))
    where = in_one_line(where or _package_location(error))
    name = type(error).__name__
    return f"unexpected {name}: {text}{where}; for the traceback: stepctl --debug COMMAND ..."


def _package_location(error: BaseException) -> str:
    """Return the place of an error in this package, or the user's components that were in use."""
    registry = sys.modules.get("stepctl.config.registry")  # an import may raise another error
    if registry is not None:
        components = registry.user_components()
        if components:
            return f" (while using {components})"
    import traceback  # not at the top: `--help` needs none

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({os.path.basename(frame.filename)}:{frame.lineno})"


def _escape_lines(message: str, longest: int) -> str:
    """Return a message whose lines are printable and at most about `longest` characters long."""
    return "\n".join(in_one_line(line, longest) for line in message.split("\n"))


@click.group(
    cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="stepctl")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train NumPy models; stop anywhere, and resume at the exact global step, bit for bit.

    Exit codes: 0 done, 1 negative answer or failed operation, 2 usage, config or data, 3 no usable
    checkpoint, 4 run in use, 75 stopped before the target with a durable checkpoint (run it again),
    130 interrupted before training began.
    """
    if ctx.invoked_subcommand not in _ALL_RANKS and not launcher.is_rank_zero():
        ctx.exit(Exit.DONE)


_COMMANDS = (
    init, train, resume, evaluate, predict, sample, export, fork, plan, inspect, verify, diff, prune,
    pull, push, runs, plot, config, doctor,
)  # fmt: skip
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line."""
    gc.freeze()  # excludes the objects of the imports from every later collection
    prepare_stdout()
    if "_STEPCTL_COMPLETE" in os.environ:
        use_own_classes()
    try:
        code = cli.main(prog_name="stepctl", obj=WHOLE_PROCESS, standalone_mode=False)
    except click.ClickException as error:
        if launcher.is_rank_zero():
            error.show(sys.stderr)
        code = error.exit_code
    except click.Abort:
        code = Exit.INTERRUPTED
    except BaseException:
        if interrupt.was_received():
            comm.finalize(Exit.INTERRUPTED, failed=True)
            sys.exit(Exit.INTERRUPTED)
        if launcher.is_rank():
            import traceback

            with contextlib.suppress(OSError):
                traceback.print_exc()
            drain_output()
            comm.finalize(Exit.NEGATIVE, failed=True)
        raise
    finally:
        drain_output()
    comm.finalize(code or Exit.DONE, failed=False)
    _leave_requests(code or Exit.DONE)
    _limit_exit_time(code or Exit.DONE)
    sys.exit(code)


def _leave_requests(code: int) -> None:
    """End the process at once if a request to the store of a mirror is still in flight.

    Its thread would return from the store's library into an interpreter that is shutting down.
    """
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("mirror-")]
    deadline = time.monotonic() + _REQUEST_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    if any(thread.is_alive() for thread in threads):
        atexit._run_exitfuncs()  # which a user's module may need
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _limit_exit_time(code: int) -> None:
    """Kill the process if threads or pools of a user's module delay its exit for too long.

    At its exit Python joins threads and multiprocessing pools. A signal to the process group may
    have killed a worker that held a lock of its pool; the pool then never finishes.
    """

    def kill() -> None:
        multiprocessing = sys.modules.get("multiprocessing")
        if multiprocessing is not None:
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(code)

    seconds = EXIT_SECONDS
    if code == Exit.STOPPED:
        seconds = STOPPED_EXIT_SECONDS
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
