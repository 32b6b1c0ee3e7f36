"""Lists the commands: ``python -m mara_jax``."""

import sys

from mara_jax import cli


def main(argv: list[str]) -> int:
    """Prints the commands, or the version; returns the exit status."""
    return cli.run(None, show, argv)


def show(argv: list[str]) -> int:
    """Prints the commands.

    Raises:
      ValueError: there is an argument.
    """
    if argv[1:]:
        cure = f"python -m mara_jax.{argv[1]}" if argv[1] in cli.COMMANDS else "python -m mara_jax lists them"
        raise ValueError(f"{argv[1]!r} is no command here: {cure}")
    print(cli.list_commands())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
