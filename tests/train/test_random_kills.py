"""Runs of every kind that are killed again and again, at random moments of every phase, end as one that never was."""

import collections
import json
import pathlib
import random

import numpy as np
import pytest
import run_phases
import small_prior
import small_run
import test_killed
from small_run import evaluations, rows

from mara_jax.train import rollouts

SECONDS = 2.0  # a kill is no later than that after a phase has begun, or the next phases would get it
EVERY = run_phases.LASTING  # of a language model with a warm-up and evaluations
KILLED: dict[str, collections.Counter[str]] = {}  # of each kind of run that has been tested here: kills by phase


class Runs(test_killed.Runs):
    """Runs of the command in forks of one process, which it kills at moments."""

    def __init__(self, environment: dict[str, str], flags: list[str]) -> None:
        super().__init__("moment", environment, [])
        self.flags, self.random = flags, random.Random(0)
        self.killed: collections.Counter[str] = collections.Counter()  # kills by the phase that they came in
        self.last = ""  # the phase of the last of them
        self.seen: list[tuple[str, float]] = []  # phases of the run that nothing has happened to, with their seconds

    def run_until(self, workdir: pathlib.Path, moment: tuple[str, int, float] | None = None) -> int:
        """Exit status of a run that is killed at a moment, or ends before it."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([moment, str(workdir), self.flags]), file=self.process.stdin, flush=True)
        status, where, said, seen = json.loads(self.process.stdout.readline())
        assert said == "" and status in (0, -9), (moment, status, said)
        if status:
            self.killed[where] += 1
            self.last = where
        if moment is None:
            self.seen = self.seen or [tuple(one) for one in seen]
        return status

    def moment(self, phase: str, tries: int) -> tuple[str, int, float]:
        """A random moment within a phase, ever nearer to its beginning: nothing is compiled in it any more."""
        lasted = [seconds for name, seconds in self.seen if name == phase]
        number = self.random.randint(1, min(4, len(lasted)))
        return phase, number, self.random.uniform(0.0, min(SECONDS, lasted[number - 1])) * 0.7**tries

    def killed_in_turn(self, workdir: pathlib.Path, phases: list[str]) -> list[str]:
        """Kills a run until it has been killed in each of these phases, and starts it again each time.

        Returns those of the phases that it had no kill in, since it has ended before; else it has ended by then.
        """
        left, tries = list(phases), 0
        while left:
            if not self.run_until(workdir, self.moment(left[0], tries)):
                return left
            tries += 1
            assert tries < 20, f"no kill comes in {left[0]}"
            if self.last in left:
                left.remove(self.last)
                tries = 0
            if (workdir / "finished.json").exists():  # killed as it exits
                return left
        assert self.run_until(workdir) == 0
        return []


def weights(path: pathlib.Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


def kept(workdir: pathlib.Path) -> dict:
    """What a run of a language model has left, without clocks."""
    texts = (
        "reference_samples.jsonl",
        "modes.jsonl",
        "answer_classes.jsonl",
        "molecules.csv",
        "reference.json",
        "population.json",
    )
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


def assert_trained(workdir: pathlib.Path) -> None:
    """A run whose updates change nothing would prove little."""
    assert all(row["grad/norm"] > 0 for row in rows(workdir))
    assert any(row["groups/equal_rewards"] < 1 for row in rows(workdir))


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


def nano_flags(folder: pathlib.Path) -> list[str]:
    """A warm-up, all measured before the first step, evaluations, the best checkpoint, an adapter."""
    del folder
    each = ["--config.evaluation.every=1", "--config.checkpoint.every=1"]
    return [*small_run.SMALL, "--config.lora.rank=2", "--config.steps=4", *each]


GRADED = """
def graded(completions):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""


def prompt_flags(folder: pathlib.Path) -> list[str]:
    """A user's own prompts and reward, classes of answers, and a threshold that moves; samples drawn on first use."""
    (folder / "own.py").write_text(GRADED)
    for name, places in (("own", range(9)), ("held_out", range(9, 12))):
        texts = [f"{colour} house, {place}" for colour in ("red", "blue") for place in places]
        lines = [json.dumps({"prompt": f"Describe house {place}.", "completion": texts}) for place in places]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return f"""--config=configs/prompts.py:nano --config.task.prompts={folder}/own.jsonl
        --config.task.reward={folder}/own.py:graded --config.task.answer= --config.task.truncated=score
        --config.evaluation.prompts={folder}/held_out.jsonl --config.evaluation.every=2 --config.evaluation.samples=4
        --config.task.equivalence=rouge1 --config.reference.drawn=on_first_use --config.reference.samples=4
        --config.algorithm.threshold=.1 --config.algorithm.threshold_percentile=50
        --config.algorithm.threshold_window=2 --config.policy.layers=1 --config.policy.embed=64
        --config.warmup.batch=8 --config.warmup.steps=40 --config.warmup.learning_rate=1e-2
        --config.rollout.prompts_per_step=4 --config.rollout.group_size=4 --config.rollout.max_new_tokens=12
        --config.rollout.length_buckets=1 --config.checkpoint.every=2 --config.steps=6""".split()


def population_flags(folder: pathlib.Path) -> list[str]:
    """Two waves of two members, with adapters."""
    axes = ["--config.population.methods=vanilla,mara", "--config.population.seeds=2"]
    each = ["--config.evaluation.every=2", "--config.checkpoint.every=2"]
    return [*nano_flags(folder), *axes, *each]


KINDS = {
    "nano": (nano_flags, EVERY),
    "prompts": (prompt_flags, EVERY),
    "population": (population_flags, EVERY),
    "molecules": (molecule_flags, ["start-up", "sampling", "scoring", "update", "checkpoint", "resuming", "update"]),
}


def survives(runs: Runs, folder: pathlib.Path, phases: list[str]) -> None:
    """Runs that are killed in each of these phases end as one that nothing has happened to."""
    whole = folder / "whole"
    assert runs.run_until(whole) == 0
    members = [path.name for path in (whole / "members").glob("*")]
    assert_trained(whole / "members" / members[0] if members else whole)
    left, number = phases, 0
    while left:
        number += 1
        assert number < 20, f"runs end before a kill comes in {left}"
        workdir = folder / f"run{number}"
        left = runs.killed_in_turn(workdir, left)
        assert_same(workdir, whole)
        for member in members:
            assert_same(workdir / "members" / member, whole / "members" / member)


def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(started, tmp_path):
    """The short form of the next: a kill while the state or the oracle's cache is saved, one in an update."""
    flags = [*molecule_flags(tmp_path), "--config.rollout.replay=0"]  # replay would compile a second update
    survives(started(flags), tmp_path, ["checkpoint", "update"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_of_a_language_model_survives_kills(started, tmp_path, kind):
    flags_of, phases = KINDS[kind]
    runs = started(flags_of(tmp_path))
    survives(runs, tmp_path, phases)
    KILLED[kind] = runs.killed


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
def test_toys_that_are_killed_begin_again_and_end_alike(started, tmp_path, kind):
    runs = started(TOYS[kind])
    assert runs.run_until(tmp_path / "whole") == 0
    assert runs.killed_in_turn(tmp_path / "run", ["start-up", "update", "update", "report"]) == []
    assert kept_of_toy(tmp_path / "run") == kept_of_toy(tmp_path / "whole")
    assert len(kept_of_toy(tmp_path / "run")) > 2
    KILLED[kind] = runs.killed


@pytest.mark.slow
def test_every_phase_has_had_its_kills(capsys):
    """Of the tests above, together: at least three kills in each phase, thirty in all."""
    if KILLED.keys() != {*KINDS, *TOYS}:
        pytest.skip("not all kinds of runs have been tested")
    rows = [[phase, *(killed[phase] for killed in KILLED.values())] for phase in [*run_phases.PHASES, run_phases.OTHER]]
    with capsys.disabled():
        print("\n" + " | ".join(["killed in", *KILLED, "all"]))
        for phase, *counts in rows:
            print(" | ".join([phase, *map(str, counts), str(sum(counts))]))
    assert all(sum(counts) >= 3 for phase, *counts in rows if phase in EVERY)
    assert sum(killed.total() for killed in KILLED.values()) >= 30
