"""A stage of launch/Dockerfile without Docker: python dockerfile_steps.py STAGE FOLDER [flags of the entry point].

FOLDER, which must be empty, stands for the root of the image and gets a virtual environment for its Python. Steps are
printed as they are taken; at the end the entry point is started with the flags, if there are any.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import venv
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "launch" / "Dockerfile"


class Step(NamedTuple):
    """An instruction of a Dockerfile, such as RUN, and what follows it."""

    instruction: str
    text: str


def stages(text: str) -> dict[str, list[Step]]:
    """The steps of each stage, those of the stage that it begins from first."""
    known: dict[str, list[Step]] = {}
    steps: list[Step] = []
    lines = [
        line for line in text.splitlines() if not line.lstrip().startswith("#")
    ]  # comments may stand within a step
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            image, _, name = rest.split()
            steps = known.setdefault(name, [*known.get(image, [])])
        elif instruction:
            steps.append(Step(instruction, rest.strip()))
    return known


def take(steps: list[Step], root: pathlib.Path, flags: list[str]) -> None:
    """Takes the steps below `root`; its entry point is started if there are flags for it."""
    venv.create(root / "venv", with_pip=True)
    environment = {"PATH": f"{root}/venv/bin:{os.environ['PATH']}", "HOME": str(root)}
    folder, entry_point = root, []
    for instruction, text in steps:
        print(instruction, text, flush=True)
        if instruction == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(text))
        elif instruction == "WORKDIR":
            folder = root / text.lstrip("/")
            folder.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = text.split()
            for source in sources:
                copied = folder / target / (source if target == "./" else "")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, copied, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, copied)
        elif instruction == "RUN":
            subprocess.run(["sh", "-c", text], cwd=folder, env=environment, check=True)
        elif instruction == "ENTRYPOINT":
            entry_point = json.loads(text)
        else:
            raise ValueError(f"{instruction} is not known here: add what it does")
    if flags:
        print("$", *entry_point, *flags, flush=True)
        program = shutil.which(entry_point[0], path=environment["PATH"])
        subprocess.run([str(program), *entry_point[1:], *flags], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    place = pathlib.Path(sys.argv[2]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if list(place.iterdir()):
        raise SystemExit(f"{place} is not empty")
    take(stages(FILE.read_text())[sys.argv[1]], place, sys.argv[3:])
