"""Checks of a run before anything is loaded: its mesh, its task, the memory that it needs at least."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mara_jax import config
from mara_jax.config import estimator_of
from mara_jax.core import method_rules
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.tasks.base import Task
from mara_jax.train import capacity, disk, groups, shape
from mara_jax.train.reference_samples import reads_masses


def layout_of(run: config.LanguageRun, devices: Sequence[Any] | None = None) -> sharding.Layout:
    """The run's mesh over these devices, by default all there are.

    Raises:
      ValueError: sizes that do not fit the devices or the rows of a batch, or a table that cannot be; a population
        whose members would not lie on one device each, or in several processes.
    """
    sizes = {axis: getattr(run.mesh, axis) for axis in mesh.AXES}
    layout = sharding.layout(mesh.make_mesh(sizes, devices), run.mesh.overrides)
    if config.is_population(run):
        _check_members_lie_whole(layout)
        return layout
    sharding.row_axes(layout, run.rollout.prompts_per_step, run.rollout.group_size // run.optimiser.micro_batches)
    return layout


def _check_members_lie_whole(layout: sharding.Layout) -> None:
    for axis in ("fsdp", "tensor"):
        if layout.mesh.shape[axis] > 1:
            raise ValueError(
                f"mesh.{axis}={layout.mesh.shape[axis]}: each member of a population lies on one device: "
                "leave fsdp and tensor at 1, and mesh.data divides the members among the devices"
            )
    if hosts.several_processes():
        raise ValueError("a population trains in one process, on all of its devices: start it on one host alone")


def check_room(run: config.LanguageRun) -> None:
    """Refuses a run that the devices of the layout in use cannot make: its models, moments and cache alone have no room
    there.

    Raises:
      ValueError: one line.
    """
    try:
        arch = shape.run_architecture(run)
    except (ValueError, OSError):
        return  # the shape is known only from the weights, or reading the weights will fail
    reward_arch = None
    with contextlib.suppress(ValueError, OSError):  # likewise
        reward_arch = shape.reward_architecture(run)
    capacity.check(run, arch, *capacity.limit_here(), reward_arch)


@contextlib.contextmanager
def too_large(population: bool = False) -> Iterator[None]:
    """Turns an out-of-memory error into a ValueError of one line; other errors of a device pass unchanged."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if disk.reason(error):
            raise  # of which TensorStore says the same word
        reason = str(error).strip().split("\n")[0][:160]
        first = "population.at_once, " if population else ""
        raise ValueError(
            f"out of memory ({reason}): lower {first}rollout.group_size, rollout.prompts_per_step or "
            "rollout.max_new_tokens, raise optimiser.micro_batches, or set policy.remat=layer"
        ) from error


def check_members(run: config.LanguageRun, task: Task) -> None:
    """`check_task` of a run, or of every member of a population, whose name its error then begins with."""
    if not config.is_population(run):
        check_task(run, task)
        return
    if task.keeps_state:
        raise ValueError(
            f"the task {task.name!r} keeps a state of its scores, which the members of a population would share: start "
            "a run for each member"
        )
    for member in config.members(run):
        try:
            check_task(member.run, task)
        except ValueError as error:
            raise ValueError(f"population member {member.name}: {error}") from error


def check_task(run: config.LanguageRun, task: Task) -> None:
    """Refuses a task without prompts, and a threshold that no completion reaches, or that MARA would find in every one.

    Raises:
      ValueError: one line.
    """
    threshold, most, invalid = run.algorithm.threshold, task.max_reward, task.invalid_reward
    if not len(task):
        raise ValueError(f"the task {task.name!r} has no prompts: it needs at least one")
    if task.keeps_state:
        _check_scored_once(run, task)
    method_rules.check_prompts(run.algorithm, len(task), run.steps * run.rollout.prompts_per_step)
    if invalid is not None:
        method_rules.check_rewards(run.algorithm, [invalid])
    if task.leaves_out_truncated:
        method_rules.check_leaving_out(run.algorithm)
        if threshold <= 0 and method_rules.rows(run.algorithm)[0].anchor:
            raise ValueError(
                f"algorithm.threshold={threshold} is not above the reward 0 of truncated completions, which are left "
                "out (mask): one of them could be MARA's anchor; use a threshold above 0, or task.truncated=score"
            )
    if most is not None and threshold > most:
        raise ValueError(
            f"algorithm.threshold={threshold} is above every reachable reward ({most}): "
            f"no completion would ever be good; use at most {most}"
        )
    if run.task.equivalence:
        _check_answers_are_open(run, task)
    if invalid is not None and threshold <= invalid and method_rules.rows(run.algorithm)[0].anchor:
        raise ValueError(
            f"algorithm.threshold={threshold} is not above the reward of an invalid completion ({invalid:g}): MARA "
            f"would count those as good and spread mass over them; use more than {invalid:g}"
            + ("" if most is None else f" and at most {most}")
        )


def _check_answers_are_open(run: config.LanguageRun, task: Task) -> None:
    """Refuses classes of answers where the task declares which answers there are."""
    for number in range(min(len(task), config.FEW_PROMPTS)):
        answers = task.answer_set(number)
        if answers is not None:
            raise ValueError(
                f"task.equivalence={run.task.equivalence!r}, but the task {task.name!r} declares the answers of prompt "
                f"{number} ({', '.join(answers)[:60]}): leave it empty, or let answer_set return None"
            )


def _check_scored_once(run: config.LanguageRun, task: Task) -> None:
    """Refuses what asks for scores beside those of each step's completions, of a task that counts or remembers them.

    Raises:
      ValueError: one line.
    """
    again = groups.equal_groups(run)
    refused = {
        "several processes, each with the scores of its own completions": (hosts.several_processes(), "start one"),
        f"evaluation.every={run.evaluation.every}": (run.evaluation.every > 0, "set evaluation.every=0"),
        f"warmup.max_steps={run.warmup.max_steps}": (run.warmup.max_steps > 0, "set warmup.max_steps=0"),
        f"groups of equal rewards drawn again ({again})": (again != "keep", "set rollout.equal_groups=keep"),
        "reference.drawn=before_training": (run.reference.drawn == "before_training", "set reference.drawn=auto"),
        "samples of the reference policy for the forward KL": (
            estimator_of(run.algorithm) == "reference_samples",
            "set algorithm.estimator=ratio",
        ),
        "masses of answers from samples of the reference policy": (
            reads_masses(run.algorithm) and not task.lists_strings,
            "use another algorithm.method",
        ),
    }
    for what, (asked, cure) in refused.items():
        if asked:
            raise ValueError(f"the task {task.name!r} keeps a state of its scores, so there is no {what}: {cure}")
