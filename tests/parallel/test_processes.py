"""Several processes on this machine's loopback, started as a person would start them, against one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import hand_made_policy
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = """--config=configs/onetwo.py:nano --config.warmup.steps=0 --config.reference.samples=16
    --config.rollout.group_size=16 --config.rollout.max_new_tokens=10 --config.optimiser.learning_rate=1e-3
    --config.rollout.length_buckets=1 --config.checkpoint.every=2 --config.evaluation.every=2
    --config.evaluation.samples=6 --config.steps=4""".split()


# On a machine with more to do than cores, one process may wait for another longer than XLA's 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The processes share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        # Each program runs a few times on little: optimising it costs more than it saves.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    return hand_made_policy.write(tmp_path_factory.mktemp("weights") / "small")


def start(number: int, devices: int, *flags: str) -> list[subprocess.Popen]:
    """`number` processes of one run, each with its own simulated devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {PATIENCE}"}
    together = []
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        together = [f"--coordinator_address=localhost:{port}", f"--num_processes={number}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mara_jax.main", *flags, *together, *([f"--process_id={i}"] if number > 1 else [])],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(number)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    ended = [process.communicate(timeout=3600) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]


def rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a file without clocks."""
    lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Counts are equal, means equal up to the order of summation."""
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row["step"], name)
            else:
                assert row[name] == value, (row["step"], name)


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> pathlib.Path:
    """The run of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((status, _, stderr),) = finish(start(1, 1, *SMALL, f"--config.policy.weights={weights}", f"--workdir={workdir}"))
    assert status == 0, stderr
    assert any(0 < row["valid/fraction"] < 1 for row in rows(workdir)) and len(rows(workdir)) == 4
    return workdir


@pytest.mark.parametrize(
    ("number", "devices", "mesh"),
    [
        pytest.param(2, 2, ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"], marks=pytest.mark.slow),
        pytest.param(2, 1, [], marks=pytest.mark.slow),
        pytest.param(4, 1, ["--config.mesh.fsdp=2"], marks=pytest.mark.slow),
        # Two processes hold the same rows: both score them.
        pytest.param(4, 1, ["--config.mesh.tensor=2"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_processes_write_what_one_writes(alone, weights, tmp_path, number, devices, mesh):
    workdir = tmp_path / "run"
    ended = finish(start(number, devices, *SMALL, *mesh, f"--config.policy.weights={weights}", f"--workdir={workdir}"))
    assert [status for status, _, _ in ended] == [0] * number, ended
    assert_same(rows(workdir), rows(alone))
    assert_same(rows(workdir, "evaluation.jsonl"), rows(alone, "evaluation.jsonl"))
    assert (workdir / "reference_samples.jsonl").read_text().count("\n") == 16
    assert [json.loads((w / "reference.json").read_text())["text"] for w in (workdir, alone)].count([]) == 0
    samples = [(w / "reference_samples.jsonl").read_text().splitlines() for w in (workdir, alone)]
    for one, other in zip(*samples, strict=True):
        assert json.loads(one)["text"] == json.loads(other)["text"]
    # One process speaks; the lines about connections are the collectives' own.
    spoken = [[line for line in said.splitlines() if "connected peer ranks" not in line] for _, said, _ in ended]
    assert any("step 4/4" in line for line in spoken[0]) and not any(spoken[1:])


OPEN = """--config=configs/digits.py --config.task.prompts=20 --config.policy.layers=1 --config.policy.embed=64
    --config.warmup.batch=16 --config.warmup.steps=60 --config.warmup.learning_rate=1e-2 --config.reference.samples=6
    --config.rollout.prompts_per_step=4 --config.rollout.group_size=4 --config.rollout.length_buckets=1
    --config.evaluation.every=2 --config.evaluation.samples=6 --config.steps=4 --config.checkpoint.every=2""".split()


CLASSES = ["--config.task.equivalence=rouge1", "--config.algorithm.threshold=.5", "--config.optimiser.micro_batches=2"]
MOVING = ["--config.algorithm.threshold_percentile=50", "--config.algorithm.threshold_window=2"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], [*CLASSES, *MOVING]], ids=["texts", "classes"])
def test_processes_agree_on_open_answers(tmp_path, flags):
    """Each of two processes scores its own rows; both know all answers, and samples are drawn on first use."""
    for number in (1, 2):
        ended = finish(start(number, 1, *OPEN, *flags, f"--workdir={tmp_path / str(number)}"))
        assert [status for status, _, _ in ended] == [0] * number, ended
    one, two = tmp_path / "1", tmp_path / "2"
    assert_same(rows(two), rows(one))
    assert_same(rows(two, "evaluation.jsonl"), rows(one, "evaluation.jsonl"))
    samples = [(w / "reference_samples.jsonl").read_text().splitlines() for w in (one, two)]
    assert len(samples[0]) == 16 * 6 and any(json.loads(row)["answer"] for row in samples[0])
    for row, other in zip(*samples, strict=True):
        row, other = json.loads(row), json.loads(other)
        assert row.pop("ref_logp") == pytest.approx(other.pop("ref_logp"), rel=1e-3) and row == other
    if flags:
        classes = [(w / "answer_classes.jsonl").read_text() for w in (one, two)]
        assert classes[0] == classes[1] and classes[0].count("\n") > 16
        assert any(row["mara/threshold"] is not None for row in rows(one))


def kill_at(processes: list[subprocess.Popen], workdir: pathlib.Path, step: int, victim: int) -> None:
    deadline = time.time() + 3000
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < step:
        assert all(p.poll() is None for p in processes) and time.time() < deadline, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(processes[victim].pid, signal.SIGKILL)


@pytest.mark.slow
def test_one_process_killed_ends_the_others_and_the_run_resumes_on_another_mesh(weights, tmp_path):
    """4 devices of two processes, then 8 of one: as on one device without a kill."""
    flags = [*SMALL, "--config.steps=12", f"--config.policy.weights={weights}"]
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    ((status, _, stderr),) = finish(start(1, 1, *flags, f"--workdir={whole}"))
    assert status == 0, stderr
    processes = start(2, 2, *flags, "--config.mesh.fsdp=2", f"--workdir={workdir}")
    kill_at(processes, workdir, 3, victim=1)
    killed = time.time()
    ended = finish(processes)
    assert all(status != 0 for status, _, _ in ended) and time.time() - killed < 300
    last = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    ((status, said, stderr),) = finish(start(1, 8, *flags, *last, f"--workdir={workdir}"))
    assert status == 0, stderr
    assert "resuming after step" in said
    assert_same(rows(workdir), rows(whole))
    assert_same(rows(workdir, "evaluation.jsonl"), rows(whole, "evaluation.jsonl"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--config.rollout.group_size=9"],
            "x 9 samples (rollout.group_size",
        ),
        (["--config.policy.weights=/nowhere"], "/nowhere does not exist"),
    ],
)
@pytest.mark.slow
def test_all_processes_end_with_one_line_between_them(weights, tmp_path, flags, told):
    workdir = tmp_path / "run"
    ended = finish(start(2, 1, *SMALL, f"--config.policy.weights={weights}", *flags, f"--workdir={workdir}"))
    assert [status for status, _, _ in ended] == [2, 2], ended
    lines = [line for _, _, stderr in ended for line in stderr.splitlines() if line.startswith("mara_jax")]
    assert len(lines) == 1 and told in lines[0]
    assert not workdir.exists()
