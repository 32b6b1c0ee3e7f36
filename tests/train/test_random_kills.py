"""Runs of every kind that are killed again and again, at random moments of every phase, end as one that never was."""

import collections
import json
import pathlib
import random

import numpy as np
import pytest
import small_prior
import test_killed
from small_run import evaluations, rows

from mara_jax.train import rollouts

SECONDS = 2.0  # a kill is no later than that after a phase has begun, or the next phases would get it


class Runs(test_killed.Runs):
    """Runs of the command in forks of one process, which it kills at moments."""

    def __init__(self, environment: dict[str, str], flags: list[str]) -> None:
        super().__init__("moment", environment, [])
        self.flags, self.random = flags, random.Random(0)
        self.killed: collections.Counter[str] = collections.Counter()  # kills by the phase that they came in
        self.seen: list[tuple[str, float]] = []  # phases of the run that nothing has happened to, with their seconds

    def run_until(self, workdir: pathlib.Path, moment: tuple[str, int, float] | None = None) -> int:
        """Exit status of a run that is killed at a moment, or ends before it."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([moment, str(workdir), self.flags]), file=self.process.stdin, flush=True)
        status, where, said, seen = json.loads(self.process.stdout.readline())
        assert said == "" and status in (0, -9), (moment, status, said)
        if status:
            self.killed[where] += 1
        if moment is None:
            self.seen = self.seen or [tuple(one) for one in seen]
        return status

    def moment(self, phase: str) -> tuple[str, int, float]:
        """A random moment within a phase."""
        lasted = [seconds for name, seconds in self.seen if name == phase]
        number = self.random.randint(1, min(4, len(lasted)))
        return phase, number, self.random.uniform(0.0, min(SECONDS, lasted[number - 1]))

    def killed_in_turn(self, workdir: pathlib.Path, phases: list[str]) -> list[str]:
        """Kills a run once in each of these phases, and starts it again each time, until it has ended.

        Returns those of the phases that it had no kill in, since it has ended before.
        """
        left = list(phases)
        while left:
            if not self.run_until(workdir, self.moment(left[0])):
                return left
            left.pop(0)
            if (workdir / "finished.json").exists():  # killed as it exits
                return left
        assert self.run_until(workdir) == 0
        return []


def weights(path: pathlib.Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


def kept(workdir: pathlib.Path) -> dict:
    """What a run of a language model has left, without clocks."""
    texts = ("reference_samples.jsonl", "modes.jsonl", "answer_classes.jsonl", "molecules.csv", "reference.json")
    seen = {name: (workdir / name).read_text() for name in texts if (workdir / name).exists()}
    seen |= {"weights": weights(workdir), "rows": rows(workdir) if (workdir / "metrics.jsonl").exists() else []}
    if (workdir / "rollouts").exists():
        seen["rollouts"] = rollouts.read(workdir).to_pylist()
    if (workdir / "evaluation.jsonl").exists():
        seen["evaluations"] = evaluations(workdir)
        seen |= {path.name: json.loads(path.read_text()) for path in (workdir / "evaluation").iterdir()}
    for path in sorted((workdir / "task_state").glob("*")):
        seen[path.name] = json.loads(path.read_text())
    return seen


def assert_same(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Two runs have left the same, and no parts of anything."""
    now, expected = kept(workdir), kept(whole)
    assert now.keys() == expected.keys()
    for name, value in expected.items():
        assert now[name] == value, f"{name} of {workdir} differs"
    names = {path.name for path in workdir.rglob("*")}
    assert not {name for name in names if "-tmp" in name or name.startswith(".") or "part" in name or name == "lock"}


def print_table(title: str, killed: collections.Counter[str]) -> None:
    print(f"\n{title}: {killed.total()} kills survived: {json.dumps(dict(killed))}")


@pytest.fixture
def started(quick_environment):
    """Makes `Runs`, which end with the test."""
    making = []

    def make(flags: list[str]) -> Runs:
        making.append(Runs(quick_environment, flags))
        return making[-1]

    yield make
    for one in making:
        one.process.kill()


ORACLE = """
def score(smiles):
    return [min(one.count("C") / 4, 1.0) for one in smiles]
"""


def molecule_flags(folder: pathlib.Path) -> list[str]:
    """A search with a budget of oracle calls, a cache, a scaffold filter and replayed completions."""
    small_prior.random_prior(folder / "prior")
    (folder / "oracle.py").write_text(ORACLE)
    return f"""--config=configs/chemistry.py --config.policy.weights={folder}/prior --config.rollout.group_size=16
        --config.rollout.max_new_tokens=8 --config.rollout.length_buckets=1 --config.algorithm.transform=mara_answers
        --config.algorithm.threshold=.2 --config.algorithm.beta=.05 --config.optimiser.learning_rate=1e-2
        --config.task.oracle={folder}/oracle.py:score --config.task.answer=scaffold --config.task.bucket_size=4
        --config.task.bucket_score=.2 --config.task.hit=.5 --config.checkpoint.every=2 --config.steps=8
        --config.task.budget=60 --config.rollout.replay=2""".split()


LOOP = ["sampling", "scoring", "update", "checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags_of", "phases"),
    [
        (molecule_flags, ["start-up", *LOOP, "resuming", "update", "export", "report"]),
    ],
    ids=["molecules"],
)
def test_every_kind_of_run_of_a_language_model_survives_kills(started, tmp_path, capsys, request, flags_of, phases):
    runs = started(flags_of(tmp_path))
    assert runs.run_until(tmp_path / "whole") == 0
    members = [path.name for path in (tmp_path / "whole" / "members").glob("*")]
    left, number = phases, 0
    while left:
        number += 1
        workdir = tmp_path / f"run{number}"
        before, left = left, runs.killed_in_turn(workdir, left)
        left = left if len(left) < len(before) else left[1:]
        assert_same(workdir, tmp_path / "whole")
        for member in members:
            assert_same(workdir / "members" / member, tmp_path / "whole" / "members" / member)
    assert runs.killed.total() >= len(phases) - 2
    with capsys.disabled():
        print_table(request.node.callspec.id, runs.killed)


TOYS = {
    "toy": ["--config=configs/toy.py", "--config.steps=300"],
    "toy sweep": [
        *"--config=configs/toy.py:sweep --config.sweep.betas=(0.1,1.0) --config.sweep.gaps=(0.0,0.25)".split(),
        *"--config.sweep.seeds=2 --config.steps=40".split(),
    ],
}


def kept_of_toy(workdir: pathlib.Path) -> dict:
    names = [path for path in sorted(workdir.iterdir()) if path.suffix in (".json", ".jsonl")]
    seen: dict = {path.name: path.read_bytes() for path in names}
    if (workdir / "sweep.npz").exists():
        with np.load(workdir / "sweep.npz") as arrays:
            seen |= {name: array.tobytes() for name, array in arrays.items()}
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOYS)
def test_toys_that_are_killed_begin_again_and_end_alike(started, tmp_path, capsys, kind):
    runs = started(TOYS[kind])
    assert runs.run_until(tmp_path / "whole") == 0
    assert runs.killed_in_turn(tmp_path / "run", ["start-up", "update", "update", "report"]) == []
    assert kept_of_toy(tmp_path / "run") == kept_of_toy(tmp_path / "whole")
    assert len(kept_of_toy(tmp_path / "run")) > 2
    with capsys.disabled():
        print_table(kind, runs.killed)
