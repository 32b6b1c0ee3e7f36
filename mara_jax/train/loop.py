"""The one training loop of language-model runs: rollout, reward, reference, update, metrics, checkpoint."""

import dataclasses
import io
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import LanguageRun, estimator_of
from mara_jax.core import method_rules
from mara_jax.parallel import hosts, sharding, stop
from mara_jax.policies.packing import Packing
from mara_jax.sampling import logprobs, rollout
from mara_jax.tasks.base import Task
from mara_jax.tasks.checked import checked
from mara_jax.train import (
    answer_classes,
    checkpoint,
    groups,
    guard,
    host_state,
    known_strings,
    memory,
    metrics,
    outputs,
    profile,
    programs,
    replay,
    startup,
    step,
    summary,
    trackers,
    trained,
    watchdog,
)
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.groups import Groups, policy_params, rollout_key, start_rollout
from mara_jax.train.held_out import Evaluations
from mara_jax.train.prompts import fitting, ids_of_step
from mara_jax.train.reference_samples import reads_masses
from mara_jax.train.scoring import AnswerIndices, GroupScores
from mara_jax.train.setup import Setup
from mara_jax.train.state import Batch, BySampler, State
from mara_jax.train.step_log import Step, StepLog


def run(cfg: LanguageRun, task: Task, workdir: pathlib.Path) -> None:
    """Trains from the beginning or from the newest checkpoint in workdir, to `cfg.steps`.

    Writes reference/ (where there is a warm-up), reference_samples.jsonl, reference.json, metrics.jsonl, tensorboard/,
    evaluation.jsonl and evaluation/ (where one is made), checkpoints/, model/ or adapter/, and figures.
    """
    hosts.on_process_zero(lambda: trackers.check(cfg.tracker))
    hosts.on_process_zero(lambda: answer_classes.check(cfg))
    hosts.on_process_zero(lambda: checkpoint.check(workdir, cfg.steps))
    damaged = hosts.on_process_zero(lambda: checkpoint.set_aside_damaged(workdir))
    with metrics.Display(cfg.steps, None if hosts.is_process_zero() else io.StringIO()) as display:
        for line in damaged:
            display.note(line)
        setup, state, checkpoints = startup.prepare(cfg, checked(task), workdir, display)
        out = outputs.opened(setup, int(state.step), checkpoints, workdir, display)
        window = profile.Window(cfg.profile, workdir, cfg.steps)
        with stop.deferred():
            try:
                state = train(setup, state, checkpoints, out.log, out.evaluations, window)
            except BaseException:
                checkpoints.finish_alone()
                raise
            finally:
                setup.task.close()
            out.close()
            stop.check_finished(int(state.step), int(state.step) if setup.task.ended() else cfg.steps)
        written = trained.write_end(cfg, setup.policy, state.params, workdir)
    if not hosts.is_process_zero():
        return
    figure = summary.final_figure(workdir)
    display.console.print(summary.final_table(workdir))
    summary.show_evaluations(workdir, display.console)
    summary.show_modes(workdir, display.console)
    skipped = guard.skipped_note(out.file.rows)
    if skipped:
        display.note(skipped)
    display.note(f"figure: {figure}   metrics: {workdir / 'metrics.jsonl'}")
    display.note(written)
    for line in filter(None, [setup.task.write_report(workdir)]):
        display.note(line)


def train(
    setup: Setup,
    state: State,
    checkpoints: Checkpoints,
    log: StepLog,
    evaluations: Evaluations,
    window: profile.Window,
) -> State:
    """Every step that is left, from `state.step` to `cfg.steps`, to where the task ends, or until a signal.

    Returns the last state, saved.
    """
    cfg, first = setup.cfg, int(state.step)
    memory.give_back()  # what the warm-up and the measurement left behind
    log.guard.check_state(first, state)
    evaluations.measure(first, policy_params(setup, state))
    previous: Step | None = None  # a step whose row is not written yet
    counts_scores = host_state.is_kept(setup)  # then no scored step can be taken again, and a signal waits for its end
    for done in range(first, cfg.steps):
        if setup.task.ended():
            log.display.note(f"after step {done}: {setup.task.ended()}")
            break
        with window.step(done + 1):
            started = time.perf_counter()
            ids, too_long = fitting(cfg, setup.prompts, ids_of_step(cfg, len(setup.prompts), done), done)
            watchdog.entered(f"sampling of step {done + 1}")
            pending = start_rollout(setup, policy_params(setup, state), ids, rollout_key(cfg, "rollout", done))
            if previous is not None:
                # The device samples meanwhile. It was busy with the previous update until the time that this returns:
                # only then did this step's rollout start.
                started = log.write(previous)
                watchdog.entered(f"sampling of step {done + 1}")
            drawn = groups.varied(setup, state, Groups(rollout.collect(pending), ids, too_long), done)
            completions, ids = drawn.completions, drawn.ids
            sampled = time.perf_counter()
            watchdog.entered(f"scoring of step {done + 1}")
            threshold = None if setup.known_strings is None else step.threshold_of(cfg.algorithm, state)
            scores, batches = scored_batches(setup, completions, ids, done, threshold)
            if not counts_scores and hosts.on_any_process(stop.asked()):
                # The signal may have reached processes that score, too: the step is taken again by whoever resumes.
                if done > first:
                    hidden = hidden_states(
                        setup, policy_params(setup, state), completions, packing_of(cfg, completions)
                    )
                    log.guard.check_saved(done, state, hidden)
                    checkpoints.save(done, state, last=True)
                return state
            method_rules.check_rewards(cfg.algorithm, scores.reward)
            scored = time.perf_counter()
            watchdog.entered(f"update of step {done + 1}")
            if done == first:
                compile_update(setup, state, batches)
            state, scalars = update_unless_ended(setup, state, batches)
            previous = Step(done + 1, ids, completions, scores, scalars | drawn.counts(cfg), started, sampled, scored)
            del batches
            if window.open:
                jax.block_until_ready(state)  # a step that is traced holds all of its work
        stopped = counts_scores and hosts.on_any_process(stop.asked())
        last = done + 1 == cfg.steps or stopped or bool(setup.task.ended())
        if checkpoints.due(done + 1, last) or evaluations.due(done + 1):
            # A resumed run begins after its checkpoint: no row before it may be missing, and its policy must work.
            hidden = hidden_states(setup, policy_params(setup, state), completions, packing_of(cfg, completions))
            log.write(previous, (state, hidden))
            previous = None
            evaluations.measure(done + 1, policy_params(setup, state))
        if checkpoints.due(done + 1, last):
            watchdog.entered(f"checkpoint after step {done + 1}")
            host_state.save(setup, checkpoints.workdir, done + 1, checkpoints.manager.all_steps())
        if checkpoints.save(done + 1, state, last):
            memory.give_back()
        if stopped:
            break
    return state


def scored_batches(
    setup: Setup, completions: rollout.Rollout, ids: np.ndarray, done: int, threshold: np.floating | None = None
) -> tuple[GroupScores, BySampler]:
    """The scores of the policy's completions; these and, where the estimator reads them, the reference's as batches.

    threshold: from which a completion is good, where listed strings have masses; None for the config's.
    """
    answers = AnswerIndices(len(ids))
    scores, batch = scored_batch(setup, completions, ids, answers, done, threshold)
    if setup.cfg.algorithm.truncate or setup.cfg.guard == "skip":
        batch = batch.replace(sampler_logp=completions.logp)  # pyright: ignore[reportAttributeAccessIssue]
    if setup.task.leaves_out_truncated:
        batch = batch.replace(counted=completions.finished)  # pyright: ignore[reportAttributeAccessIssue]
    if estimator_of(setup.cfg.algorithm) != "reference_samples":
        return scores, BySampler(batch)
    pending = start_rollout(setup, setup.ref_params, ids, rollout_key(setup.cfg, "reference", done))
    return scores, BySampler(batch, scored_batch(setup, rollout.collect(pending), ids, answers, done)[1])


def scored_batch(
    setup: Setup,
    completions: rollout.Rollout,
    ids: np.ndarray,
    answers: AnswerIndices,
    done: int,
    threshold: np.floating | None = None,
) -> tuple[GroupScores, Batch]:
    """Completions with their scores, and the reference policy's hidden states (on the device, maybe under way).

    The batch holds replayed completions behind them, if there are any; the scores are of the completions alone.
    """
    replayed = None if setup.replay is None else setup.replay.drawn(ids, done)
    batch = completions if replayed is None else replay.joined(completions, replayed)
    packing = packing_of(setup.cfg, batch)
    # Dispatched first, so that the device works while the host scores texts.
    ref_hidden = hidden_states(setup, setup.ref_params, batch, packing)
    group_size, masses = batch.lengths.shape[1], {}
    if reads_masses(setup.cfg.algorithm) and setup.known_strings is None:
        masses = reference_scores(setup, ids, answers, group_size)
    scores = groups.score(setup, completions, ids, done)
    if setup.classes is not None:
        scores = setup.classes.of_groups(ids, scores, done + 1)
    in_batch = scores if replayed is None else replay.joined_scores(scores, replayed)
    answer_pg = answers.of(in_batch.answer)
    if setup.known_strings is not None:
        tau = np.float32(setup.cfg.algorithm.threshold) if threshold is None else threshold
        of_prompts = known_strings.log_masses(setup, completions, ids, scores, tau, replayed)
        masses = {"log_mass": hosts.shard_prompts(known_strings.by_index(of_prompts, in_batch, answer_pg), group_size)}
    if setup.replay is not None:
        setup.replay.add(ids, completions, scores)
    return scores, Batch(
        prompt_tokens=batch.prompt_tokens,
        prompt_lengths=batch.prompt_lengths,
        tokens=batch.tokens,
        lengths=batch.lengths,
        reward=hosts.shard_groups(in_batch.reward),
        answer=hosts.shard_groups(answer_pg),
        prompt_ids=hosts.shard_prompts(ids.astype(np.int32), group_size),
        ref_hidden=ref_hidden,
        packing=packing,
        replayed=0 if replayed is None else group_size - completions.lengths.shape[1],
        **masses,
    )


def hidden_states(setup: Setup, params: Any, completions: rollout.Rollout, packing: Packing | None) -> logprobs.Hidden:
    """Dispatches a policy's forward pass over completions."""
    return programs.reference_program(setup.cfg, setup.policy.architecture, params, completions, packing)()


def reference_scores(setup: Setup, ids: np.ndarray, answers: AnswerIndices, group_size: int) -> dict[str, jax.Array]:
    """Rewards and answers of the reference policy's samples under these prompts, as a batch holds them."""
    samples_p = startup.samples_under(setup, ids)
    reward_pn = np.stack([samples.reward for samples in samples_p])
    answer_pn = answers.of([samples.answer for samples in samples_p])
    arrays = {"ref_reward": reward_pn, "ref_answer": answer_pn}
    return {name: hosts.shard_prompts(array, group_size) for name, array in arrays.items()}


def packing_of(cfg: LanguageRun, completions: rollout.Rollout) -> Packing | None:
    """How the completions' tokens are packed into sequences without padding, on the devices of their rows."""
    # From the lengths of all rows, on every process, so that all packed sequences have the size of the fullest.
    lengths_pg, micro_batches = hosts.gather(completions.lengths), cfg.optimiser.micro_batches
    packing = logprobs.packed(
        lengths_pg,
        completions.tokens.shape[-1],
        cfg.rollout.length_buckets,
        shards=sharding.shard_count("rows"),
        parts=micro_batches,
    )
    return jax.tree.map(lambda array: hosts.shard_rows(array, axis=int(micro_batches > 1)), packing)


def compile_update(setup: Setup, state: State, batches: BySampler) -> None:
    """Compiles the update before its first call, and returns the memory that compilations leave behind.

    The update's compilation is the largest. By itself it does not stand beside what earlier ones have left, nor beside
    the arrays of the update.
    """
    memory.give_back()
    update_program(setup, state, batches).compile()
    memory.give_back()


def update_unless_ended(setup: Setup, state: State, batches: BySampler) -> tuple[State, dict[str, jax.Array]]:
    """`update`, with its metrics; in the step that ends the task the state but for `step` stays, see `Task.ended`."""
    before = jax.tree.map(jnp.copy, state) if setup.task.ended() else None  # the update donates the state's buffers
    after, scalars = update(setup, state, batches)
    return (after if before is None else dataclasses.replace(before, step=after.step)), scalars


def update(setup: Setup, state: State, batches: BySampler) -> tuple[State, dict[str, jax.Array]]:
    """Dispatches the update: reward transform, gradient, optimiser; the old state's buffers are donated."""
    return update_program(setup, state, batches)()


def update_program(setup: Setup, state: State, batches: BySampler) -> programs.Program:
    """The update of a step, see `update`."""
    arch = setup.policy.architecture
    return programs.update_program(setup.cfg, arch, setup.tx, state, setup.ref_params, batches)
