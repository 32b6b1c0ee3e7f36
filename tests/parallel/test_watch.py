"""What processes conclude of each other, by a clock that the test sets; and what they must have in common."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import mara_jax
from mara_jax.parallel import fingerprint, meeting
from mara_jax.parallel.meeting import Connection
from mara_jax.parallel.roll import GIVEN_UP, LOST, PATIENCE, Loss, Roll

NAMES = {0: "process 0", 1: "process 1", 2: "process 2"}


def roll(timeout: float = 10.0) -> Roll:
    return Roll(NAMES, timeout, now=0.0)


def all_heard(one: Roll, now: float) -> None:
    for process in NAMES:
        one.heard(process, now)


# ---- the roll -------------------------------------------------------------------------------------------------------


def test_a_closed_connection_is_a_dead_process_at_once():
    one = roll()
    assert one.loss(0.0) is None
    one.closed(2)
    loss = one.loss(0.1)
    assert loss and loss[:2] == (2, LOST) and loss.words.startswith("process 2 is dead")


def test_a_process_is_silent_after_the_timeout_and_not_before():
    one = roll()
    one.heard(0, 9.0), one.heard(1, 9.0)
    assert one.loss(10.0) is None  # process 2 was heard last at 0
    loss = one.loss(10.1)
    assert loss and loss[:2] == (2, LOST) and "process 2 has been silent for 10 s" in loss.words


def test_the_reason_that_a_process_gives_comes_before_closed_connections_and_the_first_one_counts():
    one = roll()
    one.closed(1)
    one.ended(2, 2, "no space left to write a", 3.0)
    one.ended(1, 1, "process 2 closed the connection", 3.1)
    assert one.loss(3.2) == Loss(2, 2, "process 2 has ended with status 2: no space left to write a")


@pytest.mark.parametrize("status", [75, 130])
def test_a_signal_that_may_have_gone_to_all_leaves_them_time_to_end_by_themselves(status):
    one = roll()
    one.ended(1, status, "stopped by SIGTERM", 3.0)
    one.closed(1)
    assert one.loss(3.0 + PATIENCE - 0.1) is None
    loss = one.loss(3.0 + PATIENCE)
    assert loss and loss[:2] == (1, status)


def test_a_process_that_did_not_run_itself_gives_the_others_their_time_again():
    one = roll()
    one.arrived(0, 1, 1.0)
    one.suspended(400.0)
    assert one.loss(409.9) is None and one.warnings(409.9) == []
    loss = one.loss(410.1)
    assert loss and "silent" in loss.words


def test_one_that_the_others_wait_for_is_named_after_the_timeout_and_given_up_after_thirty_times_as_long():
    one = roll()
    one.arrived(0, 1, 5.0), one.arrived(2, 1, 6.0)  # so process 1 is behind since 5
    told = []
    for now in range(6, 6 + 30 * 10):
        all_heard(one, now)
        told += [(now, line) for line in one.warnings(now) if "have waited" in line and "of the last" not in line]
        assert one.loss(now) is None
    # After more than 10 s of waiting, and whenever they have doubled.
    assert [now for now, _ in told] == [16, 28, 52, 100, 196]
    assert told[0][1] == "WARNING: process 1 is slow: the others have waited 11 s for it"
    all_heard(one, 305.5)
    loss = one.loss(305.5)
    assert GIVEN_UP == 30 and loss and loss[:2] == (1, LOST) and "too slow" in loss.words


def test_of_processes_that_make_no_progress_the_one_that_the_others_wait_for_is_named():
    one = roll()
    one.arrived(0, 1, 1.0), one.arrived(2, 1, 2.0)
    all_heard(one, 9.0)
    one.hangs(2, 70, "no progress: process 2 is in the update")
    assert one.loss(9.0) == Loss(1, 70, "process 1 hangs: the others have waited 8 s for it")
    one.hangs(1, 70, "no progress: process 1 is in the scoring")
    assert one.loss(9.0) == Loss(1, 70, "process 1 hangs: no progress: process 1 is in the scoring")
    one.arrived(1, 1, 9.0)  # all are in one computation
    assert one.loss(9.0) == Loss(2, 70, "process 2 hangs: no progress: process 2 is in the update")


def test_one_that_arrives_is_not_waited_for_any_more():
    one = roll()
    one.arrived(0, 1, 1.0), one.arrived(2, 1, 1.0)
    one.arrived(1, 1, 9.0)
    all_heard(one, 5000.0)
    assert one.loss(5000.0) is None and one.warnings(5000.0) == []


def steps(one: Roll, late: dict[int, float], count: int, began: float = 0.0) -> list[str]:
    """Warnings of meetings a second apart, which these processes reach late by so many seconds."""
    lines = []
    for number in range(1, count + 1):
        for now, process in sorted((began + number + late.get(process, 0.0), process) for process in NAMES):
            one.heard(process, now)
            one.arrived(process, number, now)
            lines += one.warnings(now)
    return lines


def test_a_process_that_is_late_at_every_meeting_is_named_ever_more_rarely():
    lines = steps(roll(), {1: 0.8}, 85)  # eight windows of ten seconds
    assert len(lines) == 4  # the first, second, fourth and eighth
    assert lines[0].startswith("WARNING: process 1 is slow: the others have waited")
    assert 0.7 * 10 < float(lines[0].split("waited ")[1].split()[0]) < 0.9 * 10


@pytest.mark.parametrize("late", [{}, {1: 0.4}, {0: 0.8, 2: 0.8}], ids=["none", "a little", "most of them"])
def test_who_is_a_little_late_or_late_with_most_is_not_named(late):
    assert steps(roll(), late, 50) == []


# ---- what they have in common ---------------------------------------------------------------------------------------

ALIKE = {"code": "aa", "version/jax": "0.9", "config/steps": "4"}


def test_alike_processes_are_not_refused():
    assert fingerprint.refusal({0: ALIKE, 1: dict(reversed(ALIKE.items()))}, NAMES) is None


def test_of_two_processes_the_second_differs_and_of_three_the_one_that_stands_alone():
    other = ALIKE | {"config/steps": "5"}
    words = " differs from the other processes of the run (steps=5 instead of 4): start all of them with the same "
    assert fingerprint.refusal({0: ALIKE, 1: other}, NAMES) == "process 1" + words + "code, packages and flags"
    alone = fingerprint.refusal({0: other, 1: ALIKE, 2: ALIKE}, NAMES)
    assert alone and alone.startswith("process 0" + words)


def test_code_versions_and_settings_that_one_lacks_are_named_three_of_them():
    other = {"code": "bb", "version/jax": "0.8", "config/seed": "1"}
    said = fingerprint.refusal({0: ALIKE, 1: other}, NAMES)
    assert said and "its files of mara_jax have digest bb instead of aa" in said
    assert "seed=1 instead of None" in said and "1 more" in said


def test_a_changed_byte_name_or_file_changes_the_digest_of_the_code(tmp_path):
    (tmp_path / "a.py").write_text("x")
    seen = {fingerprint.of_sources(tmp_path)}
    (tmp_path / "a.py").write_text("y")
    seen.add(fingerprint.of_sources(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    seen.add(fingerprint.of_sources(tmp_path))
    (tmp_path / "ignored.txt").write_text("z")
    assert fingerprint.of_sources(tmp_path) in seen and len(seen) == 3


def test_a_process_knows_its_settings_by_their_dotted_names():
    own = fingerprint.of_process({"steps": 3, "mesh": {"data": -1}, "betas": (1.0, 2.0)})
    assert own["config/steps"] == "3" and own["config/mesh.data"] == "-1" and own["config/betas"] == "[1.0, 2.0]"
    assert own["version/mara_jax"] == mara_jax.__version__ and len(own["code"]) == 16


# ---- connections ----------------------------------------------------------------------------------------------------


def test_messages_arrive_whole_however_their_bytes_are_cut():
    one, other = socket.socketpair()
    reader = Connection(other)
    for part in (b'{"a"', b': 1}\n{"b": 2}\n{"c', b'": 3}\n'):
        one.sendall(part)
        time.sleep(0.01)
        if part == b'{"a"':
            assert reader.received() == []
    assert reader.received() == [{"a": 1}, {"b": 2}, {"c": 3}]
    one.close()
    assert reader.received() is None


# ---- how they meet ---------------------------------------------------------------------------------------------------


def met(arriving: list[tuple[int, int, dict]], seconds: float = 5.0) -> list:
    """What `meeting.meet` answers these processes (number, count, settings), by threads: names, or a refusal."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"

    def arrive(process: int, count: int, settings: dict) -> dict | str:
        try:
            peers, names = meeting.meet(meeting.Place(address, count, process), settings, seconds)
        except ValueError as error:
            return str(error)
        assert set(peers) == ({*range(count)} - {0} if process == 0 else {0})
        for peer in peers.values():
            peer.socket.close()
        return names

    with ThreadPoolExecutor(len(arriving)) as threads:
        return [one.result() for one in [threads.submit(arrive, *each) for each in arriving]]


def test_processes_that_meet_know_the_names_of_all():
    answers = met([(1, 3, {"steps": 4}), (2, 3, {"steps": 4}), (0, 3, {"steps": 4})])
    assert answers[0] == answers[1] == answers[2]
    assert list(answers[0]) == [0, 1, 2] and answers[0][2].startswith(f"process 2 (pid {os.getpid()} on ")


def test_one_with_another_config_is_named_to_all():
    for answer in met([(0, 3, {"steps": 4}), (1, 3, {"steps": 4}), (2, 3, {"steps": 5})]):
        assert answer.startswith("process 2 (pid ") and "differs" in answer and "(steps=5 instead of 4)" in answer


def test_one_that_counts_more_processes_is_named():
    for answer in met([(0, 2, {}), (1, 3, {})]):
        assert answer.startswith("process 1 (pid ") and "(num_processes=3 instead of 2)" in answer


def test_who_is_missing_or_there_twice_is_named():
    absent = met([(0, 3, {}), (2, 3, {})], seconds=0.6)
    assert absent[0] == absent[1] and absent[0].startswith("process 1 of 3 has not arrived at localhost:")
    alone = met([(1, 2, {})], seconds=0.6)
    assert alone[0].startswith("process 0 has not answered process 1 at localhost:") and "refused" in alone[0]
    twice = met([(0, 3, {}), (1, 3, {}), (1, 3, {})])
    assert sum("another process is process 1, too" in one or "two processes are process 1" in one for one in twice) == 3


def test_a_port_that_is_taken_and_a_stranger_who_connects(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        place = meeting.Place(f"localhost:{taken.getsockname()[1]}", 2, 0)
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
        with pytest.raises(ValueError, match=r"process 0 cannot listen at localhost:.*another port"):
            meeting.meet(place, {}, 1.0)
    one, other = socket.socketpair()
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert meeting.Connection(one).first(time.monotonic() + 1) is None


# ---- the watch, between processes without a run ---------------------------------------------------------------------

TIMEOUT = 1.5  # seconds


@pytest.fixture(scope="module")
def ends() -> dict[str, list]:
    """By end and process: exit status, stderr, seconds;"""
    program = pathlib.Path(__file__).with_name("watch_program.py")
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(mara_jax.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(program), str(TIMEOUT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CLOSED = "is dead (its connection closed without a word: killed, out of memory, or its machine is gone); the cure\n"
SILENT = "has been silent for 1.5 s (stopped, swapped out, or cut off); the cure\n"
SLOW = "is too slow: the others have waited 3 s for it; the cure\n"


@pytest.mark.parametrize(
    ("end", "victim", "words", "within"),
    [
        ("killed", 1, CLOSED, TIMEOUT),
        ("killed first", 0, CLOSED, TIMEOUT),
        ("stopped", 2, SILENT, TIMEOUT + 5),
        ("stopped first", 0, SILENT, TIMEOUT + 5),
    ],
)
def test_all_others_end_with_one_line_that_names_the_process(ends, end, victim, words, within):
    for process, (status, said, seconds) in enumerate(ends[end]):
        if process != victim:
            assert (status, said) == (LOST, f"mara_jax: process {victim} {words}")
            assert seconds < within, "time to notice"


@pytest.mark.parametrize(("end", "victim"), [("failed", 1), ("failed first", 0)])
def test_all_end_with_the_status_of_one_that_says_why_it_ends(ends, end, victim):
    for process, (status, said, seconds) in enumerate(ends[end]):
        why = "no space" if process == victim else f"process {victim} has ended with status 2: no space"
        assert (status, said) == (2, f"mara_jax: {why}\n") and seconds < TIMEOUT


@pytest.mark.parametrize(("end", "victim"), [("stopped", 2), ("stopped first", 0)])
def test_a_process_that_was_stopped_and_goes_on_says_that_it_was_given_up(ends, end, victim):
    status, said, _ = ends[end][victim]
    assert status == LOST and said.count("\n") == 1 and f"process {victim}" in said
    assert "itself did not run" in said or "has been silent" in said


def test_processes_that_come_to_the_end_in_order_say_nothing_and_wait_for_the_last(ends):
    assert [(status, said) for status, said, _ in ends["whole"]] == [(0, "")] * 3
    assert min(seconds for *_, seconds in ends["whole"]) > 0.5  # the last comes after 0.6 s


def test_a_slow_process_is_named_by_process_0_and_given_up_at_last(ends):
    for status, said, seconds in ends["slow"]:
        warned, last = said.splitlines()[:-1], said.splitlines()[-1]
        assert status == LOST and f"{last}\n" == f"mara_jax: process 1 {SLOW}" and 3 <= seconds < 9
        assert all(line.startswith("WARNING: process 1 is slow: the others have waited") for line in warned)
    assert [len(said.splitlines()) for _, said, _ in ends["slow"]][1:] == [1, 1]
