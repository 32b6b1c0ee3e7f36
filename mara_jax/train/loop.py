"""The one training loop of language-model runs: rollout, reward, reference, update, metrics, checkpoint."""

import collections
import dataclasses
import io
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import hf
from mara_jax.config import LanguageRun, estimator_of
from mara_jax.core import diversity
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import lora
from mara_jax.policies.packing import Packing
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs, rollout
from mara_jax.tasks.base import Task
from mara_jax.train import (
    adapter,
    checkpoint,
    memory,
    metrics,
    optim,
    placement,
    plots,
    profile,
    reference,
    report,
    step,
)
from mara_jax.train import ahead as ahead_of_time
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.state import Batch, State

SAMPLES = "reference_samples.jsonl"
POOLED = 8  # batches whose answer counts the entropy pools, as in the paper's Figure 7


def run(cfg: LanguageRun, task: Task, workdir: pathlib.Path) -> None:
    """Trains from the beginning or from the newest checkpoint in workdir, to `cfg.steps`.

    Writes reference/ (where there is a warm-up), reference_samples.jsonl, reference.json, metrics.jsonl, checkpoints/,
    adapter/ (where one is trained) and figures.
    """
    hosts.on_process_zero(lambda: checkpoint.check(workdir, cfg.steps))
    with metrics.Display(cfg.steps, None if hosts.is_process_zero() else io.StringIO()) as display:
        policy, ref_params = _reference(cfg, task, workdir, display)
        prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
        known = _measured(cfg, policy, ref_params, task, prompts, workdir, display)
        policy = adapter.trained(cfg, policy)
        display.note(adapter.describe(policy))
        tx = optim.make(cfg.optimiser)
        checkpoints = Checkpoints(workdir, cfg.checkpoint)
        resumed = hosts.on_process_zero(checkpoints.latest) is not None
        start = None if resumed else ref_params
        ref_params = placement.reference(policy.architecture, ref_params)
        state = _initial(cfg, policy, start, ref_params, tx, checkpoints, display)
        del start
        log = metrics.Log(workdir / "metrics.jsonl", int(state.step), keeps=hosts.is_process_zero())
        log_mass_pa = np.asarray(known["log_mass"], np.float32)
        setup = Setup(cfg, task, policy, ref_params, prompts, log_mass_pa, tx)
        counts = collections.deque((_classes(row) for row in log.rows), maxlen=POOLED)
        memory.give_back()  # what the warm-up and the measurement left behind
        first = int(state.step)
        window = profile.Window(cfg.profile, workdir, cfg.steps)
        pending: list[Pending] = []

        def tell() -> float | None:
            return _tell(setup, pending.pop(), counts, known, log, display) if pending else None

        for done in range(first, cfg.steps):
            with window.step(done + 1):
                state, begun = begin(setup, state, done, tell, ahead=done == first and cfg.rollout.compile_ahead)
                if window.open:
                    jax.block_until_ready(state)  # a step that is traced holds all of its work
            pending.append(begun)
            if done == first:
                memory.give_back()  # what compiling left behind
            last = done + 1 == cfg.steps
            if checkpoints.due(done + 1, last):
                tell()  # a resumed run begins after its checkpoint: no row before it may be missing
            checkpoints.save(done + 1, state, last)
        checkpoints.close()
        log.close()
        written = adapter.export(cfg, policy, state.params, workdir)
    if not hosts.is_process_zero():
        return
    figure = plots.final_figure(workdir)
    display.console.print(report.final_table(workdir))
    display.note(f"figure: {figure}   metrics: {workdir / 'metrics.jsonl'}")
    if written is not None:
        display.note(f"adapter: {written}   (peft loads it beside {adapter.base(cfg, workdir)})")


def _tell(setup: "Setup", begun: "Pending", counts: collections.deque, known, log: metrics.Log, display) -> float:
    """Waits for a step's update, then writes and shows its row; the clock when it ended."""
    row, texts, ended = finish(setup, begun)
    counts.append(_classes(row))
    pooled = np.sum(counts, axis=0)
    row["answers/entropy_bits"] = diversity.entropy_bits(pooled[:-1])
    if known.get("log_optimum"):
        row |= {f"gap/{name}": value for name, value in diversity.gap(pooled, known["log_optimum"]).items()}
    log.write(row)
    display.step(row, texts[: setup.cfg.show_samples])
    return ended


def _classes(row: dict[str, Any]) -> list[int]:
    """Completions of a step that gave each answer, then those that gave none."""
    return [*row["answers/counts"], row["samples"] - sum(row["answers/counts"])]


def _reference(cfg, task, workdir, display) -> tuple[Policy, Any]:
    """The reference policy: as weights name it, or warmed up once and saved under workdir."""
    saved = workdir / "reference"
    resumed = cfg.warmup.steps and hosts.on_process_zero(saved.is_dir)
    display.note(f"loading {saved if resumed else cfg.policy.weights}")

    def read() -> tuple[Policy, Any]:
        policy, params = reference.load(str(saved), cfg.policy) if resumed else reference.load_base(cfg, task)
        reference.check_context(cfg, policy, task)
        adapter.check(cfg, policy)
        if cfg.warmup.steps and not resumed:
            reference.check_demonstrations(cfg, policy, task)
        return policy, params

    policy, params = hosts.raise_on_all_processes(read)
    # Only now is anything written: bad weights leave no folder behind.
    hosts.on_process_zero(lambda: workdirs.claim(workdir, cfg))
    if resumed or not cfg.warmup.steps:
        return policy, params
    prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
    params = reference.warm_up(cfg, policy, params, task, prompts, display)
    hf.export(policy, params, str(saved))
    display.note(f"warm-up done; the reference is saved in {saved}")
    return policy, params


def _measured(cfg, policy, ref_params, task, prompts, workdir, display) -> dict[str, Any]:
    path = workdir / "reference.json"
    known = hosts.on_process_zero(lambda: _known(path) if path.exists() else None)
    if known is None:
        display.note(f"measuring the reference on {cfg.warmup.measure_samples} samples a prompt")
        samples = reference.samples_to_measure(cfg, policy, ref_params, task, prompts)
        known = reference.measure(cfg, samples, task)
        hosts.on_process_zero(
            lambda: metrics.write_rows(workdir / SAMPLES, reference.sample_rows(samples, task.answers))
        )
        hosts.on_process_zero(lambda: workdirs.write_json(path, known))
        known = hosts.on_process_zero(lambda: _known(path))
    for line in report.start_summary(known):
        display.note(line)
    return known


def _known(path: pathlib.Path) -> dict[str, Any]:
    """What reference.json holds, with the masses that a run needs."""
    try:
        known = report.read_reference(path)
        if "log_mass" not in known:
            raise ValueError(f"{path} lacks log_mass; it was not written by a language-model run")
    except ValueError as error:
        raise ValueError(f"{error}. Delete it, and the reference is measured again") from error
    return known


def _initial(cfg, policy, start, ref_params, tx, checkpoints: Checkpoints, display) -> State:
    """The weights to start from, or an adapter beside them, with a fresh optimiser; or the newest checkpoint."""
    arch = policy.architecture
    if start is not None:
        # Weights that the reference does not keep are the policy's own: a copy would stand beside all else.
        return placement.fresh(arch, adapter.start(cfg, policy, start), tx, copy=start is ref_params)
    state = hosts.raise_on_all_processes(lambda: checkpoints.restore(placement.abstract(arch, tx)))
    display.note(f"resuming after step {int(state.step)}")
    return state


class Setup(NamedTuple):
    """What does not change between the steps of a run; log_mass [p, a] over all prompts of the task."""

    cfg: LanguageRun
    task: Task
    policy: Policy
    ref_params: Any
    prompts: list[list[int]]
    log_mass: np.ndarray
    tx: Any


def prompt_ids(cfg: LanguageRun, prompts: int, done: int) -> np.ndarray:
    """Which prompts the step after `done` steps uses: a function of (seed, step)."""
    order = grain.MapDataset.range(prompts).seed(cfg.seed).shuffle().repeat()
    count = cfg.rollout.prompts_per_step
    return np.array([order[done * count + i] for i in range(count)])


def draw(setup: Setup, params: Any, done: int, name: str) -> Batch:
    """Scored completions of a step's prompts, and what the reference says of them (on the device, maybe under way).

    Args:
      params: of the policy that is sampled.
      name: the stream of random numbers, "rollout" or "reference".
    """
    return _score(setup, *_roll(setup, params, done, name))


def _roll(
    setup: Setup,
    params: Any,
    done: int,
    name: str,
    meanwhile: Callable[[], object] | None = None,
) -> tuple[rollout.Rollout, np.ndarray]:
    ids, sizes = prompt_ids(setup.cfg, len(setup.prompts), done), setup.cfg.rollout
    # A prompt that a step uses twice has two groups of different samples: random numbers belong to (prompt, sample).
    before = np.array([np.sum(ids[:i] == number) for i, number in enumerate(ids)])
    drawn = rollout.sample(
        setup.policy,
        params,
        [setup.prompts[i] for i in ids],
        key=jax.random.fold_in(reference.stream(setup.cfg.seed, name), done),
        group_size=sizes.group_size,
        max_new_tokens=sizes.max_new_tokens,
        slots=sizes.slots,
        prompt_ids=ids,
        first_sample=before * sizes.group_size,
        least_width=max(map(len, setup.prompts)) if sizes.compile_ahead else 0,
        meanwhile=meanwhile,
    )
    return drawn, ids


def _score(setup: Setup, drawn: rollout.Rollout, ids: np.ndarray) -> Batch:
    sizes, parts = setup.cfg.rollout, setup.cfg.optimiser.micro_batches
    # Of all rows, on every process: lengths are few bytes, and all streams have the size of the fullest.
    lengths_pg, width = hosts.gather(drawn.lengths), drawn.tokens.shape[-1]
    packing = logprobs.packed(lengths_pg, width, sizes.length_buckets, shards=sharding.shard_count("rows"), parts=parts)
    packing = ahead_of_time.place(packing, parts)
    # Dispatched first, so that the device works while the host judges texts.
    ref_hidden = _refer(setup, drawn, packing)
    scored = reference.score(setup.task, ids, drawn)
    return Batch(
        prompt_tokens=drawn.prompt_tokens,
        prompt_lengths=drawn.prompt_lengths,
        tokens=drawn.tokens,
        lengths=drawn.lengths,
        reward=hosts.shard_groups(scored.reward),
        answer=hosts.shard_groups(scored.answer),
        log_mass=hosts.shard_prompts(setup.log_mass[ids], setup.cfg.rollout.group_size),
        ref_hidden=ref_hidden,
        packing=packing,
    )


def _refer(setup: Setup, one: rollout.Rollout | Batch, packing: Packing | None) -> logprobs.Hidden:
    """What the reference says of completions, dispatched."""
    return logprobs.reference_hidden(
        setup.policy.architecture,
        setup.ref_params,
        one.prompt_tokens,
        one.prompt_lengths,
        one.tokens,
        packing,
        setup.cfg.optimiser.micro_batches,
    )


class Pending(NamedTuple):
    """A step whose update is dispatched: what its row is made from, and the clock when it began, had rolled out and had
    scored."""

    done: int
    drawn: rollout.Rollout
    reward: jax.Array
    answer: jax.Array
    scalars: dict[str, jax.Array]
    marks: tuple[float, float, float]


def iterate(setup: Setup, state: State, done: int) -> tuple[State, dict[str, Any], list[tuple[str, bool]]]:
    """One step by itself: the new state, the row for metrics.jsonl, and the completions with their success."""
    state, begun = begin(setup, state, done)
    row, texts, _ = finish(setup, begun)
    return state, row, texts


def begin(
    setup: Setup, state: State, done: int, tell: Callable[[], float | None] = lambda: None, ahead: bool = False
) -> tuple[State, Pending]:
    """One step, up to the dispatch of its update.

    Args:
      tell: called while the device rolls out: it waits for the step before, if there is one, and returns when it ended.
      ahead: whether to compile what later steps may need.
    """
    algorithm, parts = setup.cfg.algorithm, setup.cfg.optimiser.micro_batches
    started = time.perf_counter()

    def meanwhile() -> None:
        nonlocal started
        started = tell() or started

    params = lora.attached(setup.policy.architecture, setup.ref_params, state.params)
    drawn, ids = _roll(setup, params, done, "rollout", meanwhile)
    del params  # the update gives up the state's buffers
    rolled = time.perf_counter()
    batch, other = _score(setup, drawn, ids), None
    if algorithm.truncate:
        batch = batch.replace(sampler_logp=drawn.logp)  # pyright: ignore[reportAttributeAccessIssue]
    if estimator_of(algorithm) == "reference_samples":
        other = draw(setup, setup.ref_params, done, "reference")
    scored = time.perf_counter()
    static: dict[str, Any] = {
        "arch": setup.policy.architecture,
        # beta and threshold are traced, so the compiled program must not depend on them.
        "algorithm": dataclasses.replace(algorithm, beta=1.0, threshold=0.0),
        "tx": setup.tx,
        "parts": parts,
        "updates": setup.cfg.optimiser.updates,
    }
    given = jnp.float32(algorithm.beta), jnp.float32(algorithm.threshold)
    if ahead:
        ahead_of_time.compile_all(
            batch,
            other,
            lambda one: _refer(setup, one, one.packing),
            lambda one, other: step.update.lower(state, setup.ref_params, one, other, *given, **static),
            setup.cfg.rollout.length_buckets,
            parts,
        )
    state, scalars = step.update(state, setup.ref_params, batch, other, *given, **static)
    return state, Pending(done, drawn, batch.reward, batch.answer, scalars, (started, rolled, scored))


def finish(setup: Setup, begun: Pending) -> tuple[dict[str, Any], list[tuple[str, bool]], float]:
    """Waits for a step's update: its row, its completions with their success, and the clock when it ended."""
    drawn, (started, rolled, scored) = begun.drawn, begun.marks
    row: dict[str, Any] = {"step": begun.done + 1} | {name: float(x) for name, x in begun.scalars.items()}
    ended = time.perf_counter()
    answer, lengths, reward = (hosts.gather(x) for x in (begun.answer, drawn.lengths, begun.reward))
    row |= {
        "valid/fraction": float(np.mean(answer >= 0)),
        "answers/counts": [int(np.sum(answer == a)) for a in range(len(setup.task.answers))],
        "samples": int(answer.size),
        "tokens/generated": int(np.sum(lengths)),
        "sampler/logp_gap": _logp_gap(drawn, row["logp/mean"]),
        "time/rollout_s": rolled - started,
        "time/reward_s": scored - rolled,
        "time/update_s": ended - scored,
        "time/step_s": ended - started,
    }
    good = (reward >= setup.cfg.algorithm.threshold).ravel().tolist()
    texts = [text for group in drawn.text for text in group]
    return row, list(zip(texts, good, strict=True)), ended


def _logp_gap(drawn: rollout.Rollout, trained: float) -> float:
    """Mean difference of the sampler's and the trainer's sequence log-probs: 0 but for rounding."""
    return float(np.mean(np.sum(hosts.gather(drawn.logp), axis=-1))) - trained
