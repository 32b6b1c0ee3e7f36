"""Training of a reward model: pairs in, metrics, checkpoints, a Hugging Face directory and its calibration out."""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import optax
from rich.console import Console

from mara_jax import config, hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.hf.files import read_config
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.policies import encoding, transformer
from mara_jax.policies.policy import Policy
from mara_jax.reward_model import pairs as pair_files
from mara_jax.reward_model import report
from mara_jax.reward_model.pairs import Pair
from mara_jax.reward_model.report import Encoded
from mara_jax.tasks.base import text_of
from mara_jax.train import (
    checkpoint,
    disk,
    inputs,
    lock,
    metrics,
    optim,
    placement,
    preference,
    reference,
    reward_model,
    shape,
)
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.state import State

FIELDS = ("step", "pairs/loss")  # of every row of metrics.jsonl
MODEL = "model"  # the folder in WORKDIR


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asks for, as config.json has it.

    pairs: a file; prompts: files of which pairs are made where there is none; held_out: share of the prompts; batch:
    pairs a step; evaluations and checkpoints are made every `checkpoint.every` steps.
    """

    pairs: str
    prompts: tuple[str, ...]
    held_out: float
    steps: int
    seed: int
    batch: int
    policy: config.Policy
    optimiser: config.Optimiser
    checkpoint: config.Checkpoint
    mesh: config.Mesh


class Prepared(NamedTuple):
    """What does not change between steps: the model without its parameters, the optimiser, and the pairs."""

    settings: Settings
    policy: Policy
    tx: optax.GradientTransformation
    training: Encoded
    held_out: Encoded


def run(settings: Settings, workdir: pathlib.Path, console: Console) -> None:
    """Trains from the beginning or from the newest checkpoint in workdir, and writes what was trained.

    Raises:
      ValueError, OSError: one line.
    """
    sizes = {axis: getattr(settings.mesh, axis) for axis in mesh.AXES}
    layout = sharding.layout(mesh.make_mesh(sizes), settings.mesh.overrides)
    workdirs.check_place(workdir)
    with disk.one_line(workdir), lock.held(workdir), sharding.use(layout):
        workdirs.check(workdir, settings)
        checkpoint.check(workdir, settings.steps)
        for line in checkpoint.set_aside_damaged(workdir):
            console.print(line, markup=False)
        shards = sharding.shard_count("rows")
        if settings.batch % shards:
            raise ValueError(f"--batch={settings.batch} pairs do not divide over {shards} devices: use a multiple")
        with metrics.Display(settings.steps, console.file) as display:
            ready, state, checkpoints = prepare(settings, workdir, display)
            log = metrics.Log(workdir / "metrics.jsonl", int(state.step), fields=FIELDS)
            for warning in log.warnings():
                display.note(warning)
            try:
                state = train(ready, state, checkpoints, log, display)
            except BaseException:
                checkpoints.finish_alone()
                raise
            finally:
                log.close()
            checkpoints.close()
        model = workdir / MODEL
        shutil.rmtree(model, ignore_errors=True)
        hf.export(ready.policy, state.params, model)
        report.write(workdir, scorer(ready, state), ready.training, ready.held_out, settings.seed, console)
    console.print(f"model: {model}   (as --config.task.reward_model={model}; transformers loads it)", markup=False)


# ---- before the first step ------------------------------------------------------------------------------------------


def prepare(settings: Settings, workdir: pathlib.Path, display: metrics.Display) -> tuple[Prepared, State, Checkpoints]:
    """Reads pairs and weights, and makes or restores the state to start from; errors as of `run`."""
    pairs = pair_files.read(settings.pairs) if settings.pairs else pair_files.made(settings.prompts, settings.seed)
    training, held_out = pair_files.split(pairs, settings.held_out, settings.seed)
    as_run = config.LanguageRun(policy=settings.policy)
    weights = inputs.pinned(workdir, as_run)
    display.note(f"{len(pairs)} pairs, {len(held_out)} of them held out, by their prompts; loading {weights}")
    begun_with = {f"pairs/{pathlib.Path(path).name}": inputs.digest(pathlib.Path(path)) for path in files_of(settings)}
    begun_with |= inputs.of_files(as_run, weights, inputs.WEIGHTS) | inputs.versions()
    for line in inputs.check(workdir, begun_with):
        display.note(line)
    policy, params = base(settings, weights, pairs)
    model = reward_model.RewardModel(policy, params)
    encoded = [encode(model, [pairs[number] for number in numbers]) for numbers in (training, held_out)]
    ready = Prepared(settings, policy, optim.make(settings.optimiser), *encoded)
    # Only now is anything written: bad weights or pairs leave no folder behind.
    workdirs.claim(workdir, settings)
    inputs.record(workdir, weights, begun_with)
    checkpoints = Checkpoints(workdir, settings.checkpoint)
    if checkpoints.latest() is None:
        return ready, placement.fresh(policy.architecture, params, ready.tx), checkpoints
    state = checkpoints.restore(placement.abstract(policy.architecture, ready.tx))
    display.note(f"resuming after step {int(state.step)}")
    return ready, state, checkpoints


def files_of(settings: Settings) -> list[str]:
    """The files that pairs come from."""
    named = [settings.pairs] if settings.pairs else settings.prompts
    folders = [pathlib.Path(name) for name in named]
    return [str(file) for path in folders for file in (sorted(path.glob("*.arrow")) if path.is_dir() else [path])]


def base(settings: Settings, weights: str, pairs: Sequence[Pair]) -> tuple[Policy, Any]:
    """A model with a score head: weights that have one, a language model's with a new one, or nano from scratch."""
    cfg, layout = settings.policy, sharding.current()
    if weights == shape.NANO:
        texts = [text for pair in pairs for text in (text_of(pair.prompt), pair.chosen, pair.rejected)]
        tokenizer = tokenizers.nano(texts[: 3 * reference.NANO_TEXTS], shape.NANO_VOCABULARY)
        arch, ends = shape.nano(cfg), tokenizers.end_tokens(tokenizer)
        arch = dataclasses.replace(arch, without_token=encoding.ids_without_token(tokenizer, arch.vocab_size, ends))
        policy = Policy(arch, tokenizer, ends, ends[0], {}, weights)
        params = transformer.init(arch, reference.stream(settings.seed, "init"))
    else:
        policy, params = hf.load(weights, **shape.choices(cfg), layout=layout, score_head=has_score_head(weights))
    if policy.tokenizer is None:
        raise ValueError(f"{weights} has no tokenizer: put its tokenizer.json beside the weights")
    return reward_model.begun(policy, params, reference.stream(settings.seed, "score"))


def has_score_head(weights: str) -> bool:
    """Whether weights are a reward model's, by their config.json."""
    place = hf.locate(weights)
    named = read_config(place).get("architectures") if place.is_dir() else None
    return any(str(name).endswith("ForSequenceClassification") for name in named or ())


def encode(model: reward_model.RewardModel, pairs: Sequence[Pair]) -> Encoded:
    """Pairs as token ids.

    Raises:
      ValueError: a sequence that is longer than the model's context.
    """
    most, rows = model.policy.architecture.max_positions, []
    for name in ("chosen", "rejected"):
        rows.append(model.encode([pair.prompt for pair in pairs], [getattr(pair, name) for pair in pairs]))
        for pair, ids in zip(pairs, rows[-1], strict=True):
            if len(ids) > most:
                raise ValueError(
                    f"the {name} completion {getattr(pair, name)!r:.60} makes {len(ids)} tokens with its prompt "
                    f"{text_of(pair.prompt)!r:.60}, but {model.policy.source} has {most} positions: leave the pair "
                    "out, or choose a model with a longer context"
                )
    return Encoded(list(pairs), *rows)


# ---- the loop -------------------------------------------------------------------------------------------------------


def pairs_of_step(seed: int, count: int, batch: int, done: int) -> list[int]:
    """Which of `count` pairs the step after `done` steps uses: a function of (seed, step)."""
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return [int(order[done * batch + i]) for i in range(batch)]  # pyright: ignore[reportArgumentType]


def train(ready: Prepared, state: State, checkpoints: Checkpoints, log: metrics.Log, display: metrics.Display) -> State:
    """Every step that is left; returns the last state."""
    settings = ready.settings
    for done in range(int(state.step), settings.steps):
        started = time.perf_counter()
        numbers = pairs_of_step(settings.seed, len(ready.training.pairs), settings.batch, done)
        rows = [ids for n in numbers for ids in (ready.training.chosen[n], ready.training.rejected[n])]
        width = reward_model.width_of(rows, range(len(rows)))
        arrays = [hosts.shard_rows(array) for array in reward_model.padded(rows, len(rows), width)]
        state, scalars = preference.update(state, *arrays, arch=ready.policy.architecture, tx=ready.tx)
        row: dict[str, Any] = {name: float(value) for name, value in jax.device_get(scalars).items()}
        check(done + 1, row, settings.optimiser.learning_rate)
        last = done + 1 == settings.steps
        if checkpoints.due(done + 1, last):
            row |= measure(ready, state)
        row |= {"step": done + 1, "time/step_s": time.perf_counter() - started}
        log.write(row)
        if display.live or done < 10 or "held_out/loss" in row:
            display.step(row, [])
        checkpoints.save(done + 1, state, last)
    return state


def check(step: int, row: dict[str, float], rate: float) -> None:
    """Refuses to go on after a loss or a gradient that is not finite."""
    for name in ("pairs/loss", "gradient/norm"):
        if not math.isfinite(row[name]):
            raise ValueError(
                f"step {step}: {name} is {row[name]}: lower --learning_rate={rate:g}, or look whether the weights are "
                "whole; the last checkpoint stays"
            )


def scorer(ready: Prepared, state: State) -> reward_model.RewardModel:
    """The model with its parameters as they are now."""
    return reward_model.RewardModel(ready.policy, state.params)


def measure(ready: Prepared, state: State) -> dict[str, float]:
    """Loss and share of right pairs on held-out pairs."""
    margin = report.margins(scorer(ready, state), ready.held_out)
    return {
        "held_out/loss": report.quality.loss(margin),
        "held_out/accuracy": float(report.quality.right(margin).mean()),
    }
