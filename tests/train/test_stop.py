"""Runs that a signal asks to end: saved, with a status of their own, and resumed exactly."""

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from small_run import evaluations, rows
from test_killed import RUN, Runs

from mara_jax import cli, main
from mara_jax.parallel import stop
from mara_jax.train import checkpoint, loop, rollouts


def send(number: int) -> None:
    """Sends a signal to this process, whose handler has run when the call returns or raises."""
    signal.raise_signal(number)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_what_listens_and_only_the_first_is_raised(number):
    before = signal.getsignal(number)
    with pytest.raises(stop.Stopped, match=f"stopped by {signal.Signals(number).name}$") as raised, stop.listening():
        try:
            send(number)
        finally:
            send(signal.SIGTERM)  # while the first is being answered
    assert not raised.value.in_order
    assert signal.getsignal(number) is before and not stop.asked()


def test_a_deferred_signal_is_noted_and_raised_at_the_end_unless_it_was_answered():
    with stop.listening():
        with stop.deferred():
            assert not stop.asked()
        seen = []
        with pytest.raises(stop.Stopped, match="by SIGUSR1"), stop.deferred():
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            seen.append(stop.asked())
        assert seen == [True]
    words = "by SIGTERM after step 3, which is saved"
    with pytest.raises(stop.Stopped, match=words) as raised, stop.listening(), stop.deferred():
        send(signal.SIGTERM)
        stop.check_finished(3, 4)
    assert raised.value.in_order


@pytest.mark.parametrize("ends, status", [("stop.end_process_after_listening()", 75), ("", -signal.SIGTERM)])
def test_a_signal_while_the_interpreter_ends_leaves_the_status_as_it_is(ends, status):
    program = f"""
import os, signal, sys
from mara_jax.parallel import stop
{ends}
try:
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
except stop.Stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(75)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == status


@pytest.fixture
def handles_ctrl_c():
    """As in a program on a terminal: those that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, stop.Stopped), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_is_not_lost_in_a_finalizer(number, error, handles_ctrl_c):
    """What is raised there, Python throws away."""

    class Finalized:
        def __del__(self):
            send(number)

    with pytest.raises(error), stop.listening():
        finalized = Finalized()
        del finalized  # nothing is raised here
        came = time.monotonic()
        while time.monotonic() < came + 20:
            time.sleep(0.01)
    assert not stop.asked()


def test_a_run_that_was_asked_in_another_process_says_so():
    stop.check_finished(4, 4)
    with pytest.raises(stop.Stopped, match="another process of the run was asked to end before the first step"):
        stop.check_finished(0, 4)


def test_stopping_is_one_line_and_a_status_of_its_own(capsys):
    def function(_: list[str]) -> int:
        with stop.listening():
            send(signal.SIGTERM)
        return 0

    assert cli.run(main.COMMAND, function, ["main"]) == cli.STOPPED == 75
    out, err = capsys.readouterr()
    assert not out and err == f"mara_jax: stopped by SIGTERM; {main.COMMAND.interrupted}\n"
    assert len({0, 1, cli.REFUSED, cli.STOPPED, cli.INTERRUPTED, 128 + signal.SIGTERM}) == 6


# ---- runs -----------------------------------------------------------------------------------------------------------


def same_run(workdir: pathlib.Path, whole: pathlib.Path) -> bool:
    return (
        rows(workdir) == rows(whole)
        and evaluations(workdir) == evaluations(whole)
        and rollouts.read(workdir).equals(rollouts.read(whole))
        and (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
        == (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    )


def test_a_run_that_is_asked_to_end_in_a_step_saves_the_one_before_and_is_resumed_exactly(
    monkeypatch, capsys, tmp_path
):
    """In this process: in the scoring of the third of four steps."""
    flags = ["main", *RUN, "--config.steps=4", "--config.checkpoint.every=100"]
    calls, scored_batches = [], loop.scored_batches

    def asking(*args):
        calls.append(None)
        if len(calls) == 3:
            send(signal.SIGTERM)
        return scored_batches(*args)

    workdir, whole = tmp_path / "asked", tmp_path / "whole"
    assert main.main([*flags, f"--workdir={whole}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "scored_batches", asking)
        assert main.main([*flags, f"--workdir={workdir}"]) == cli.STOPPED
    said = capsys.readouterr().err.splitlines()
    assert said == [f"mara_jax: stopped by SIGTERM after step 2, which is saved; {main.COMMAND.interrupted}"]
    assert checkpoint.saved_steps(workdir) == [2] and len(rows(workdir)) == 2 and not (workdir / "lock").exists()
    assert main.main([*flags, f"--workdir={workdir}"]) == 0
    assert "resuming after step 2" in capsys.readouterr().out and same_run(workdir, whole)
    # Both have ended: asked for the same once more, there is nothing to do, which is no success.
    for folder in (workdir, whole):
        assert main.main([*flags, f"--workdir={folder}"]) == cli.REFUSED
        said = capsys.readouterr().err
        assert f"no step is left: {folder} has ended after step 4" in said and said.count("\n") == 1
    assert same_run(workdir, whole)


@pytest.fixture(scope="module")
def asked(quick_environment, tmp_path_factory) -> Iterator[tuple[Runs, pathlib.Path]]:
    """Runs that get SIGTERM at a write, and the folder of one that gets none."""
    runs, whole = Runs("ask", quick_environment), tmp_path_factory.mktemp("whole") / "run"
    try:
        assert runs.run(whole) == (0, "", "")
        yield runs, whole
    finally:
        runs.process.kill()


SAVED = "mara_jax: stopped by SIGTERM after step 1, which is saved; "


@pytest.mark.slow
def test_asked_to_end_wherever_it_writes_a_run_is_resumed_exactly(asked, tmp_path):
    (runs, whole), said_saved = asked, 0
    for number in range(1, 1000, 6):
        workdir = tmp_path / str(number)
        status, where, said = runs.run(workdir, number)
        if not where:
            break
        assert status == cli.STOPPED and said.startswith("mara_jax: stopped by SIGTERM"), (where, status, said)
        assert said.count("\n") == 1, where
        said_saved += said.startswith(SAVED)
        assert runs.run(workdir) == (0, "", ""), where
        assert same_run(workdir, whole), where
    assert number > 60 and said_saved > 2
