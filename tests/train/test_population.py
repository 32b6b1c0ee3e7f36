"""Members of a population are the runs that they would be alone."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import single_step
from small_run import SMALL, refused, rows

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Member, Optimiser, Population, Rollout
from mara_jax.parallel import mesh, sharding
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import onetwo
from mara_jax.tasks.base import Score, Task
from mara_jax.train import capacity, optim, preflight, prompts, startup
from mara_jax.train import setup as setups
from mara_jax.train.population import programs as programs_of
from mara_jax.train.population import report, training
from mara_jax.train.population import step as steps_of

ENDS = tuple(range(0, 64, 4))
PROMPTS = [[5] * 40, [7, 9], [11]]  # padded to 64 and to 32 by themselves
BASE = LanguageRun(
    steps=2,
    algorithm=Algorithm(method="mara", anchor="string", threshold=0.9),
    rollout=Rollout(prompts_per_step=2, group_size=4, max_new_tokens=7, length_buckets=2),
    optimiser=Optimiser(learning_rate=1e-2),
    population=Population(betas=(0.05, 0.5), seeds=2),
)
TX = optim.make(BASE.optimiser)


class Ended(Task):
    """Rewards completions that ended, with an answer by their place."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def prompt(self, index: int) -> str:
        return str(index)

    def score(self, prompt_index, texts, finished) -> Score:
        answers = [("yes", "no")[i % 2] if good else None for i, good in enumerate(finished)]
        return Score([float(good) for good in finished], answers)


def setup_of(rank: int) -> setups.Setup:
    adapter = parameters.Lora(rank, 8.0, ("q", "v", "down")) if rank else None
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16, "compute_dtype": "float64"}
    arch = transformer.Architecture("qwen2", 64, 16, 1, lora=adapter, **shape)
    params = transformer.init(dataclasses.replace(arch, lora=None), jax.random.key(0))
    return setups.Setup(BASE, Ended(), Policy(arch, None, ENDS, 0, {}, "random"), params, PROMPTS, TX)


def with_field(run: LanguageRun, name: str, value) -> LanguageRun:
    """The run with another value of a dotted field."""
    section, _, field = name.rpartition(".")
    if not section:
        return dataclasses.replace(run, **{field: value})
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{field: value})})


def states_of(of_members: list[setups.Setup]):
    return [startup.start_state(one, one.ref_params) for one in of_members]


@pytest.mark.parametrize(
    ("rank", "changes"),
    [
        (3, {"population.betas": (0.05,), "population.learning_rates": (1e-3, 2e-2)}),
        pytest.param(
            3,
            {"algorithm.method": "vanilla", "algorithm.kl": "forward", "optimiser.micro_batches": 2},
            marks=pytest.mark.slow,
        ),
        (0, {"rollout.length_buckets": 0, "guard": "skip"}),
    ],
    ids=["adapters", "forward", "all weights"],
)
def test_members_are_the_runs_that_they_would_be_alone(x64, rank, changes):
    """Two steps of four members: tokens are equal, and every number of a row to 1e-9 of float64."""
    base, setup = BASE, setup_of(rank)
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        part = (
            {field: value} if not section else {section: dataclasses.replace(getattr(base, section), **{field: value})}
        )
        base = dataclasses.replace(base, **part)
    of_members = [setup._replace(cfg=one.run, tx=optim.make(one.run.optimiser)) for one in config.members(base)]
    alone = states_of(of_members)
    together = steps_of.stacked(states_of(of_members))
    programs = programs_of.update._cache_size()
    for done in range(BASE.steps):
        ids_k = [steps_of_prompts(one, done) for one in of_members]
        drawing = steps_of.start_rollouts(of_members, together.params, ids_k, "rollout", done)
        completions_k = steps_of.collect(of_members, drawing)
        _, batches = steps_of.scored_batches(of_members, drawing, completions_k, ids_k, done)
        together, scalars = steps_of.update(of_members, together, batches)
        for k, one in enumerate(of_members):
            alone[k], row = single_step.train_step(one, alone[k], done)
            assert row["length/mean"] == np.mean(completions_k[k].lengths)
            for name in scalars.keys() & row.keys():
                np.testing.assert_allclose(scalars[name][k], row[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert len({one.seed for one in (s.cfg for s in of_members)}) == 2
    if not base.rollout.length_buckets:
        assert programs_of.update._cache_size() == programs + 1  # for all members, steps and betas
    for k in range(len(of_members)):
        own = steps_of.member(together.params, k)
        for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(alone[k].params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("seeds", "per_device"), [(2, 1), pytest.param(3, 6, marks=pytest.mark.slow)])
def test_devices_divide_the_members_and_compute_apart(quick_environment, tmp_path, seeds, per_device):
    """Four simulated devices: four members, one each; six, which they do not divide, all on each."""
    here = pathlib.Path(__file__).parent
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parents[1]))),
        "XLA_FLAGS": f"{quick_environment['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, here / "members_program.py", str(seeds)]
    done = subprocess.run(command, env=os.environ | quick_environment | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["members on a device"] == [per_device] and seen["collectives"] == []
    assert seen["difference"] < 1e-9


def test_members_lie_on_one_device_each():
    run = dataclasses.replace(BASE, mesh=config.Mesh(data=1, fsdp=-1))
    with pytest.raises(ValueError, match=r"^mesh.fsdp=2: each member of a population lies on one device"):
        preflight.layout_of(run, jax.devices() * 2)


def steps_of_prompts(setup: setups.Setup, done: int) -> np.ndarray:
    return prompts.ids_of_step(setup.cfg, len(setup.prompts), done)


def test_members_are_the_product_of_the_axes():
    run = LanguageRun(
        seed=3, task=onetwo.Config(), population=Population(methods=("vanilla", "mara"), betas=(0.01, 0.1), seeds=2)
    )
    members = config.members(run)
    assert [one.name for one in members][:3] == [
        "vanilla-beta0.01-seed3",
        "vanilla-beta0.01-seed4",
        "vanilla-beta0.1-seed3",
    ]
    assert len({one.name for one in members}) == 8 and members[-1].run.algorithm == Algorithm(method="mara", beta=0.1)
    assert {one.run.reference.seed for one in members} == {3}  # they share samples of the reference policy
    assert not any(config.is_population(one.run) for one in members) and config.is_population(run)
    assert config.members(LanguageRun()) == [
        Member("mara-beta0.1-seed0", dataclasses.replace(LanguageRun(), reference=config.Reference(seed=0)))
    ]


def test_a_method_without_an_anchor_is_there_once():
    axes = Population(methods=("vanilla", "mara"), anchors=("string", "answer"))
    members = config.members(LanguageRun(task=onetwo.Config(), population=axes))
    names = ["vanilla-string-beta0.1-seed0", "mara-string-beta0.1-seed0", "mara-answer-beta0.1-seed0"]
    assert [one.name for one in members] == names


def test_members_are_checked_beside_their_task():
    """The base's own threshold, which no member has, does not matter."""
    base = LanguageRun(task=onetwo.Config(), warmup=config.Warmup(steps=1), algorithm=Algorithm(threshold=5.0))
    run = dataclasses.replace(base, population=Population(thresholds=(0.5, 2.0)))
    config.check(run)
    with pytest.raises(ValueError, match=r"^population member mara-beta0.1-threshold2-seed0: algorithm.threshold=2"):
        preflight.check_members(run, onetwo.OneTwo())
    preflight.check_members(dataclasses.replace(run, population=Population(thresholds=(0.5, 1.0))), onetwo.OneTwo())


def test_methods_that_share_a_program_are_trained_together(x64, tmp_path):
    axes = Population(methods=("vanilla", "mara"), betas=(0.1,), learning_rates=(1e-3, 1e-2), seeds=3)
    run = LanguageRun(task=onetwo.Config(), population=axes)
    setup = setup_of(0)
    members = [training.Member(name, setup._replace(cfg=one), tmp_path / name) for name, one in config.members(run)]  # pyright: ignore
    assert [len(wave) for wave in training.waves_of(members, 12)] == [6, 6]
    waves = training.waves_of(members, 4)
    assert [len(wave) for wave in waves] == [4, 2, 4, 2]
    assert {one.setup.cfg.algorithm.method for one in waves[0]} == {"vanilla"}


@pytest.mark.parametrize(
    ("devices", "members", "at_once", "sizes"),
    [
        (1, 5, 3, [3, 2]),
        (8, 36, 100, [32, 4]),
        (8, 35, 8, [8, 8, 8, 8, 1, 1, 1]),  # what is left lies on every device, which has room for one
        (8, 35, 31, [24, 8, 3]),
        (16, 20, 8, [16, 1, 1, 1, 1]),
    ],
)
def test_waves_have_as_many_members_for_every_device(devices, members, at_once, sizes):
    mesh_of = jax.sharding.AbstractMesh((devices, 1, 1), mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with sharding.use(sharding.layout(mesh_of)):  # pyright: ignore[reportArgumentType]
        assert capacity.wave_sizes(members, at_once) == sizes


def test_room_for_members_by_hand(x64):
    """Of 1 MiB: .6 of it, less the reference policy, over what a member has."""
    arch = dataclasses.replace(setup_of(0).policy.architecture, compute_dtype="float32")
    need, tokens = capacity.held(BASE, arch), 2 * 4 * 7
    own = 3 * need.parameters + 2 * need.optimiser + need.cache + tokens * (8 * 16 + 3 * 16) * 4
    for megabytes in (1, 4):
        limit = megabytes * 2.0**20
        expected = (0.6 * limit - need.reference) / own
        assert capacity.members_at_once(BASE, arch, limit) == int(expected) > 0
    assert capacity.members_at_once(BASE, arch, 1.0) == 1


@pytest.mark.parametrize(
    ("axes", "changes", "words"),
    [
        ({"betas": (0.1, 0.2, 0.1)}, {}, "population.betas names 0.1 twice: name each value once"),
        ({"methods": ("dapo",)}, {}, "population member dapo-beta0.1-seed0 draws groups of equal rewards again"),
        ({"seeds": 2}, {"rollout.slots": 4}, "rollout.slots=4 is for single runs, not for a population: leave it at 0"),
        ({"kls": ("forward",), "methods": ("grpo",)}, {}, "population member grpo-forward-beta0.1-seed0: algorithm.kl"),
        ({"betas": (0.1, 0.1000001)}, {}, "two members of the population are called mara-beta0.1-seed0: choose values"),
        ({"betas": (0.0,)}, {}, "population.betas=(0.0,) must be numbers above 0"),
    ],
)  # fmt: skip
def test_a_population_that_cannot_be_is_refused(axes, changes, words):
    run = LanguageRun(task=onetwo.Config(), warmup=config.Warmup(steps=1), population=Population(**axes))
    for name, value in changes.items():
        run = with_field(run, name, value)
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(").replace(")", r"\)")):
        config.check(run)


def test_the_pareto_best_and_the_chosen_by_hand():
    def result(reward, effective):
        return report.Result(reward, effective, 1.0, None, None)

    ends = [result(0.9, 1.0), result(0.89, 2.0), result(0.7, 3.0), result(0.7, 2.9), result(0.5, 1.0), result(0.9, 1.0)]
    assert report.pareto(ends) == [0, 5, 1, 2]
    assert report.chosen(ends) == 1  # more than .02 below the best reward, the third does not count


WEIGHTS = "adapter_model.safetensors"
POPULATION = [
    *SMALL, "--config.population.methods=vanilla,mara", "--config.population.seeds=2", "--config.lora.rank=2",
    "--config.steps=4",
]  # fmt: skip


@pytest.mark.slow
def test_killed_between_two_members_and_resumed(main, tmp_path):
    """Checkpoints of the last step and the policies of some members are lost, as by a kill while they were written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(f"--workdir={whole}", *POPULATION).returncode == 0
    shutil.copytree(whole, cut)
    names = [one["name"] for one in json.loads((whole / "population.json").read_text())["members"]]
    assert names == ["vanilla-beta0.1-seed0", "vanilla-beta0.1-seed1", "mara-beta0.1-seed0", "mara-beta0.1-seed1"]
    lost = cut / "members" / names[1]
    shutil.rmtree(lost / "checkpoints" / "4")
    (lost / "saved.json").write_text('{"step": 2}')
    for name in names[2:]:
        shutil.rmtree(cut / "members" / name)
    for path in (cut / "members").glob("*/adapter"):
        shutil.rmtree(path)
    assert main(f"--workdir={cut}", *POPULATION).returncode == 0
    for name in names:
        folders = (whole / "members" / name, cut / "members" / name)
        assert rows(folders[0]) == rows(folders[1]) and len(rows(folders[0])) == 4
        written = [(folder / "adapter" / WEIGHTS).read_bytes() for folder in folders]
        assert written[0] == written[1]
    assert (whole / "population.json").read_text() == (cut / "population.json").read_text()


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(main, quick_environment, tmp_path):
    """A real kill as soon as one member of the second wave has a checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(f"--workdir={whole}", *POPULATION).returncode == 0
    command = [sys.executable, "-m", "mara_jax.main", f"--workdir={cut}", *POPULATION]
    first = cut / "members" / "mara-beta0.1-seed0" / "checkpoints" / "2"
    with subprocess.Popen(command, env=os.environ | quick_environment, stdout=subprocess.DEVNULL) as process:
        while not first.is_dir() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9 and not (cut / "population.json").read_text().count("chosen")
    assert main(f"--workdir={cut}", *POPULATION).returncode == 0
    for member in (whole / "members").iterdir():
        assert rows(member) == rows(cut / "members" / member.name)
        written = [(folder / "members" / member.name / "adapter" / WEIGHTS).read_bytes() for folder in (whole, cut)]
        assert written[0] == written[1]


@pytest.mark.slow
def test_a_member_is_a_run_for_every_other_command(main, command, tmp_path):
    assert main(f"--workdir={tmp_path / 'p'}", *POPULATION).returncode == 0
    member = tmp_path / "p" / "members" / "mara-beta0.1-seed1"
    for name in ("config.json", "metrics.jsonl", "checkpoints", "rollouts", "adapter", "reference.json"):
        assert (member / name).exists(), name
    done = command("mara_jax.export", f"--workdir={member}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    refused(main(f"--workdir={tmp_path / 'p'}", *POPULATION, "--config.population.seeds=3"), "population.seeds")
