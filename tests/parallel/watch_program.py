"""Three processes watch each other, without a run, and one of them meets an end: python watch_program.py TIMEOUT.

Every ENDS is played by three forks of this process, all at the same time. Printed as JSON: of each end, by process, the
exit status, what was written to stderr, and the seconds from the end to the exit; where a process ends, from its exit.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time

from mara_jax.parallel import roll, watch

COUNT = 3
NAMES = {process: f"process {process}" for process in range(COUNT)}
ENDS = {
    "whole": (0, "leave"),
    "killed": (1, signal.SIGKILL),
    "killed first": (0, signal.SIGKILL),
    "stopped": (2, signal.SIGSTOP),
    "stopped first": (0, signal.SIGSTOP),
    "failed": (1, "fail"),
    "failed first": (0, "fail"),
    "slow": (1, "sleep"),
}
roll.GIVEN_UP = 2  # or the slow one would take long
BEGIN = 0.5  # seconds after which it happens


def process(index: int, connections: dict[int, watch.Connection], victim: int, end, timeout: float) -> None:
    """One of the processes of an end."""
    one = watch.Watch(index, connections, NAMES, timeout, "the cure")
    one.start()
    for _ in range(3):
        one.arrive()
    time.sleep(BEGIN)
    if end == "leave":
        time.sleep(index * 0.3)
        one.leave()
        watch.end_at_once(0)
    if end == "sleep" and index != victim:
        one.arrive()
    if index == victim and end == "fail":
        sys.stderr.write("mara_jax: no space\n")
        one.fail(2, "no space")
        watch.end_at_once(2)
    if index == victim and isinstance(end, signal.Signals):
        os.kill(os.getpid(), end)
    time.sleep(60)


def forks(victim: int, end, timeout: float) -> tuple[list[int], list]:
    """Process ids and the files of their stderr."""
    pairs = {index: socket.socketpair() for index in range(1, COUNT)}
    started, files = [], []
    for index in range(COUNT):
        files.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - read at the end
        child = os.fork()
        if not child:
            os.dup2(files[-1].fileno(), 2)
            mine = {one: pair[0] for one, pair in pairs.items()} if index == 0 else {0: pairs[index][1]}
            for one in (one for pair in pairs.values() for one in pair if one not in mine.values()):
                one.close()  # or a connection would outlive the process at its other end
            process(index, {one: watch.Connection(end) for one, end in mine.items()}, victim, end, timeout)
            os._exit(99)
        started.append(child)
    for pair in pairs.values():
        pair[0].close(), pair[1].close()
    return started, files


def main() -> None:
    timeout, begun, seen = float(sys.argv[1]), time.monotonic(), {}
    running = {name: forks(victim, end, timeout) for name, (victim, end) in ENDS.items()}
    waiting = {pid: (name, index) for name, (pids, _) in running.items() for index, pid in enumerate(pids)}
    stopped = {running[name][0][victim] for name, (victim, end) in ENDS.items() if end == signal.SIGSTOP}
    while waiting.keys() - stopped:
        pid, status = os.waitpid(-1, 0)
        name, index = waiting.pop(pid)
        seen[name, index] = os.waitstatus_to_exitcode(status), time.monotonic() - begun - BEGIN
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
        seen[waiting[pid]] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - begun - BEGIN
    rows = {name: [None] * COUNT for name in ENDS}
    for (name, index), (status, seconds) in seen.items():
        file = running[name][1][index]
        file.seek(0)
        victim, end = ENDS[name]
        begun_at = seen[name, victim][1] if end in (signal.SIGKILL, "fail") else 0.0
        rows[name][index] = [status, file.read(), round(seconds - begun_at, 2)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
