"""Runs commands of this package as processes, several of them for the price of one import."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def forked(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Gives what runs `python -m` with its arguments, in a fork of a process that has imported what commands import.

    What the import itself says, or how long it takes, such a command cannot tell: start one per kind as a person would.
    """
    program = [sys.executable, str(pathlib.Path(__file__).with_name("commands_program.py"))]
    with subprocess.Popen(
        program, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout

        def run(*command: str) -> subprocess.CompletedProcess:
            print(json.dumps(command), file=server.stdin, flush=True)
            return subprocess.CompletedProcess(command, *json.loads(server.stdout.readline()))

        yield run


def alone(*command: str) -> subprocess.CompletedProcess:
    """The same in a process of its own, as a person starts it."""
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
