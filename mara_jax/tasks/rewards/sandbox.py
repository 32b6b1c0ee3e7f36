"""Runs generated Python in a sandbox that the kernel makes: namespaces, a private mount tree, a filter of system calls,
limits. Nothing of it is done by Python, so that code which changes Python changes nothing. See `docs/rewards.md`.
"""

import contextlib
import functools
import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.rewards import seccomp

OUTCOMES = ("passed", "failed", "raised", "ended", "out_of_time", "out_of_memory", "forbidden")
_START_LIMIT = 60.0  # seconds until the code begins, on a machine that is busy
_REPORT_LIMIT = 1 << 20  # bytes; honest reports have fifty a test


class Limits(NamedTuple):
    """What a program may use: seconds by the clock, bytes of memory, bytes of files."""

    seconds: float = 5.0
    memory: int = 1 << 30
    disk: int = 16 << 20


class Verdict(NamedTuple):
    """How a program did.

    passed: of each counted test, whether it passed.
    outcome: one of OUTCOMES. "raised": the code raised before the tests; "ended": it left its process before the last
    test, by exit or by a crash; "forbidden": it made a system call that is not allowed, or opened what is not there.
    """

    passed: tuple[bool, ...]
    outcome: str


def run(code: str, tests: Sequence[tuple[str, bool]], limits: Limits = Limits()) -> Verdict:  # noqa: B008
    """Runs code, then tests in its names, each of which passes if it raises nothing.

    Args:
      code: generated Python; nothing that it does reaches beyond the sandbox.
      tests: Python of one's own that compiles, and whether it counts as a test; what does not count prepares others.

    Raises:
      TaskError: this machine cannot make the sandbox.
    """
    if sys.platform != "linux":
        raise TaskError(f"generated code runs only in a sandbox of the Linux kernel, and this system is {sys.platform}")
    token, count = secrets.token_hex(16), sum(counted for _, counted in tests)
    order = iter(range(count))
    job = {
        "code": code,
        "tests": [(source, next(order) if counted else None) for source, counted in tests],
        "token": token,
        "filter": _filter(),
        **limits._asdict(),
    }
    lines, in_time = _reported(json.dumps(job), token, limits.seconds)
    return _verdict(lines, in_time, count)


def check() -> None:
    """Runs a program in the sandbox; TaskError with what is missing where this machine cannot make it."""
    verdict = run("def double(x):\n    return 2 * x", [("assert double(2) == 4", True)])
    if verdict != Verdict((True,), "passed"):
        raise TaskError(f"the sandbox for generated code does not work here: a correct program {verdict.outcome}")


@functools.cache
def source_of_jail() -> str:
    """The program of the sandbox's process; as text, as its file may lie where the process cannot read."""
    return Path(__file__).with_name("jail.py").read_text()


@functools.cache
def _filter() -> str:
    try:
        return seccomp.program(platform.machine()).hex()
    except ValueError as error:
        raise TaskError(f"generated code cannot be run here: {error}") from None


def _reported(job: str, token: str, seconds: float) -> tuple[list[list[str]], bool]:
    """The words of each line that has the token, and whether the process ended within its time."""
    read, write = os.pipe()
    # Without site-packages, user's files and the environment, which may hold secrets; with hashes that do not vary.
    command = [sys.executable, "-P", "-s", "-S", "-B", "-c", source_of_jail(), str(write)]
    process = subprocess.Popen(
        command, pass_fds=(write,), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"}, cwd="/", start_new_session=True,
    )  # fmt: skip
    os.close(write)
    assert process.stdin is not None and process.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.encode())
            process.stdin.close()
        text, in_time = _text(read, f"\n{token} begun\n".encode(), seconds)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process and, with it, its namespace of processes
        process.wait()
    lines = [words for line in text.splitlines() if (words := line.split()) and words[0] == token]
    if not lines:
        last = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise TaskError(f"the sandbox for generated code did not start: {last or 'no reason is known'}")
    process.stderr.close()
    return [words[1:] for words in lines], in_time


def _text(read: int, begun: bytes, seconds: float) -> tuple[str, bool]:
    """What is written to a pipe until it is closed, `seconds` after the code began or at the limit of its length."""
    text, started = b"", False
    deadline = time.monotonic() + _START_LIMIT
    while len(text) < _REPORT_LIMIT:
        ready, _, _ = select.select([read], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return text.decode(errors="replace"), False
        part = os.read(read, 1 << 16)
        if not part:
            break
        text += part
        if not started and begun in text:
            started, deadline = True, time.monotonic() + seconds
    return text.decode(errors="replace"), True


def _verdict(lines: Sequence[Sequence[str]], in_time: bool, count: int) -> Verdict:
    """What the lines of a report say."""
    said = {line[0]: " ".join(line[1:]) for line in lines}
    if "refused" in said:
        raise TaskError(f"generated code cannot be run here, as the sandbox cannot be made: {said['refused']}")
    numbers = {line[1] for line in lines if line[0] == "passed"}
    passed = tuple(str(number) in numbers for number in range(count))
    if not in_time or said.get("exit") in (f"-{signal.SIGKILL}", f"-{signal.SIGXCPU}"):
        return Verdict(passed, "out_of_time")
    if said.get("exit") == f"-{signal.SIGSYS}":
        return Verdict(passed, "forbidden")
    for outcome in ("out_of_memory", "forbidden", "raised", "ended"):
        if outcome in said:
            return Verdict(passed, outcome)
    if "done" not in said:
        return Verdict(passed, "ended")
    return Verdict(passed, "passed" if all(passed) else "failed")
