"""The one training loop of language-model runs: rollout, reward, reference, update, metrics, checkpoint."""

import collections
import dataclasses
import json
import pathlib
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import hf
from mara_jax.config import LanguageRun, estimator_of
from mara_jax.eval import diversity, plots, report
from mara_jax.policies import transformer
from mara_jax.sampling import logprobs, rollout
from mara_jax.tasks.base import Task
from mara_jax.train import metrics, optim, reference, step
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.state import Batch, State

POOLED = 8  # batches whose answer counts the entropy pools, as in the paper's Figure 7


def run(cfg: LanguageRun, task: Task, workdir: pathlib.Path) -> None:
    """Trains from the beginning or from the newest checkpoint in workdir, to `cfg.steps`.

    Writes reference/ (where there is a warm-up), reference.json, metrics.jsonl, checkpoints/ and figures.
    """
    with metrics.Display(cfg.steps) as display:
        policy, ref_params = _reference(cfg, task, workdir, display)
        prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
        known = _measured(cfg, policy, ref_params, task, prompts, workdir, display)
        tx = optim.make(cfg.optimiser)
        checkpoints = Checkpoints(workdir, cfg.checkpoint)
        state = _initial(ref_params, tx, checkpoints, display)
        log = metrics.Log(workdir / "metrics.jsonl", int(state.step))
        trainer = Trainer(cfg, task, policy, ref_params, prompts, known, tx)
        counts = collections.deque((row["answers/counts"] for row in log.rows), maxlen=POOLED)
        for done in range(int(state.step), cfg.steps):
            state, row, texts = trainer.step(state, done)
            counts.append(row["answers/counts"])
            row["answers/entropy_bits"] = diversity.entropy_bits(np.sum(counts, axis=0))
            log.write(row)
            display.step(row, texts[: cfg.show_samples])
            checkpoints.save(done + 1, state, last=done + 1 == cfg.steps)
        checkpoints.close()
        log.close()
    figure = plots.final_figure(workdir)
    display.console.print(report.final_table(workdir))
    display.note(f"figure: {figure}   metrics: {workdir / 'metrics.jsonl'}")


def _reference(cfg, task, workdir, display) -> tuple[transformer.Policy, Any]:
    """The reference policy: as weights name it, or warmed up once and saved under workdir."""
    saved = workdir / "reference"
    resumed = cfg.warmup.steps and saved.is_dir()
    display.note(f"loading {saved if resumed else cfg.policy.weights}")
    policy, params = reference.load(str(saved), cfg.policy) if resumed else reference.load_base(cfg, task)
    if cfg.warmup.steps and not resumed:
        reference.check_demonstrations(cfg, policy, task)
    # Only now is anything written: bad weights leave no folder behind.
    workdirs.claim(workdir, cfg)
    if resumed or not cfg.warmup.steps:
        return policy, params
    prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
    params = reference.warm_up(cfg, policy, params, task, prompts, display)
    hf.export(policy, params, str(saved))
    display.note(f"warm-up done; the reference is saved in {saved}")
    return policy, params


def _measured(cfg, policy, ref_params, task, prompts, workdir, display) -> dict[str, Any]:
    path = workdir / "reference.json"
    if path.exists():
        known = json.loads(path.read_text())
    else:
        display.note(f"measuring the reference on {cfg.warmup.measure_samples} samples a prompt")
        known = reference.measure(cfg, policy, ref_params, task, prompts)
        known["objective"] = reference.describe(cfg)
        workdirs.write_json(path, known)
    for line in report.start_summary(known):
        display.note(line)
    return known


def _initial(ref_params, tx, checkpoints: Checkpoints, display) -> State:
    """The reference's weights with a fresh optimiser, or the newest checkpoint."""
    if checkpoints.latest() is None:
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), ref_params)
        return State(jnp.int32(0), params, tx.init(params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), ref_params)
    abstract = jax.eval_shape(lambda params: State(jnp.int32(0), params, tx.init(params)), shapes)
    state = checkpoints.restore(abstract)
    display.note(f"resuming after step {int(state.step)}")
    return state


@dataclasses.dataclass
class Trainer:
    """What does not change between the steps of a run."""

    cfg: LanguageRun
    task: Task
    policy: transformer.Policy
    ref_params: Any
    prompts: list[list[int]]
    known: dict[str, Any]
    tx: Any

    def __post_init__(self) -> None:
        algorithm = self.cfg.algorithm
        # beta and threshold are traced, so the compiled update must not depend on them.
        self.static = dataclasses.replace(algorithm, beta=1.0, threshold=0.0)
        self.beta, self.threshold = jnp.float32(algorithm.beta), jnp.float32(algorithm.threshold)
        self.log_mass_pa = np.asarray(self.known["log_mass"], np.float32)
        order = grain.MapDataset.range(len(self.prompts)).seed(self.cfg.seed).shuffle().repeat()
        self.prompt_order = order

    def prompt_ids(self, done: int) -> np.ndarray:
        """Which prompts step `done` uses: a function of (seed, step)."""
        count = self.cfg.rollout.prompts_per_step
        return np.array([self.prompt_order[done * count + i] for i in range(count)])

    def draw(self, params, done: int, name: str) -> tuple[rollout.Rollout, tuple[jax.Array, jax.Array], np.ndarray]:
        """Completions of a step's prompts and, under way on the device, what the reference says of them."""
        ids, sizes = self.prompt_ids(done), self.cfg.rollout
        drawn = rollout.sample(
            self.policy,
            params,
            [self.prompts[i] for i in ids],
            key=jax.random.fold_in(reference.stream(self.cfg.seed, name), done),
            group_size=sizes.group_size,
            max_new_tokens=sizes.max_new_tokens,
            temperature=sizes.temperature,
            top_p=sizes.top_p,
            prompt_ids=ids,
        )
        ref = logprobs.reference_logps(
            self.policy.architecture,
            self.ref_params,
            drawn.prompt_tokens,
            drawn.prompt_lengths,
            drawn.tokens,
            drawn.lengths,
        )
        return drawn, ref, ids

    def batch(self, drawn: rollout.Rollout, ref, ids) -> Batch:
        scored = reference.score(self.task, ids, drawn)
        return Batch(
            prompt_tokens=drawn.prompt_tokens,
            prompt_lengths=drawn.prompt_lengths,
            tokens=drawn.tokens,
            lengths=drawn.lengths,
            reward=jnp.asarray(scored.reward),
            answer=jnp.asarray(scored.answer),
            ref_logp=ref[0],
            ref_hidden=ref[1],
            log_mass=jnp.asarray(self.log_mass_pa[ids]),
        )

    def step(self, state: State, done: int) -> tuple[State, dict[str, Any], list[tuple[str, bool]]]:
        """One iteration: the new state, the row for metrics.jsonl, and the completions with their success."""
        started = time.perf_counter()
        drawn, ref, ids = self.draw(state.params, done, "rollout")
        drawn.tokens.block_until_ready()
        rolled = time.perf_counter()
        batch = self.batch(drawn, ref, ids)
        other = None
        if estimator_of(self.cfg.algorithm) == "reference_samples":
            other = self.batch(*self.draw(self.ref_params, done, "reference"))
        scored = time.perf_counter()
        state, scalars = step.update(
            state,
            self.ref_params,
            batch,
            other,
            self.beta,
            self.threshold,
            arch=self.policy.architecture,
            algorithm=self.static,
            tx=self.tx,
        )
        row: dict[str, Any] = {"step": done + 1} | {name: float(value) for name, value in scalars.items()}
        ended = time.perf_counter()
        answer = np.asarray(batch.answer)
        row |= {
            "valid/fraction": float(np.mean(answer >= 0)),
            "answers/counts": [int(np.sum(answer == a)) for a in range(len(self.task.answers))],
            "samples": int(answer.size),
            "tokens/generated": int(np.sum(drawn.lengths)),
            "sampler/logp_gap": _logp_gap(drawn, row["logp/mean"]),
            "time/rollout_s": rolled - started,
            "time/reward_s": scored - rolled,
            "time/update_s": ended - scored,
            "time/step_s": ended - started,
        }
        good = (np.asarray(batch.reward) >= self.cfg.algorithm.threshold).ravel().tolist()
        texts = [text for group in drawn.text for text in group]
        return state, row, list(zip(texts, good, strict=True))


def _logp_gap(drawn: rollout.Rollout, trained: float) -> float:
    """Mean difference of the sampler's and the trainer's sequence log-probs: 0 but for rounding."""
    return float(np.mean(np.sum(np.asarray(drawn.logp), axis=-1))) - trained
