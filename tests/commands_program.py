"""Commands of this package in processes that need not import it again: python commands_program.py.

Each line read is the JSON list of what would follow `python -m`. It runs in a fork of this process, which has imported
everything but touched no device; the answer, a line too, is its exit status, what it wrote to stdout, and to stderr.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import typing

sys.path[0] = os.getcwd()  # as `python -m` has it

import matplotlib.pyplot  # noqa: E402
import transformers  # noqa: E402

assert transformers.PreTrainedTokenizerFast and matplotlib.pyplot  # both import on demand
PACKAGES = ("audit", "bench", "evaluate", "export", "figures", "generate", "plan", "predict", "prior")
for module in ("hf", "toy.sweep", "toy.single_run", "train.loop", *(f"{package}.command" for package in PACKAGES)):
    importlib.import_module(f"mara_jax.{module}")
SECONDS = 300  # after which a command is ended


def become(command: list[str], out: typing.IO, err: typing.IO) -> typing.NoReturn:
    """What a fork does: all that `python -m` does, and ends as that ends."""
    signal.alarm(SECONDS)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    sys.exit(0)


def main() -> None:
    gc.freeze()  # or each fork would copy what its collector looks at
    for line in sys.stdin:
        command = json.loads(line)
        # A command must run from its first line: nothing may have imported it.
        imported = sys.modules.get(command[0])
        assert imported is None or (hasattr(imported, "__path__") and f"{command[0]}.__main__" not in sys.modules)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                become(command, out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [(file.seek(0), file.read())[1] for file in (out, err)]
        print(json.dumps([status, *said]), flush=True)


if __name__ == "__main__":
    main()
