"""The commands and Python blocks that README.md and docs/*.md print."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(python -m mara_jax|python benchmarks/|make )")
INLINE = re.compile(r"`(python (?:-m mara_jax|benchmarks/)[^`]*)`")


class Command(NamedTuple):
    """A command as a page prints it, and its words without comments."""

    page: str
    text: str
    words: tuple[str, ...]

    @property
    def target(self) -> str:
        """The module, script or make target that it starts."""
        return self.words[2] if self.words[1] == "-m" else self.words[1]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the target."""
        return self.words[3:] if self.words[1] == "-m" else self.words[2:]


def _command(page: pathlib.Path, line: str) -> Command:
    # The number of a process stands for the first, and a command in the background is one like any other.
    words = shlex.split(line.replace("$i", "0").removesuffix("&"), comments=True)
    return Command(page.name, " ".join(words), tuple(words))


def in_blocks() -> list[Command]:
    """The commands of all code blocks, each once, in the order of the pages."""
    commands = {}
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            for line in re.sub(r"\\\n\s*", "", block).splitlines() if not language else []:
                if COMMAND.match(line.strip()):
                    command = _command(page, line.strip())
                    commands.setdefault(command.text, command)
    return list(commands.values())


def in_sentences() -> list[Command]:
    """The commands that stand between backticks, but for those that leave something out."""
    lines = [(page, line) for page in PAGES for line in INLINE.findall(page.read_text()) if "..." not in line]
    return list({command.text: command for command in (_command(page, line) for page, line in lines)}.values())


def python_blocks(page: str) -> list[str]:
    """The Python of a page's blocks."""
    return [block for language, block in BLOCK.findall((ROOT / page).read_text()) if language == "python"]
