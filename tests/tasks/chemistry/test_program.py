"""A program as an oracle: a real script that works, and every way in which one can fail."""

import sys
import time

import pytest

from mara_jax.tasks.chemistry.program import Program

SCRIPT = """
import subprocess, sys, time
lines = sys.stdin.read().splitlines()
for smiles in lines:
    if smiles == "hang":
        subprocess.Popen([sys.executable, "-c", "import time, pathlib; time.sleep(3); pathlib.Path('left').touch()"])
        time.sleep(1000)
    if smiles == "fail":
        print("loading", file=sys.stderr); sys.exit("no licence for docking")
    print({"nan": "nan", "word": "-7.2 kcal", "short": ""}.get(smiles, len(smiles) / 4))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "length.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return Program((sys.executable, "length.py"), seconds=30)


def test_numbers_come_back_in_order(program):
    assert program(["CCO", "C", "c1ccccc1"]) == [0.75, 0.25, 2.0]
    assert program([]) == []


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("nan", "length.py wrote 'nan' for nan: it must write a finite number"),
        ("word", "wrote '-7.2 kcal' for word"),
        ("short", "wrote 1 lines for 2 SMILES: it must write one number a line"),
        ("fail", "ended with status 1: no licence for docking"),
    ],
)
def test_a_failure_is_one_clear_line(program, smiles, message):
    with pytest.raises(ValueError, match=message) as error:
        program(["C", smiles])
    assert "\n" not in str(error.value)


def test_a_program_that_hangs_is_ended_with_what_it_started(program, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"length.py did not end within 1.5 s"):
        Program(program.command, seconds=1.5)(["hang"])
    assert time.monotonic() - start < 3
    time.sleep(2.5)
    assert not (tmp_path / "left").exists()


def test_a_program_that_is_not_there_and_a_text_for_a_command_are_refused():
    with pytest.raises(ValueError, match=r"no-such-program cannot be started: No such file"):
        Program(("no-such-program",))(["C"])
    with pytest.raises(ValueError, match="give a tuple"):
        Program("python length.py")  # type: ignore[arg-type]
