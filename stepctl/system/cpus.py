"""The CPUs that this process may use."""

import os


def affinity() -> list[int] | None:
    """Return the CPUs that this process may run on, ascending; None if unknown to the system."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    cpus = affinity()
    if cpus is None:
        return os.cpu_count() or 1
    return len(cpus)


def cgroup_cpus(
    root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup"
) -> float | None:
    """Return the CPU quota of the cgroups (v1, v2) of this process; None without a limit."""
    quotas = []
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = os.path.join(root, "cpu") if controllers else root
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            folder = os.path.join(base, *parts[:depth])
            if controllers:
                words = [_text(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                words = _text(f"{folder}/cpu.max").split()
            quota = _ratio(words)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _ratio(words: list[str]) -> float | None:
    """Return quota / period; None if there is no limit ("max", "-1", or no such file)."""
    numbers = [word.strip() for word in words]
    if len(numbers) != 2:
        return None
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        return None
    return int(numbers[0]) / int(numbers[1])


def proc_value(path: str, key: str) -> str:
    """Return the value of the first line "key: value" of a file in /proc, "" without one."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""
