"""The shell scripts of launch/: shellcheck, and what they do about every status, with stand-ins for the cluster."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from mara_jax import cli
from mara_jax.parallel import roll
from mara_jax.train import watchdog

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(path for path in ROOT.glob("launch/*") if path.read_text().startswith("#!/bin/bash"))
SCRIPTS += sorted(ROOT.glob("tests/**/*.sh"))
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")


def stand_in(folder: pathlib.Path, name: str, script: str) -> None:
    """A program of that name in the folder, which notes its arguments in `name`.said."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{folder}/{name}.said"\n{script}\n')
    path.chmod(0o755)


def said(folder: pathlib.Path, name: str) -> list[str]:
    path = folder / f"{name}.said"
    return path.read_text().splitlines() if path.exists() else []


def run(folder: pathlib.Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of launch/ with the folder's programs before others."""
    return subprocess.run(
        ["bash", f"{ROOT}/launch/{script}", *arguments], cwd=folder, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip


# ---- shellcheck -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([SHELLCHECK, "--severity=style", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_would_say_something(tmp_path):
    (tmp_path / "script.sh").write_text("#!/bin/bash\ncat $1\n")
    done = subprocess.run([SHELLCHECK, tmp_path / "script.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and "SC2086" in done.stdout
    assert {path.name for path in SCRIPTS} >= {"slurm.sbatch", "tpu_vm.sh", "xpk.sh", "slurm_here.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_statuses_are_those_of_the_command(script):
    known = {"REFUSED": cli.REFUSED, "STOPPED": cli.STOPPED, "INTERRUPTED": cli.INTERRUPTED}
    for name, value in re.findall(r"\b([A-Z]+)=(\d+)\b", script.read_text()):
        if name in known:
            assert known[name] == int(value)


def test_the_page_lists_every_status():
    page = (ROOT / "docs" / "clusters.md").read_text()
    listed = [int(status) for status in re.findall(r"^\| (\d+) \|", page.split("## SLURM")[0], re.MULTILINE)]
    assert listed == [0, cli.REFUSED, roll.LOST, watchdog.STALLED, cli.STOPPED, cli.INTERRUPTED, 1]


# ---- SLURM ----------------------------------------------------------------------------------------------------------


def submitted(
    folder: pathlib.Path, status: int, state: str = "RUNNING", begin: str = ""
) -> subprocess.CompletedProcess:
    """The batch script, whose tasks do `begin` and end with a status while SLURM has the job in a state."""
    stand_in(folder, "srun", f"{begin}\nexit {status}")
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scontrol", "")
    return run(folder, "slurm.sbatch", "configs/a.py", "runs/a", "--config.seed=1 2", SLURM_JOB_ID="7", PYTHON="py")


SAVE = 'mkdir -p runs/a; echo "{\\"step\\": 3}" >runs/a/saved.json'
SAVE_MEMBER = 'mkdir -p runs/a/members/x; echo "{\\"step\\": 3}" >runs/a/members/x/saved.json'


@pytest.mark.parametrize(
    ("status", "state", "begin", "requeued", "words"),
    [
        (0, "RUNNING", SAVE, False, ""),
        (2, "RUNNING", "", False, "refused with status 2"),
        (75, "RUNNING", SAVE, True, "stopped and saved; the job is RUNNING"),
        (75, "RUNNING", "", True, "stopped and saved"),  # before the first step
        (75, "COMPLETING", SAVE, False, "the job is COMPLETING"),  # cancelled
        (75, "PENDING", SAVE, False, "the job is PENDING"),  # preempted: SLURM has put it back itself
        (137, "RUNNING", "", False, "status 137 before any new checkpoint: not begun again"),
        (137, "RUNNING", SAVE, True, "ended with status 137 after new checkpoints"),
        (1, "RUNNING", SAVE_MEMBER, True, "ended with status 1 after new checkpoints"),
    ],
)
def test_a_job_is_requeued_where_that_helps(tmp_path, status, state, begin, requeued, words):
    done = submitted(tmp_path, status, state, begin)
    assert done.returncode == status and words in done.stdout and done.stderr == ""
    assert said(tmp_path, "scontrol") == ["requeue 7"] * requeued
    (line,) = said(tmp_path, "srun")
    assert line.endswith("py -m mara_jax.main --config=configs/a.py --workdir=runs/a --config.seed=1 2")


def test_a_checkpoint_of_an_earlier_start_is_no_reason(tmp_path):
    assert submitted(tmp_path, 137, begin=SAVE).returncode == 137
    done = submitted(tmp_path, 137, begin="echo again")
    assert "before any new checkpoint" in done.stdout and said(tmp_path, "scontrol") == ["requeue 7"]


def test_the_batch_script_outlives_the_signal_of_its_tasks(tmp_path):
    done = submitted(tmp_path, 75, begin="kill -TERM $PPID")
    assert done.returncode == 75 and "stopped and saved" in done.stdout


# ---- TPU VMs, XPK ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "tries", "last"),
    [((0,), 1, 0), ((2, 0), 1, 2), ((130, 0), 1, 130), ((75, 255, 0), 3, 0), ((75, 75, 75, 75, 1), 4, 75)],
)
def test_a_slice_runs_the_command_until_it_is_done(tmp_path, statuses, tries, last):
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    stand_in(
        tmp_path,
        "gcloud",
        """if [ "$4" = describe ]; then
          # not ready at every other look
          if [ -e looked ]; then rm looked; echo READY; else touch looked; echo PREEMPTED; fi
          exit; fi
        status=$(head -n 1 statuses); sed -i 1d statuses; exit "$status" """,
    )
    done = run(
        tmp_path, "tpu_vm.sh", "configs/a.py", "runs/a", "--config.x='a b'",
        TPU="slice", ZONE="zone", RESTARTS="3", WAIT="0",
    )  # fmt: skip
    assert done.returncode == last and done.stderr.count("slice is PREEMPTED") == tries
    started = [line for line in said(tmp_path, "gcloud") if " ssh " in line]
    assert len(started) == tries and all("--worker=all" in line for line in started)
    # What the hosts' shells read is the flag as it was typed.
    words = started[0].split("exec python3 -m mara_jax.main ")[1]
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True)
    assert shell.stdout.splitlines() == ["--config=configs/a.py", "--workdir=runs/a", "--config.x='a b'"]


def test_a_run_that_was_left_behind_is_asked_to_end_and_no_other_process(tmp_path):
    (pattern,) = re.findall(r'pkill -TERM -f "([^"]+)"', (ROOT / "launch" / "tpu_vm.sh").read_text())
    for line in ("python3 -m mara_jax.main --config=a", "/usr/bin/python3.12 -m mara_jax.main"):
        assert re.search(pattern, line)
    for line in ("bash -c for _ in ...; exec python3 -m mara_jax.main --config=a", "python3 -m mara_jax.tasks.worker"):
        assert not re.search(pattern, line)


def test_xpk_starts_the_command_and_restarts_what_was_saved(tmp_path):
    stand_in(tmp_path, "xpk", 'printf "%s\\n" "$@"; exit 3')
    done = run(tmp_path, "xpk.sh", "one", "configs/a.py", "/runs/a", "--config.x=1", CLUSTER="c", ZONE="z", IMAGE="i")
    words = done.stdout.splitlines()
    assert done.returncode == 3 and words[:2] == ["workload", "create"]
    assert "--command=exec python -m mara_jax.main --config=configs/a.py --workdir=/runs/a --config.x=1" in words
    (codes,) = [word.split("=")[1].split(",") for word in words if word.startswith("--restart-on-exit-codes")]
    assert str(cli.STOPPED) in codes and str(cli.REFUSED) not in codes


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("slurm.sbatch", [], "usage: sbatch"),
        ("slurm.sbatch", ["configs/a.py"], "WORKDIR is missing"),
        ("tpu_vm.sh", ["configs/a.py", "runs/a"], "name of the slice"),
        ("xpk.sh", ["one"], "name of the cluster"),
    ],
)
def test_what_is_missing_is_said(tmp_path, script, arguments, words):
    done = run(tmp_path, script, *arguments)
    assert done.returncode != 0 and words in done.stderr and done.stderr.count("\n") == 1
