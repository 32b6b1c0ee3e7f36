"""Runs of the command that are killed where they write: python killed_program.py KIND FOLDER [flags of the command].

KIND "kill": the process is killed as by SIGKILL; "ask": it gets SIGTERM; "full": the disk is full from there on. Each
line read is a number N and the name of a run directory: a fork of this process runs the command there and meets its end
before the N-th time that it opens a file below the directory to write, renames, makes or removes one. The answer, a
line too, is the exit status, what was about to be done, and what the run wrote to stderr. N = 0 lets it run to its end.
"""

import errno
import gc
import json
import os
import signal
import sys
import tempfile

sys.path[0] = os.getcwd()

import matplotlib.pyplot  # noqa: E402
import transformers  # noqa: E402

import mara_jax.hf  # noqa: E402
import mara_jax.train.loop  # noqa: E402
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
    serve(sys.argv[1], sys.argv[2:])
