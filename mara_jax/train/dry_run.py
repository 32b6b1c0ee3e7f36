"""A run tried out before it is made: its prompt, scored completions, the forecast, memory and time. Writes nothing."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Task
from mara_jax.tasks.checked import checked
from mara_jax.train import (
    adapter,
    answer_classes,
    groups,
    held_out,
    loop,
    optim,
    reference,
    reference_samples,
    report,
    startup,
    trackers,
)
from mara_jax.train.capacity import GIB
from mara_jax.train.compilations import Compilations
from mara_jax.train.prompts import EncodedPrompts, endings, fitting, ids_of_step, refuse_long
from mara_jax.train.setup import Setup
from mara_jax.train.state import State
from mara_jax.train.tables import NumberTable

SHOWN = 8  # completions
SAMPLES = 32  # of each of the first step's prompts, for the forecast
MOST_STEPS = 5  # that are made; with completions of other lengths a later one compiles, too


def run(cfg: LanguageRun, task: Task) -> None:
    """Prints what a run would do at its beginning, from the weights as they are: a warm-up is left out.

    Raises:
      ValueError: as the run itself would end, for weights, prompts or rewards that cannot be used.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not hosts.is_process_zero():
        console.quiet = True
    hosts.on_process_zero(lambda: trackers.check(cfg.tracker))
    task = checked(task)
    console.print(f"objective: {reference.describe_run(cfg, task)}", markup=False)
    policy, params = hosts.raise_on_all_processes(lambda: reference.load_base(cfg, task))
    adapter.check(cfg, policy)
    prompts = EncodedPrompts(cfg, policy, task)
    hosts.raise_on_all_processes(lambda: refuse_long(cfg, prompts))
    ids = fitting(cfg, prompts, ids_of_step(cfg, len(task), 0), 0).ids
    console.print(f"{len(task)} prompts; {endings(policy, cfg.policy.chat)}", markup=False)
    evaluated = hosts.raise_on_all_processes(lambda: held_out.make_task(cfg, task))
    if evaluated is not None:
        held_out.encoded(cfg, policy, evaluated)
        console.print("\n".join(held_out.describe(cfg, task, evaluated)), markup=False)
    if cfg.warmup.steps:
        reference.check_demonstrations(cfg, policy, task)
        console.print("The warm-up is left out: completions are those of the weights before it.")
    classes, store = answer_classes.opened(cfg, task, None), _store(cfg, len(task))
    setup = Setup(cfg, task, policy, params, prompts, optim.make(cfg.optimiser), store, classes=classes)
    setup = setup._replace(known_strings=startup.known_strings(setup), replay=startup.replay(cfg))
    _show_prompt(console, setup, int(ids[0]))
    _show_samples(console, setup, ids)
    _show_step(console, setup)
    console.print("Nothing was written. Without --dry_run the run begins.")


def _store(cfg: LanguageRun, prompts: int) -> reference_samples.ReferenceSamples:
    count = reference_samples.count(cfg, prompts)
    return reference_samples.ReferenceSamples(None, count, cfg.rollout.prompts_per_step)


def _show_prompt(console: Console, setup: Setup, number: int) -> None:
    tokens = setup.prompts[number]
    console.print(f"\nPrompt {number} as the model sees it, {len(tokens)} tokens:")
    console.print(setup.policy.tokenizer.decode(tokens, skip_special_tokens=False), markup=False)


def _show_samples(console: Console, setup: Setup, ids: np.ndarray) -> None:
    """Completions of the first prompt as a table, then what samples of all prompts of the step forecast."""
    ids = np.array(list(dict.fromkeys(ids.tolist())))
    samples_p = reference.draw_samples(setup, ids, "measure", SAMPLES)
    shown = NumberTable.with_headers("completion", "answer", "reward", texts=2, title="\nCompletions of it")
    first = samples_p[0]
    for text, answer, reward in list(zip(first.text, first.answer, first.reward, strict=True))[:SHOWN]:
        shown.add_row(escape(repr(text)), "-" if answer is None else escape(repr(answer)), f"{reward:g}")
    console.print(shown)
    console.print(f"\nForecast from {SAMPLES} samples of each of {len(ids)} prompts:")
    for line in report.start_summary(reference.measure(setup.cfg, samples_p, setup.task)):
        console.print(line, markup=False)


def _show_step(console: Console, setup: Setup) -> None:
    """Makes steps until one of them compiles nothing, and says what they took."""
    setup, state = startup.fresh(setup)
    first, later = seconds_of_steps(lambda state, done: _step(setup, state, done), state)
    steps = f"{setup.cfg.steps} steps" + (", unless the task ends before," if setup.task.keeps_state else "")
    console.print(
        f"\nThe first step takes {first:.1f} s (it compiles), a later one {later:.1f} s: "
        f"{steps} about {_duration(later * setup.cfg.steps)}, besides warm-up, measurements and "
        "compilations of other lengths."
    )
    if setup.task.keeps_state:
        console.print("The completions of these steps were scored, and count for nothing: the run begins anew.")
    console.print(f"Memory at its highest: {_peak() / GIB:.2f} GiB {_where()}.")


def seconds_of_steps(step: Callable[[Any, int], Any], state: Any) -> tuple[float, float]:
    """Seconds of the first step, and of a later one: the first that compiles nothing, else the shortest of MOST_STEPS.

    Args:
      step: of a state and the number of steps before it; returns the next state.
    """
    compilations, seconds = Compilations(), []
    for done in range(MOST_STEPS):
        started = time.perf_counter()
        with compilations.counted() as compiled:
            state = step(state, done)
        seconds.append(time.perf_counter() - started)
        if done and not compiled["programs"]:
            return seconds[0], seconds[-1]
    return seconds[0], min(seconds[1:])


def _step(setup: Setup, state: State, done: int) -> Any:
    ids = fitting(setup.cfg, setup.prompts, ids_of_step(setup.cfg, len(setup.prompts), done), done).ids
    key = groups.rollout_key(setup.cfg, "rollout", done)
    pending = groups.start_rollout(setup, groups.policy_params(setup, state), ids, key)
    drawn = groups.varied(setup, state, groups.Groups(rollout.collect(pending), ids), done)
    _, batches = loop.scored_batches(setup, drawn.completions, drawn.ids, done)
    return jax.block_until_ready(loop.update(setup, state, batches)[0])


def _peak() -> float:
    """Bytes: of the first device where it counts them, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats.get("peak_bytes_in_use", peak)


def _where() -> str:
    device = jax.local_devices()[0]
    return f"on {device.device_kind}" if (device.memory_stats() or {}).get("peak_bytes_in_use") else "of this process"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
