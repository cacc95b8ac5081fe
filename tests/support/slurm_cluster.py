"""A Slurm cluster of one node on this machine, with its own key, ports and folders."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
DEADLINE = 180  # seconds: only a hang comes near it
CONF = """\
ClusterName=one
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=5
BatchStartTimeout=1
MessageTimeout=2
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
{more}
NodeName={node} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=low Nodes={node} Default=YES PriorityTier=1
PartitionName=notice Nodes={node} PriorityTier=1 GraceTime=120
PartitionName=high Nodes={node} PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and that are not here."""
    return [program for program in (*DAEMONS, *COMMANDS) if _found(program) is None]


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def until(condition: Callable[[], object], what: str) -> None:
    """Poll until the condition holds; AssertionError when it does not in time."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.1)


class Cluster:
    """The daemons, and Slurm's commands against them."""

    def __init__(self, folder: Path, more: str) -> None:
        self.folder = folder
        self.node = socket.gethostname().partition(".")[0]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        self.conf = folder / "slurm.conf"
        user = pwd.getpwuid(os.geteuid()).pw_name
        self.conf.write_text(
            CONF.format(node=self.node, ports=_free_ports(2), user=user, folder=folder, more=more)
        )
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        command = folder / "bin" / "stepctl"  # the code under test is what a job script calls
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stepctl "$@"\n')
        command.chmod(0o755)
        path = f"{command.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        at = self.folder
        self._daemon("munged", "--foreground", "--force", f"--socket={at}/munge", f"--key-file={at}/key",
                     f"--pid-file={at}/pid", f"--seed-file={at}/seed", f"--log-file={at}/munged.log")  # fmt: skip
        until((at / "munge").exists, "munged's socket")
        self._daemon("slurmctld", "-D", "-i", "-f", self.conf)
        self.start_node()
        until(
            lambda: "IDLE" in self.call("scontrol", "-o", "show", "node", check=False),
            "an idle node",
        )

    def start_node(self, *options: str) -> None:
        self._daemon("slurmd", "-D", "-N", self.node, "-f", self.conf, *options)

    def _daemon(self, name: str, *arguments: object) -> None:
        command = [_found(name) or name, *map(str, arguments)]
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out
            )

    def call(self, *command: object, check: bool = True) -> str:
        """Run one of Slurm's commands in the cluster's folder; return what it says."""
        text = [*map(str, command)]
        done = subprocess.run(
            text, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: object) -> str:
        """Submit a batch script; return the job's number."""
        return self.call("sbatch", "--parsable", *command).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job."""
        return dict(
            part.partition("=")[::2]
            for part in self.call("scontrol", "-o", "show", "job", number).split()
        )

    def processes(self) -> list[int]:
        """Return the pids of all that came from these daemons, but for munged and slurmctld."""
        mark = f"SLURM_CONF={self.conf}".encode()
        others = {
            self.daemons[name].pid for name in ("munged", "slurmctld") if name in self.daemons
        }
        return [pid for pid in _pids() if mark in _environment(pid) and pid not in others]

    def crash_node(self) -> None:
        """Kill all that runs on the node at once, as a power cut would, and boot it again."""
        while pids := self.processes():
            _kill(pids)
            self.daemons["slurmd"].wait()
        self.start_node("-b")

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        while pids := self.processes():
            _kill(pids)


@contextlib.contextmanager
def cluster(folder: Path, more: str = "") -> Iterator[Cluster]:
    """Yield a cluster that is up; `more` are further lines of its slurm.conf."""
    one = Cluster(folder, more)
    try:
        one.start()
        yield one
    finally:
        one.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [held.getsockname()[1] for held in sockets]


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended, or another user's
        return []
