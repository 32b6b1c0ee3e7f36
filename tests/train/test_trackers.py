"""TensorBoard's events and trackers: bytes by other readers, kills in the middle, and what a missing package says."""

import importlib
import importlib.util
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import textwrap
from typing import ClassVar, cast

import pytest

from mara_jax.config import LanguageRun
from mara_jax.train import events, metrics, trackers
from mara_jax.train.events import Events

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tensorboardx():
    """The protocol and checksums of tensorboardX, without the torch that it would import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        names = ("tensorboardX.proto.event_pb2", "tensorboardX.record_writer")
        yield tuple(importlib.import_module(name) for name in names)


def read(folder: pathlib.Path, tensorboardx) -> list[tuple[int, dict[str, float]]]:
    """(step, scalars) of the events in a folder's files, in their order; a start has the scalar "start"."""
    found = []
    for path in sorted(folder.iterdir()):
        for place, message in enumerate(events.messages(path)):
            event = tensorboardx[0].Event.FromString(message)
            assert (event.file_version == "brain.Event:2") == (place == 0) and event.wall_time > 1.7e9
            start = {"start": 1.0} if event.session_log.status == 1 else {}
            if place:
                found.append((event.step, start | {one.tag: one.simple_value for one in event.summary.value}))
    return found


def test_events_are_those_that_tensorboard_reads(tmp_path, tensorboardx):
    """The checksum of "123456789" is a published one: e3069283 before it is masked."""
    assert events._masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    for length in (0, 1, 300):
        assert events._masked_crc(bytes(range(256)) * length) == tensorboardx[1].masked_crc32c(
            bytes(range(256)) * length
        )
    rows = {0: {"évaluation/pass@1": 0.5, "x" * 200: -2.0}, 127: {"a": 1e39}, 128: {}, 2**31 - 1: {"a": 0.0}}
    written = Events(tmp_path / "tensorboard", 0)
    for step, values in rows.items():
        written.write(step, values)
    written.close()
    rows[127]["a"] = pytest.approx(3.4e38, rel=1e-6)
    assert read(tmp_path / "tensorboard", tensorboardx) == list(rows.items())


def test_a_resumed_run_has_each_event_once(tmp_path, tensorboardx):
    """Killed after step 5, in the middle of a record, and resumed from 3; then again from 4."""
    first = Events(tmp_path, 0)
    for step in (1, 2, 3, 4, 5):
        first.write(step, {"a": float(step)})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-20:-3])
    path.with_name(f"part.{path.name}").write_bytes(whole[:50])
    second = Events(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 1  # a run that has nothing left to do begins no file
    for step in (4, 5, 6):
        second.write(step, {"a": 10.0 + step})
    expected = [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0}), (4, {"start": 1.0}), (4, {"a": 14.0})]
    assert read(tmp_path, tensorboardx) == [*expected, (5, {"a": 15.0}), (6, {"a": 16.0})]
    third = Events(tmp_path, 4)
    third.write(5, {"a": 25.0})
    assert read(tmp_path, tensorboardx) == [*expected, (5, {"start": 1.0}), (5, {"a": 25.0})]
    assert len(list(tmp_path.iterdir())) == 3


class Recorded:
    """A tracker that keeps what it is told, and fails at a step."""

    told: ClassVar[list] = []
    fails_at = -1

    def __init__(self, cfg, workdir, number) -> None:
        self.number = number
        self.told.append(number)

    def log(self, values, step) -> None:
        if step == self.fails_at:
            raise RuntimeError("no\nroute")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("end")


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """A function that starts the trackers of a run with what is recorded."""
    monkeypatch.setattr(Recorded, "told", [])
    monkeypatch.setitem(trackers.KINDS, "wandb", Recorded)
    notes = Notes()

    def start(steps_done: int, tracker: str = "wandb") -> trackers.Trackers:
        return trackers.Trackers(
            LanguageRun(tracker=tracker), tmp_path, steps_done, cast(metrics.Display, notes), keeps=True
        )

    return start, notes.lines


def test_a_resumed_run_goes_on_in_the_same_tracked_run(tracked, tmp_path, tensorboardx):
    """Killed after step 3, of which only the first two surely were sent, and resumed from step 1."""
    start, _ = tracked
    row = {"reward/mean": 0.5, "loss": None, "answers/by_prompt": [], "samples": 8, "gap/x": float("inf")}
    numbers = {"reward/mean": 0.5, "samples": 8.0}
    one = start(0)
    one.write({"step": 0, "pass@1": 0.25}, "evaluation/")
    for step in (1, 2, 3):
        one.write({"step": step} | row)
    again = start(1)
    for step in (2, 3, 4):
        again.write({"step": step} | row)
    again.write({"step": 4, "pass@1": 0.75}, "evaluation/")
    again.close()
    start(4).close()  # a run that is complete
    number, *told = Recorded.told
    first, last = (0, {"evaluation/pass@1": 0.25}), (4, {"evaluation/pass@1": 0.75})
    steps = [(step, numbers) for step in (1, 2, 3)]
    assert told == [first, *steps, number, (3, numbers), (4, numbers), last, "end", number, "end"]
    assert json.loads((tmp_path / trackers.FILE).read_text())["wandb"]["last"] == {"": 4, "evaluation/": 4}
    found = [one for one in read(tmp_path / trackers.FOLDER, tensorboardx) if "start" not in one[1]]
    assert found == [first, (1, numbers), (2, numbers), (3, numbers), (4, numbers), last]


def test_a_tracker_that_fails_ends_no_run(tracked, monkeypatch):
    start, lines = tracked
    monkeypatch.setattr(Recorded, "fails_at", 2)
    one = start(0)
    for step in (1, 2, 3):
        one.write({"step": step, "loss": 1.0})
    one.close()
    assert Recorded.told[1:] == [(1, {"loss": 1.0})]
    assert lines == ["WARNING: tracker=wandb failed (RuntimeError: no route): the run goes on without it"]


def test_what_cannot_be_tracked_is_one_line(tracked, monkeypatch, tmp_path):
    start, _ = tracked
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        with pytest.raises(ValueError, match=rf'not installed: pip install "mara_jax\[{name}\]"$'):
            trackers.check(name)
    trackers.check("")

    def fail(*_) -> None:
        raise RuntimeError("no\nserver")

    monkeypatch.setitem(trackers.KINDS, "wandb", fail)
    with pytest.raises(ValueError, match=r"^tracker=wandb cannot start \(RuntimeError: no server\): mend that, or"):
        start(0)
    (tmp_path / trackers.FILE).write_text("{}")
    start(0, "").close()
    (tmp_path / trackers.FILE).write_text('{"wandb": 1}')
    with pytest.raises(ValueError, match=r"tracker.json is no record of tracked runs: delete it"):
        start(0)


PROGRAM = """
    import os, pathlib, signal, sys, time
    from mara_jax.config import LanguageRun
    from mara_jax.train import metrics, trackers
    tracker, workdir, done, last = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    trackers.check(tracker)
    one = trackers.Trackers(LanguageRun(tracker=tracker), workdir, done, metrics.Display(9), True)
    for step in range(done + 1, last + 1):
        one.write({"step": step, "reward/mean": step / 10})
        if step == last:
            one.write({"step": step, "pass@1": 1.0}, "evaluation/")
    if last < 9:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)
    one.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_trackers_offline_after_a_kill(tracker, tmp_path):
    """Steps 1 to 5, a kill, and from the checkpoint of step 3 to 9."""
    pytest.importorskip(tracker)
    environment = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}

    def run(done: int, last: int) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", textwrap.dedent(PROGRAM), tracker, str(tmp_path / "nano"), str(done), str(last)]
        return subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)

    (tmp_path / "nano").mkdir()
    ended = [run(0, 5), run(3, 9)]
    assert [one.returncode for one in ended] == [-9, 0], ended
    number = json.loads((tmp_path / "nano" / trackers.FILE).read_text())[tracker]["id"]
    if tracker == "wandb":
        assert ended[1].stderr == ""
        assert len(list((tmp_path / "nano" / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))) == 2
        return
    with sqlite3.connect(tmp_path / "trackio" / "mara_jax.db") as base:
        told = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in told} == {f"nano-{number}"}
    rows = [(step, json.loads(values)) for _, step, values in told]
    assert [step for step, values in rows if "reward/mean" in values] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert [step for step, values in rows if "evaluation/pass@1" in values] == [5, 9]
    assert all(values["reward/mean"] == step / 10 for step, values in rows if "reward/mean" in values)


@pytest.mark.slow
def test_nobody_logged_in_is_one_line(tmp_path):
    pytest.importorskip("wandb")
    program = "from mara_jax.train import trackers; trackers.check('wandb')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment | {"HOME": str(tmp_path)}, capture_output=True,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "ValueError: tracker=wandb: nobody is logged in: give `wandb login`" in done.stderr.splitlines()[-1]
