"""The run of a prior: data, updates, evaluations, checkpoints, and what it leaves in WORKDIR."""

import dataclasses
import json
import math
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from mara_jax import hf
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.prior import drawing, quality, training
from mara_jax.prior.batches import TrainingSet
from mara_jax.prior.settings import Settings
from mara_jax.tasks.chemistry import moses, smiles_file
from mara_jax.tasks.chemistry.molecules import canonical_of
from mara_jax.train import checkpoint, finite, inputs, placement
from mara_jax.train import workdir as run_directory
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.metrics import Log
from mara_jax.train.reference import stream
from mara_jax.train.state import State

MODEL, STATISTICS, WRITTEN = "model", "statistics.json", "molecules.smi"
ROW = ("step", "loss/train", "tokens/trained", "learning_rate", "time/step_s")  # of metrics.jsonl
_EVERY = 20  # updates between two lines of progress


class Run(NamedTuple):
    """A prior's run; known: the canonical SMILES that it trains on."""

    settings: Settings
    workdir: pathlib.Path
    molecules: TrainingSet
    known: set[str]
    policy: Policy
    console: Console


class Pending(NamedTuple):
    """An update whose loss the device may still be computing."""

    step: int
    loss: jax.Array
    tokens: int


class Progress:
    """metrics.jsonl, a row an update, and what a person sees of it."""

    def __init__(self, this: Run, done: int) -> None:
        self.this, self.log = this, Log(this.workdir / "metrics.jsonl", done, fields=ROW)
        for warning in self.log.warnings():
            this.console.print(warning, markup=False)
        self.tokens = self._tokens_of(done)  # trained on so far
        self.rate = training.learning_rate(this.settings)
        self.resume_clock()

    def resume_clock(self) -> None:
        """The next update's time begins now."""
        self.since = time.perf_counter()

    def _tokens_of(self, done: int) -> int:
        """Tokens of the first updates: of the last one's row or, where that is lost, counted once more."""
        rows = self.log.rows
        if rows and rows[-1]["step"] == done:
            return rows[-1]["tokens/trained"]
        return sum(int(self.this.molecules.batch(number).lengths.sum()) for number in range(done))

    def write(self, update: Pending) -> None:
        """Waits for an update's loss, and writes its row.

        Raises:
          ValueError: the loss is not finite.
        """
        loss, settings = float(update.loss), self.this.settings
        if not math.isfinite(loss):
            raise ValueError(
                f"update {update.step}: the loss is not finite: lower --learning_rate={settings.learning_rate:g}, and "
                "choose another --workdir"
            )
        seconds = time.perf_counter() - self.since
        self.resume_clock()
        self.tokens += update.tokens
        self.log.write(
            {
                "step": update.step,
                "loss/train": loss,
                "tokens/trained": self.tokens,
                "learning_rate": float(np.asarray(self.rate(update.step - 1))),
                "time/step_s": seconds,
            }
        )
        if update.step % _EVERY == 0 or update.step in (1, settings.steps):
            self._show(update.step, loss)

    def _show(self, step: int, loss: float) -> None:
        rows = self.log.rows[-_EVERY - 1 :]
        seconds = sum(row["time/step_s"] for row in rows[1:]) or rows[0]["time/step_s"]
        updates = max(len(rows) - 1, 1)
        tokens = rows[-1]["tokens/trained"] - (rows[0]["tokens/trained"] if len(rows) > 1 else 0)
        minutes = (self.this.settings.steps - step) * seconds / updates / 60
        self.this.console.print(
            f"update {step}/{self.this.settings.steps}  loss {loss:.3f} nats a token  "
            f"{tokens / seconds:,.0f} tokens/s  {minutes:,.0f} minutes left"
        )


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """Trains a prior, or goes on with one, and writes model, statistics, figure and molecules.

    Raises:
      ValueError, OSError: one line.
    """
    console = Console(highlight=False, soft_wrap=True)
    _check_steps(workdir, settings)
    checkpoint.check(workdir, settings.steps)
    for line in checkpoint.set_aside_damaged(workdir):
        console.print(line, markup=False)
    this = prepared(settings, workdir, console)
    tx = training.optimiser(settings)
    checkpoints = Checkpoints(workdir, settings.checkpoint)
    done = checkpoints.latest() or 0
    if done:
        state = checkpoints.restore(placement.abstract(this.policy.architecture, tx))
        console.print(f"goes on after update {done} of {settings.steps}")
    else:
        params = transformer.init(this.policy.architecture, stream(settings.seed, "init"))
        state = placement.fresh(this.policy.architecture, params, tx)
    progress = Progress(this, done)
    evaluations = Log(workdir / "evaluations.jsonl", done, fields=("step",))
    try:
        state = train(this, state, checkpoints, progress, evaluations)
    finally:
        checkpoints.close()
        progress.log.close()
        evaluations.close()
    finish(this, state, evaluations.rows)


def prepared(settings: Settings, workdir: pathlib.Path, console: Console) -> Run:
    """Reads the molecules and claims WORKDIR; refuses a resumed run with other molecules."""
    read = smiles_file.read(settings.smiles, settings.column, settings.bad_lines)
    molecules = TrainingSet(read.smiles, settings)
    policy = training.policy_of(settings, molecules)
    now = {"smiles": read.digest}
    inputs.check(workdir, now)
    run_directory.claim(workdir, settings)  # pyright: ignore[reportArgumentType]
    inputs.record(workdir, settings.smiles, now)
    left_out = read.left_out | (
        {f"more than {settings.longest} tokens": molecules.too_long} if molecules.too_long else {}
    )
    out = "".join(f"; left out: {count:,} with {kind}" for kind, count in left_out.items())
    console.print(f"{len(molecules.train):,} molecules to train on, {len(molecules.held_out):,} held out{out}")
    shape = policy.architecture
    console.print(
        f"{parameters.count(shape):,} parameters, {shape.vocab_size} tokens; an update reads "
        f"{settings.batch} molecules in {molecules.slots:,} slots"
    )
    canonical = {*molecules.train} if settings.smiles in smiles_file.MOSES else canonical_of(molecules.train)
    return Run(settings, workdir, molecules, canonical, policy, console)


def train(this: Run, state: State, checkpoints: Checkpoints, progress: Progress, evaluations: Log) -> State:
    """Every update that is left; returns the last state."""
    settings, arch, tx = this.settings, this.policy.architecture, training.optimiser(this.settings)
    bos_id, previous = this.policy.tokenizer.bos_token_id, None
    progress.resume_clock()
    for done in range(int(state.step), settings.steps):
        batch = this.molecules.batch(done)  # made while the device computes the update before
        if previous is not None:
            progress.write(previous)
        state, loss = training.update(state, batch, arch=arch, tx=tx, bos_id=bos_id)
        previous = Pending(done + 1, loss, int(batch.lengths.sum()))
        last = done + 1 == settings.steps
        evaluates = last or (done + 1) % settings.evaluate_every == 0
        if evaluates or checkpoints.due(done + 1, last):  # no row before a checkpoint may be missing
            progress.write(previous)
            previous = None
            if evaluates:
                evaluate(this, done + 1, state.params, progress.tokens, evaluations)
            if checkpoints.due(done + 1, last):
                check_finite(done + 1, state, settings)
                checkpoints.save(done + 1, state, last)
            progress.resume_clock()
    return state


def check_finite(step: int, state: State, settings: Settings) -> None:
    """Refuses to keep a state from which nothing can go on.

    Raises:
      ValueError: one line.
    """
    name = finite.nonfinite_array(state)
    if name:
        raise ValueError(
            f"update {step}: {name} is not finite: lower --learning_rate={settings.learning_rate:g}, and choose "
            "another --workdir"
        )


def evaluate(this: Run, step: int, params: Any, tokens: int, evaluations: Log) -> None:
    """Adds the quality of written molecules, and the held-out loss, to evaluations.jsonl."""
    started = time.perf_counter()
    key = jax.random.fold_in(stream(this.settings.seed, "evaluation"), step)
    smiles = quality.written(this.policy, params, this.settings.samples, this.molecules.width, key)
    shares = moses.shares(smiles, this.known)
    row = {"step": step, "tokens/trained": tokens, **shares}
    row["loss/held_out"] = training.held_out_loss(this.policy, params, this.molecules)
    row["time/evaluation_s"] = time.perf_counter() - started
    evaluations.write(row)
    drawing.draw_curves(evaluations.rows, this.workdir / "validity.png")
    held_out = "" if row["loss/held_out"] is None else f", held-out loss {row['loss/held_out']:.2f} nats a molecule"
    this.console.print(
        f"evaluation after update {step}: valid {shares['valid']:.3f}, of these different {shares['unique@1k']:.3f}, "
        f"novel {shares['novel']:.3f}{held_out}; for example {' '.join(list(filter(None, smiles))[:3])}"
    )


def finish(this: Run, state: State, rows: list[dict[str, Any]]) -> None:
    """Writes the model, reads it back, and measures what it writes: the numbers are those of the weights as kept."""
    settings, workdir, out = this.settings, this.workdir, this.workdir / MODEL
    shutil.rmtree(out, ignore_errors=True)
    hf.export(this.policy, state.params, out, dtype=settings.dtype)
    policy, kept = hf.load(out)
    this.console.print(f"writing {settings.final_samples:,} molecules")
    key = jax.random.fold_in(stream(settings.seed, "evaluation"), 0)
    smiles = quality.written(policy, kept, settings.final_samples, this.molecules.width, key)
    run_directory.replace(workdir / WRITTEN, "".join(f"{text}\n" for text in smiles if text))
    sets = quality.references(settings.smiles, this.molecules)
    measured = quality.statistics(smiles, this.known, sets, this.console.print)
    told = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "parameters": parameters.count(policy.architecture),
        "tokens_trained": rows[-1]["tokens/trained"],
        "molecules": len(smiles),
        "statistics": measured,
        "missing": ["FCD: needs ChemNet's weights, which no package brings"],
    }
    for place in (workdir, out):
        run_directory.write_json(place / STATISTICS, told)
    this.console.print(drawing.table(measured, settings.smiles))
    this.console.print("FCD is missing: it needs ChemNet's weights, which no package brings")
    this.console.print(f"figure: {workdir / 'validity.png'}   molecules: {workdir / WRITTEN}")
    this.console.print(f"model: {out}   (--config.policy.weights={out} starts from it)")


def _check_steps(workdir: pathlib.Path, settings: Settings) -> None:
    """Refuses to resume with another number of updates, on which the learning rate depends.

    Raises:
      ValueError: one line.
    """
    run_directory.check(workdir, settings)  # pyright: ignore[reportArgumentType]
    path = workdir / "config.json"
    before = json.loads(path.read_text()).get("steps") if path.exists() else settings.steps
    if before != settings.steps and settings.decay != "none":
        raise ValueError(
            f"--steps={settings.steps}, but {workdir} is of a run of {before} updates, over which its learning rate "
            f"falls: give --steps={before}, or another --workdir"
        )
