"""Steps of a run made again, from a checkpoint and the stored completions, and compared with what the run wrote.

Completions are drawn again first, by the run's own random numbers: that gives their very tokens. Where a text then is
not the stored one, as on a machine that rounds otherwise, the stored text takes its place, encoded again.
"""

import json
import pathlib
import shutil
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax import tasks
from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import encoding
from mara_jax.sampling import logprobs, rollout
from mara_jax.tasks.base import Task
from mara_jax.tasks.checked import checked
from mara_jax.train import (
    checkpoint,
    groups,
    host_state,
    loop,
    metrics,
    optim,
    preflight,
    reference_samples,
    rollouts,
    startup,
    step_log,
    strict_json,
    trained,
)
from mara_jax.train import workdir as workdirs
from mara_jax.train.groups import Groups, policy_params
from mara_jax.train.prompts import EncodedPrompts, fitting, ids_of_step
from mara_jax.train.scoring import GroupScores
from mara_jax.train.setup import Setup
from mara_jax.train.state import State
from mara_jax.train.step import REF_LOGP


class Difference(NamedTuple):
    """A column of rollouts/ or a number of metrics.jsonl that is another one now.

    place: of the first entry that differs, "" for a number of the whole step; count: entries that differ, of `total`.
    """

    name: str
    place: str
    stored: Any
    now: Any
    count: int = 1
    total: int = 1


class Replayed(NamedTuple):
    """A step made again. start: in words, from what; compared: columns and numbers; differences: of them."""

    step: int
    start: str
    compared: int
    differences: list[Difference]


def replay(workdir: pathlib.Path, step: int | None = None) -> list[Replayed]:
    """Makes a step again, and those between it and the newest checkpoint before it; writes nothing.

    Args:
      step: by default the last with a row.

    Raises:
      ValueError, FileNotFoundError: one line; no such run or step, or one whose scores cannot be asked for again.
    """
    run = workdirs.read_run(workdir, "--workdir")
    rows = {row["step"]: row for row in metrics.read_rows(workdir / "metrics.jsonl", metrics.OF_A_STEP)}
    if not rows:
        raise ValueError(f"{workdir / 'metrics.jsonl'} has no step yet: wait for the first")
    last = max(rows) if step is None else step
    first = max((saved for saved in checkpoint.saved_steps(workdir) if saved < last), default=0)
    missing = [number for number in range(first + 1, last + 1) if number not in rows]
    if missing:
        raise ValueError(f"{workdir} has no step {missing[0]}: --step is one of {min(rows)} to {max(rows)}")
    if not run.rollout.save:
        raise ValueError(f"{workdir} was made with rollout.save=False: it has stored no completions")
    with sharding.use(preflight.layout_of(run)):
        setup, state = _before(run, checked(tasks.make(run)), workdir, first)
        replayed = []
        for done in range(first, last):
            start = f"checkpoint {first}" if done == first and first else "the step before" if done else "the reference"
            state, one = _step(setup, state, done, workdir, rows[done + 1])
            replayed.append(one._replace(start=start))
    return replayed


def _before(run: LanguageRun, task: Task, workdir: pathlib.Path, step: int) -> tuple[Setup, State]:
    """The setup of a run, and its state after `step` steps; nothing of it writes."""
    policy, ref_params = trained.reference_of(run, workdir)
    known = reference_samples.ReferenceSamples(
        None, reference_samples.count(run, len(task)), run.rollout.prompts_per_step
    )
    with tempfile.TemporaryDirectory() as copies:
        path = workdir / reference_samples.FILE
        if path.is_file():  # reading mends a file that a kill cut short, and a run may be writing to this one
            copy = pathlib.Path(shutil.copy(path, copies))
            known.known = reference_samples.ReferenceSamples(copy, known.count, known.at_once).known
    setup = Setup(run, task, policy, ref_params, EncodedPrompts(run, policy, task), optim.make(run.optimiser), known)
    setup = setup._replace(known_strings=startup.known_strings(setup), replay=startup.replay(run))
    if host_state.is_kept(setup) or run.task.equivalence:
        what = f"task.equivalence={run.task.equivalence}" if run.task.equivalence else "its scores"
        raise ValueError(
            f"{workdir} cannot be replayed: {what} depend on all steps before; resume a copy of it instead"
        )
    if not step:
        return startup.fresh(setup)
    setup = startup.placed(setup)
    return setup, checkpoint.read_state(workdir, step, startup.abstract_state(setup))


def _step(setup: Setup, state: State, done: int, workdir: pathlib.Path, row: dict[str, Any]) -> tuple[State, Replayed]:
    """The state after a step that is made again, and what of it differs. row: that the run wrote."""
    cfg, table, started = setup.cfg, rollouts.read(workdir, done + 1, done + 1), time.perf_counter()
    ids, too_long = fitting(cfg, setup.prompts, ids_of_step(cfg, len(setup.prompts), done), done)
    pending = groups.start_rollout(setup, policy_params(setup, state), ids, groups.rollout_key(cfg, "rollout", done))
    drawn = groups.varied(setup, state, Groups(rollout.collect(pending), ids, too_long), done)
    shape = drawn.completions.lengths.shape
    if table.num_rows != np.prod(shape) or table["prompt_id"].to_pylist() != np.repeat(drawn.ids, shape[1]).tolist():
        raise ValueError(
            f"{workdir / rollouts.FOLDER} holds other prompts for step {done + 1} than the config draws: was the file, "
            "or the file of prompts, changed?"
        )
    differences = [_of_column("completion", table, [text for group in drawn.completions.text for text in group])]
    completions = drawn.completions
    if differences[0] is not None:
        completions = _with_stored(setup, state, completions, table)
    scores, batches = loop.scored_batches(setup, completions, drawn.ids, done)
    state, scalars = loop.update(setup, state, batches)
    columns = _columns(completions, scores, scalars)
    differences += [_of_column(name, table, values) for name, values in columns.items()]
    made = step_log.Step(done + 1, drawn.ids, completions, scores, scalars, started, started, started)
    now = step_log.fetch(cfg, made)[0]
    names = [name for name in now if name in row and not name.startswith("time/")]
    differences += [_of_number(name, row[name], now[name]) for name in names]
    kept = [one for one in differences if one is not None]
    return state, Replayed(done + 1, "", len(differences), kept)


def _columns(completions: rollout.Rollout, scores: GroupScores, scalars: Any) -> dict[str, list[Any]]:
    """The columns of a step's file that are computed."""
    logp_pg = np.sum(hosts.gather(completions.logp), axis=-1, dtype=np.float32)
    return {
        "finished": hosts.gather(completions.finished).ravel().tolist(),
        "reward": scores.reward.ravel().tolist(),
        "answer": [answer for group in scores.answer for answer in group],
        "logp": logp_pg.ravel().tolist(),
        "ref_logp": hosts.gather(scalars[REF_LOGP]).astype(np.float32).ravel().tolist(),
    }


def _with_stored(setup: Setup, state: State, completions: rollout.Rollout, table: Any) -> rollout.Rollout:
    """Completions with the stored texts where they are others, encoded again; log-probs are then the trainer's."""
    policy, arch = setup.policy, setup.policy.architecture
    tokens_pgt, logp_pgt, lengths_pg, finished_pg = (
        np.array(hosts.gather(x))
        for x in (completions.tokens, completions.logp, completions.lengths, completions.finished)
    )
    count, group_size, width = tokens_pgt.shape
    stored, ends = table["completion"].to_pylist(), table["finished"].to_pylist()
    text = [stored[row * group_size : (row + 1) * group_size] for row in range(count)]
    others = [at for at in np.ndindex(count, group_size) if text[at[0]][at[1]] != completions.text[at[0]][at[1]]]
    for at in others:
        finished = bool(ends[at[0] * group_size + at[1]])
        own = encoding.encode_completion(policy.tokenizer, text[at[0]][at[1]])[: width - finished]
        own = [*own, *([policy.eos_ids[0]] if finished else [])]
        tokens_pgt[at], lengths_pg[at], finished_pg[at] = policy.pad_id, len(own), finished
        tokens_pgt[at][: len(own)] = own
    tokens, lengths, finished = (hosts.shard_groups(array) for array in (tokens_pgt, lengths_pg, finished_pg))
    prompt_tokens, prompt_lengths = completions.prompt_tokens, completions.prompt_lengths
    trainer = jax.jit(logprobs.completion_logps, static_argnums=0)(
        arch, policy_params(setup, state), prompt_tokens, prompt_lengths, tokens
    )
    masked = np.array(trainer * logprobs.mask(lengths, width))
    for at in others:
        logp_pgt[at] = masked[at]
    return rollout.Rollout(tokens, hosts.shard_groups(logp_pgt), lengths, finished, text, prompt_tokens, prompt_lengths)


def _of_column(name: str, table: Any, now: list[Any]) -> Difference | None:
    """What differs in a column, by its first entry."""
    stored = table[name].to_pylist()
    others = [place for place, (one, other) in enumerate(zip(stored, now, strict=True)) if one != other]
    if not others:
        return None
    at = others[0]
    place = f"prompt {table['prompt_id'][at].as_py()}, sample {table['sample'][at].as_py()}"
    return Difference(name, place, stored[at], now[at], len(others), len(stored))


def _of_number(name: str, stored: Any, now: Any) -> Difference | None:
    """What differs in a number, or a table of counts, of the step's row."""
    now = json.loads(strict_json.text(now))
    return None if stored == now else Difference(name, "", stored, now)
