"""CPU time and memory of a process and all its descendants, read from the kernel."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import psutil

_RAY_TITLE = re.compile(r"^ray::(?P<role>[^ ]*?)(\.\w+)?$")


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """One process. `cpu_s` is user plus system time of all its threads, dead ones too.

    `pss` splits shared pages among the processes that map them, so it can be summed; `rss` cannot.
    """

    pid: int
    started: float
    role: str
    cpu_s: float
    rss: int
    pss: int


def role(command: Sequence[str]) -> str:
    """A short name for a process by its command line: the Ray actor, the module or the program."""
    if not command:
        return "(exiting)"
    if match := _RAY_TITLE.match(command[0].strip()):
        return match["role"]
    words = [word for word in command[1:] if word != "-u"]
    if "python" in command[0].rsplit("/", 1)[-1] and words:
        name = words[1] if words[0] == "-m" and len(words) > 1 else words[0]
        return name.rsplit("/", 1)[-1]
    return command[0].rsplit("/", 1)[-1]


def tree(root: int) -> list[psutil.Process]:
    """The process `root` and its descendants; empty where it is gone."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def usage(root: int, *, memory: bool = False) -> list[ProcessUsage]:
    """What every process of the tree has used so far; memory (slow to read) where asked for."""
    found = []
    for process in tree(root):
        try:
            with process.oneshot():
                times = process.cpu_times()
                full = process.memory_full_info() if memory else None
                found.append(
                    ProcessUsage(
                        pid=process.pid,
                        started=process.create_time(),
                        role=role(process.cmdline()),
                        cpu_s=times.user + times.system,
                        rss=full.rss if full else 0,
                        pss=full.pss if full else 0,
                    )
                )
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # ended between the listing and the reading
    return found


def cpu_by_role(
    before: Sequence[ProcessUsage], after: Sequence[ProcessUsage]
) -> Mapping[str, float]:
    """CPU seconds spent between two readings, by role. A process that ended meanwhile is lost."""
    start = {(p.pid, p.started): p.cpu_s for p in before}
    spent: defaultdict[str, float] = defaultdict(float)
    for process in after:
        spent[process.role] += process.cpu_s - start.get((process.pid, process.started), 0.0)
    return dict(spent)


class Meter:
    """CPU time spent while a `with` block ran.

    `by_role`: seconds of each role of the tree under `root`. `load`: seconds of this process and
    the children it waited for: the load generator. `others`: the share of the whole
    machine's CPU, 0 to 1, that neither that tree nor this process and its children used: what other
    programs took, and what the hypervisor kept. Figures taken beside a busy program mean little.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self.by_role: Mapping[str, float] = {}
        self.load = 0.0
        self.others = 0.0

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._tree, self._busy, self._own = usage(self._root), _machine_busy(), _own_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.by_role = cpu_by_role(self._tree, usage(self._root))
        busy, self.load = _machine_busy() - self._busy, _own_seconds() - self._own
        capacity = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        self.others = max(0.0, busy - self.load - sum(self.by_role.values())) / capacity


def _machine_busy() -> float:
    times = psutil.cpu_times()
    # Guest time is part of user time already.
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _own_seconds() -> float:
    return sum(os.times()[:4])


def on_data_path(role_name: str, prefixes: Sequence[str]) -> bool:
    """Whether a role carries requests. No prefixes: every process does."""
    return not prefixes or role_name.startswith(tuple(prefixes))
