"""Two jobs on a SLURM cluster: python slurm_program.py FOLDER [flags of the command], inside slurm_here.sh.

FOLDER/whole is the run of a job that nothing happens to, FOLDER/cut that of one that is requeued in the middle; beside
them lie their logs. What is typed, and what SLURM answers, is printed.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
SUBMIT = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0".split()
LIMIT = float(os.environ.get("LIMIT", "1800"))  # seconds for anything that is waited for


def typed(*command: str) -> str:
    """Prints a command and its output, which is returned."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print((done.stdout + done.stderr).strip(), flush=True)
    assert done.returncode == 0, command
    return done.stdout.strip()


def wait(until: Callable[[], bool], what: str) -> None:
    begun = time.time()
    while not until():
        assert time.time() - begun < LIMIT, f"{what}: not within {LIMIT:g} s"
        time.sleep(0.2)
    print(f"# {what}, after {time.time() - begun:.0f} s", flush=True)


def state_of(job: str) -> str:
    """As `squeue` has it; a job that ended some minutes ago is gone."""
    words = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T %r"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def submitted(folder: pathlib.Path, name: str, flags: list[str]) -> str:
    """The job's number."""
    config = next(flag.partition("=")[2] for flag in flags if flag.startswith("--config="))
    others = [flag for flag in flags if not flag.startswith("--config=")]
    log = f"--output={folder / name}.log"
    return typed("sbatch", "--parsable", *SUBMIT, log, "launch/slurm.sbatch", config, str(folder / name), *others)


def steps_done(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def main() -> None:
    folder, flags = pathlib.Path(sys.argv[1]), sys.argv[2:]
    typed("sinfo")
    whole = submitted(folder, "whole", flags)
    wait(lambda: state_of(whole).startswith(("COMPLETED", "FAILED")), "the job has ended")
    typed("scontrol", "--oneliner", "show", "job", whole)

    cut = submitted(folder, "cut", flags)
    wait(lambda: steps_done(folder / "cut") >= 2, "two steps are done")
    typed("scontrol", "requeue", cut)
    wait(lambda: state_of(cut).startswith("PENDING"), "the job waits to begin again")
    typed("squeue")
    saved = json.loads((folder / "cut" / "saved.json").read_text())["step"]
    print(f"# saved: step {saved}; metrics.jsonl has {steps_done(folder / 'cut')} rows")
    typed("scontrol", "update", f"JobId={cut}", "StartTime=now")  # it would wait for two minutes
    wait(lambda: state_of(cut).startswith(("COMPLETED", "FAILED")), "the job has ended")
    typed("scontrol", "--oneliner", "show", "job", cut)
    for name in ("whole", "cut"):
        print(f"# {name}.log\n" + (folder / f"{name}.log").read_text())


if __name__ == "__main__":
    main()
