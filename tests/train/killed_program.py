"""Runs of the command that are ended: python killed_program.py KIND [flags of the command].

KIND "kill": the process is killed as by SIGKILL; "ask": it gets SIGTERM; "full": the disk is full from there on. Each
line read is a number N and the name of a run directory: a fork of this process runs the command there and meets its end
before the N-th time that it opens a file below the directory to write, renames, makes or removes one. The answer, a
line too, is the exit status, what was about to be done, and what the run wrote to stderr. N = 0 lets it run to its end.

KIND "moment": a line is null, or a phase of run_phases with a number N and seconds; the run directory; and more flags.
This process kills the fork by SIGKILL so many seconds after the N-th time that it comes into that phase. The answer is
the exit status, the phase in which the run was when it ended, what it wrote to stderr, and all times that it came into
a phase, each with the seconds to the next.
"""

import errno
import functools
import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time

from run_phases import OTHER, PHASES, START, WHOLE

sys.path[0] = os.getcwd()

import matplotlib.pyplot  # noqa: E402
import transformers  # noqa: E402

import mara_jax.hf  # noqa: E402
import mara_jax.toy.single_run  # noqa: E402
import mara_jax.toy.sweep  # noqa: E402
import mara_jax.train.loop  # noqa: E402
import mara_jax.train.population.training  # noqa: E402
from mara_jax import main  # noqa: E402

assert transformers.PreTrainedTokenizerFast and matplotlib.pyplot and mara_jax.train.loop  # imported on demand
SIGNALS = {"kill": signal.SIGKILL, "ask": signal.SIGTERM}
WRITES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate")


def path_written(event: str, args: tuple) -> str | None:
    """What is about to be written, if an audit event says so."""
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        writes = args[2] & (os.O_WRONLY | os.O_RDWR) if args[2] is not None else 0
        return os.fsdecode(args[0]) if writes else None
    return os.fsdecode(args[0]) if event in WRITES and isinstance(args[0], str | bytes | os.PathLike) else None


def end_at(kind: str, number: int, workdir: str, report) -> None:
    """Ends this process, or its disk, before its `number`-th write below workdir."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if not (event == "open" or event.startswith("os.")):
            return
        path = path_written(event, args)
        if path is None or not os.path.abspath(path).startswith(workdir):
            return
        count += 1
        if count == number:
            report.write(f"{event} {os.path.relpath(path, workdir)}")
            report.flush()
            if kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
        if number and count >= number and kind == "full" and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)


def tell_phases(pipe: int) -> None:
    """Writes the name of a phase to the pipe whenever this process comes into it, or back into it."""
    inside = [START]

    def told(phase: str, function):
        @functools.wraps(function)
        def wrapped(*args, **named):
            inside.append(inside[-1] if inside[-1] in WHOLE else phase)
            inside[0] = OTHER if inside[-1] == "sampling" else inside[0]
            os.write(pipe, f"{inside[-1]}\n".encode())
            try:
                return function(*args, **named)
            finally:
                inside.pop()
                os.write(pipe, f"{inside[-1]}\n".encode())

        return wrapped

    os.write(pipe, f"{START}\n".encode())
    for phase, names in PHASES.items():
        for name in names:
            module, _, path = name.partition(":")
            *owners, last = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(f"mara_jax.{module}"))
            setattr(owner, last, told(phase, getattr(owner, last)))


def kill_at(child: int, pipe: int, moment: list | None) -> list[tuple[str, float]]:
    """Follows a fork through its phases and kills it at a moment; returns them, each with its seconds."""
    seen: list[tuple[str, float]] = []
    unread, due = b"", None
    while True:
        left = None if due is None else max(0.0, due - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            due = None
            continue
        received = os.read(pipe, 65536)
        if not received:
            break
        *lines, unread = (unread + received).split(b"\n")
        for phase in (line.decode() for line in lines):
            seen.append((phase, time.monotonic()))
            if moment and phase == moment[0] and [name for name, _ in seen].count(phase) == moment[1]:
                due = time.monotonic() + moment[2]
    ends = [begun for _, begun in seen[1:]] + [time.monotonic()]
    return [(phase, end - begun) for (phase, begun), end in zip(seen, ends, strict=True)]


def serve_moments(flags: list[str]) -> None:
    gc.freeze()
    for line in sys.stdin:
        moment, workdir, more = json.loads(line)
        pipe, end = os.pipe()
        with tempfile.TemporaryFile("w+") as err, open(os.devnull, "w") as nothing:
            child = os.fork()
            if not child:
                signal.alarm(3600)
                os.dup2(nothing.fileno(), 1)
                os.dup2(err.fileno(), 2)
                tell_phases(end)
                sys.exit(main.main(["main", *flags, *more, f"--workdir={workdir}"]))
            os.close(end)
            seen = kill_at(child, pipe, moment)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.close(pipe)
            said = (err.seek(0), err.read())[1]
        print(json.dumps([status, seen[-1][0] if status else "", said, seen]), flush=True)


def serve(kind: str, flags: list[str]) -> None:
    gc.freeze()
    for line in sys.stdin:
        number, workdir = json.loads(line)
        with (
            tempfile.TemporaryFile("w+") as err,
            tempfile.TemporaryFile("w+") as report,
            open(os.devnull, "w") as nothing,
        ):
            child = os.fork()
            if not child:
                signal.alarm(300)
                os.dup2(nothing.fileno(), 1)
                os.dup2(err.fileno(), 2)
                end_at(kind, number, workdir, report)
                sys.exit(main.main(["main", *flags, f"--workdir={workdir}"]))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [(file.seek(0), file.read())[1] for file in (report, err)]
        print(json.dumps([status, *said]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "moment":
        serve_moments(sys.argv[2:])
    serve(sys.argv[1], sys.argv[2:])
