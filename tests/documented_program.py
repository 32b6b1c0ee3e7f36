"""Parses command lines with the parsers of their own commands, and runs none: python documented_program.py < JSON.

The input is a list of commands, each a list of what follows `python -m`; the output a list with an empty string for
each that its parser takes, and what it answered otherwise. Every command is parsed in a fork, since flags are global.
"""

import importlib
import json
import os
import sys

sys.path[0] = os.getcwd()  # as `python -m` has it

from mara_jax import config, main  # noqa: E402


def parser_of(module: str):
    """The function of a command that parses its arguments, the first of which is the command's name."""
    if module == "mara_jax.main":  # checks the run, too
        return lambda words: config.resolve(main.parse(words).config)
    return importlib.import_module(f"{module}.command").parse


def answer(parse, words: list[str]) -> str:
    """What the parser says against these words, if anything."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        sys.argv = words  # where config flags look for overrides
        try:
            parse(words)
            said = ""
        except SystemExit as error:
            said = f"exit status {error.code}" if error.code else ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


if __name__ == "__main__":
    lines = json.load(sys.stdin)
    parsers = {module: parser_of(module) for module in {line[0] for line in lines}}
    print(json.dumps([answer(parsers[line[0]], line) for line in lines]))
