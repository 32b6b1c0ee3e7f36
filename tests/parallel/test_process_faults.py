"""One of two processes of the real command meets a fault: what the other says, when, and with which status both end."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import hand_made_policy
import pytest

from mara_jax.parallel.roll import LOST
from mara_jax.train import checkpoint, rollouts, watchdog

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT, STEPS = 8, 10  # seconds of silence; steps of the run
PAUSE = 0.2  # seconds that a call of the reward takes, or the steps would be over before anything happens
NOTICED: list[str] = []  # a line for each fault: when it was noticed, with which status and words


@pytest.fixture(scope="module", autouse=True)
def table_of_what_was_noticed(request):
    """Printed behind the last test, for whoever reads how long each fault took."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(["fault | noticed after | statuses | line", *NOTICED]))


REWARD = f"""
import os, pathlib, time

calls = 0

def reward(completions):
    global calls
    calls += 1
    time.sleep({PAUSE})
    if calls == 6 and "SLEEPS" in os.environ:
        pathlib.Path(os.environ["SLEPT"]).write_text(str(time.time()))
        time.sleep(float(os.environ["SLEEPS"]))
    return [("1" in text) + len(text) / 100 for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def environment(quick_environment):
    """That of all processes: each program runs a few times on little, and all share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A run of a user's prompts and reward, its parameters and optimiser sharded over two processes."""
    folder = tmp_path_factory.mktemp("inputs")
    weights = hand_made_policy.write(folder / "small")
    (folder / "own.py").write_text(REWARD)
    (folder / "own.jsonl").write_text("\n".join(json.dumps({"prompt": f"Number {one}?"}) for one in range(4)))
    return f"""--config={ROOT}/configs/prompts.py:nano --config.policy.weights={weights} --config.warmup.steps=0
        --config.task.prompts={folder}/own.jsonl --config.task.reward={folder}/own.py:reward --config.task.answer=
        --config.task.truncated=score --config.reference.samples=4 --config.rollout.prompts_per_step=2
        --config.rollout.group_size=8 --config.rollout.max_new_tokens=10 --config.rollout.length_buckets=1
        --config.optimiser.learning_rate=1e-3 --config.mesh.fsdp=2 --config.checkpoint.every=2
        --config.steps={STEPS} --process_timeout={TIMEOUT}""".split()


class Pair:
    """Two processes of one run, started as a person would start them.

    Args:
      only: what process 1 has beside the flags of both; environment: of process 1 alone; code: where it has its code.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        flags: list[str],
        only: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        code: pathlib.Path = ROOT,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.workdir, self.said = workdir, [workdir.parent / f"{workdir.name}_{index}.said" for index in range(2)]
        together = [f"--workdir={workdir}", f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        self.processes = []
        for index in range(2):
            own = [*flags, *together, f"--process_id={index}", *(only if index else ())]
            place, more = (code, environment or {}) if index else (ROOT, {})
            inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}  # jax has set it here
            with self.said[index].open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "mara_jax.main", *own],
                        cwd=place, env=inherited | {"PYTHONPATH": str(place)} | more,
                        stdout=subprocess.DEVNULL, stderr=err,
                    )
                )  # fmt: skip

    def until(self, happened, seconds: float = 900) -> float:
        """Waits until something has happened; returns the clock."""
        deadline = time.time() + seconds
        while not happened():
            assert time.time() < deadline, (self.statuses(), self.lines(0), self.lines(1))
            time.sleep(0.02)
        return time.time()

    def until_step(self, step: int) -> None:
        """Waits until so many steps have rows."""
        path = self.workdir / "metrics.jsonl"

        def there() -> bool:
            assert self.statuses() == [None, None], (self.statuses(), self.lines(0), self.lines(1))
            return path.exists() and path.read_text().count("\n") >= step

        self.until(there)

    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def lines(self, index: int) -> list[str]:
        """What a process has written to stderr, but for the collectives' own lines."""
        return [line for line in self.said[index].read_text().splitlines() if "peer ranks" not in line]

    def last_words(self, index: int) -> list[str]:
        """The lines with which a process ends; on a machine with much to do, one or the other is slow before."""
        return [line for line in self.lines(index) if " is slow: " not in line]

    def finish(self) -> list[int | None]:
        self.until(lambda: None not in self.statuses())
        return self.statuses()


@pytest.fixture
def pair():
    """Starts a `Pair`, whose processes end with the test."""
    with contextlib.ExitStack() as ends:

        def start(*args, **named) -> Pair:
            one = Pair(*args, **named)
            for process in one.processes:
                ends.callback(process.kill)  # also one that is stopped
            return one

        yield start


def kept(workdir: pathlib.Path) -> dict:
    """What a run has left, without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "rows": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines],
        "rollouts": rollouts.read(workdir).to_pylist(),
        "weights": {path.name: path.read_bytes() for path in (workdir / "model").glob("*.safetensors")},
        "checkpoints": checkpoint.saved_steps(workdir),
    }


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> dict:
    """What the run leaves that nothing has happened to."""
    one = Pair(tmp_path_factory.mktemp("whole") / "run", flags)
    assert one.finish() == [0, 0] and one.last_words(0) == one.last_words(1) == [], (one.lines(0), one.lines(1))
    seen = kept(one.workdir)
    assert len(seen["rows"]) == STEPS and all(row["grad/norm"] > 0 for row in seen["rows"]) and seen["weights"]
    return seen


def goes_on(pair, workdir: pathlib.Path, flags: list[str], whole: dict) -> None:
    """The same commands end as a run that nothing has happened to."""
    one = pair(workdir, flags)
    assert one.finish() == [0, 0], (one.lines(0), one.lines(1))
    seen = kept(workdir)
    for name, value in whole.items():
        assert seen[name] == value, name


def name_of(one: Pair, index: int) -> str:
    return f"process {index} (pid {one.processes[index].pid} on {socket.gethostname()})"


def note(fault: str, seconds: float | None, statuses: list[int | None], words: str) -> None:
    when = "at the start" if seconds is None else f"{seconds:.1f} s"
    NOTICED.append(f"{fault} | {when} | {' and '.join(map(str, statuses))} | {words.strip()}")


def test_one_that_is_killed_is_named_at_once_and_the_same_commands_go_on(pair, flags, whole, tmp_path):
    one = pair(tmp_path / "run", flags)
    one.until_step(5)
    os.kill(one.processes[1].pid, signal.SIGKILL)
    killed = time.time()
    ended = one.until(lambda: one.statuses()[0] is not None, 30)
    assert one.finish() == [LOST, -signal.SIGKILL] and ended - killed < 5
    (line,) = one.last_words(0)
    assert line.startswith(f"mara_jax: {name_of(one, 1)} is dead (its connection closed without a word")
    note("killed (SIGKILL)", ended - killed, one.statuses(), line)
    assert 4 <= max(checkpoint.saved_steps(tmp_path / "run")) < STEPS
    goes_on(pair, tmp_path / "run", flags, whole)


def test_one_that_is_stopped_is_named_within_the_timeout(pair, flags, tmp_path):
    one = pair(tmp_path / "run", flags)
    one.until_step(5)
    os.kill(one.processes[1].pid, signal.SIGSTOP)
    stopped = time.time()
    ended = one.until(lambda: one.statuses()[0] is not None, 60)
    assert TIMEOUT - 1.5 < ended - stopped < TIMEOUT + 5  # it was heard last up to a second before
    (line,) = one.last_words(0)
    assert line.startswith(f"mara_jax: {name_of(one, 1)} has been silent for {TIMEOUT} s")
    os.kill(one.processes[1].pid, signal.SIGCONT)
    assert one.finish() == [LOST, LOST]
    (own,) = one.last_words(1)
    # It hears what is said of it, or knows by itself, whichever comes first.
    assert own.startswith(f"mara_jax: {name_of(one, 1)} ") and (
        " itself did not run for" in own or " silent for" in own
    )
    note("stopped (SIGSTOP)", ended - stopped, one.statuses(), line)


def test_one_that_is_slow_is_told_of_and_the_run_goes_on(pair, flags, whole, tmp_path):
    slept, seconds = tmp_path / "slept", 1.6 * TIMEOUT
    one = pair(tmp_path / "run", flags, environment={"SLEEPS": str(seconds), "SLEPT": str(slept)})
    one.until(lambda: slept.exists() and slept.read_text())
    began, before = float(slept.read_text()), len(one.lines(0))
    words = f"WARNING: {name_of(one, 1)} is slow: the others have waited"
    told = one.until(lambda: any(line.startswith(words) for line in one.lines(0)[before:]))
    line = next(line for line in one.lines(0)[before:] if line.startswith(words))
    # Half of a window of time tells of many short waits, and so of the beginning of a long one.
    assert TIMEOUT / 2 - 1 < told - began < seconds
    assert one.finish() == [0, 0] and one.last_words(0) == one.last_words(1) == []
    note(f"slow (asleep for {seconds:g} s)", told - began, one.statuses(), line)
    assert kept(tmp_path / "run")["rows"] == whole["rows"]


def test_one_that_hangs_is_named_and_both_are_ended(pair, flags, tmp_path):
    slept, seconds = tmp_path / "slept", 40
    hangs = ["--config.watchdog_ends=true", f"--config.watchdog={seconds}"]
    one = pair(tmp_path / "run", [*flags, *hangs], environment={"SLEEPS": "3600", "SLEPT": str(slept)})
    assert one.finish() == [watchdog.STALLED] * 2, (one.lines(0), one.lines(1))
    ended, began = time.time(), float(slept.read_text())
    (line,) = one.last_words(0)
    assert one.last_words(1) == [line] and line.startswith(f"mara_jax: {name_of(one, 1)} hangs: ")
    assert seconds - 1 < ended - began < seconds + 15
    note(f"hanging, ended by its watchdog ({seconds} s)", ended - began, one.statuses(), line)


def test_one_that_may_write_no_large_file_ends_both_and_the_last_checkpoint_stays(pair, flags, whole, tmp_path):
    """As where its disk has a quota: the system refuses what Orbax writes there, in C++."""
    one = pair(tmp_path / "run", flags)
    one.until_step(5)
    resource.prlimit(one.processes[1].pid, resource.RLIMIT_FSIZE, (2**14, 2**14))
    limited = time.time()
    without_room(one, limited, "no room for process 1 alone")
    goes_on(pair, tmp_path / "run", flags, whole)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, megabytes: int) -> Iterator[pathlib.Path]:
    """A file system of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_ends_both_and_the_last_checkpoint_stays(pair, flags, whole, tmp_path):
    with small_disk(tmp_path / "disk", 32) as disk:
        one = pair(disk / "run", flags)
        one.until_step(5)
        with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**12)):
                pass
        without_room(one, time.time(), "full disk (both)")
        (disk / "ballast").unlink()
        goes_on(pair, disk / "run", flags, whole)


def without_room(one: Pair, since: float, fault: str) -> None:
    """Both processes end, each with one line, or with one between them where both meet it; whole checkpoints remain."""
    statuses = one.finish()
    ended = time.time()
    lines = [line for index in range(2) for line in one.last_words(index)]
    assert statuses == [2, 2], (statuses, lines)
    own = [line for line in lines if line.startswith("mara_jax: no space left to write")]
    named = [line for line in lines if " has ended with status 2: no space left to write" in line]
    assert len(own) >= 1 and len(own) + len(named) == len(lines) <= 2, lines
    note(fault, ended - since, statuses, (named or own)[0])
    left = checkpoint.saved_steps(one.workdir)
    assert left and max(left) >= 4
    assert checkpoint.set_aside_damaged(one.workdir) == []


def differs(one: Pair, what: str, words: str) -> None:
    assert one.finish() == [2, 2]
    for index in range(2):
        (line,) = one.last_words(index)
        assert line.startswith(f"mara_jax: {name_of(one, 1)} differs from the other processes") and words in line
    assert not one.workdir.exists()
    note(what, None, one.statuses(), line)


def test_one_with_another_config_is_named_before_anything_is_compiled(pair, flags, tmp_path):
    one = pair(tmp_path / "run", flags, only=("--config.steps=11",))
    differs(one, "another config", f"(steps=11 instead of {STEPS})")


def test_one_with_other_code_is_named_before_anything_is_compiled(pair, flags, tmp_path):
    shutil.copytree(ROOT / "mara_jax", tmp_path / "code" / "mara_jax")
    with (tmp_path / "code" / "mara_jax" / "train" / "step.py").open("a") as file:
        file.write("# another version\n")
    one = pair(tmp_path / "run", flags, code=tmp_path / "code")
    differs(one, "other code", "its files of mara_jax have digest")
