"""The reference of a run: base weights, the warm-up that teaches them the format, and what is measured of it."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config, hf
from mara_jax.config import Algorithm, LanguageRun
from mara_jax.core import augment, forecast, method_rules
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import encoding, parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import group_metrics, optim, placement, scoring, shape, warmup, watchdog
from mara_jax.train.metrics import Display
from mara_jax.train.prompts import EncodedPrompts, ended_by_turns, fitting, ids_of_step
from mara_jax.train.reference_samples import PromptSamples
from mara_jax.train.setup import Setup

CHECK_SAMPLES = 64  # drawn after a step of the warm-up, to see whether the task accepts them
NANO_TEXTS = 2000  # demonstrations, or prompts, from which its tokenizer is made
# Random streams: each has its own key, folded from the run's seed and its place here. Append only.
STREAMS = {
    name: number
    for number, name in enumerate(
        ("rollout", "reference", "measure", "init", "check", "bootstrap", "adapter", "evaluation", "score")
    )
}
_PHASES = {"measure": "measurement", "check": "check"}  # by names of streams, what samples of the reference are for


def stream(seed: int, name: str) -> jax.Array:
    """The key of one stream of random numbers of a run."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[name])


def samples_seed(run: LanguageRun) -> int:
    """The seed of a run's samples of the reference policy."""
    return run.seed if run.reference.seed < 0 else run.reference.seed


def load_base(run: LanguageRun, task: Task) -> tuple[Policy, Any]:
    """The policy that `policy.weights` names, before any warm-up.

    "nano" is a Qwen2-shaped model with random weights and a tokenizer of its own, made from texts of the task;
    everything else goes to hf.load.
    """
    cfg = run.policy
    if cfg.weights != shape.NANO:
        return load(cfg.weights, cfg)
    tokenizer = nano_tokenizer(run, task)
    arch, ends = shape.nano(cfg), tokenizers.end_tokens(tokenizer)
    unused = encoding.ids_without_token(tokenizer, arch.vocab_size, ends)
    arch = dataclasses.replace(arch, without_token=unused)
    policy = Policy(arch, tokenizer, ends, ends[0], {}, shape.NANO)
    layout, make = sharding.current(), functools.partial(transformer.init, arch)
    if layout is not None:
        make = jax.jit(make, out_shardings=parameters.shardings(arch, layout))
    return policy, make(stream(run.seed, "init"))


def load(where: str, cfg: config.Policy) -> tuple[Policy, Any]:
    """Weights from a directory, file or hub id, computed with as the config says."""
    policy, params = hf.load(where, **shape.choices(cfg), layout=sharding.current())
    return ended_by_turns(policy, cfg.chat), params


def nano_tokenizer(run: LanguageRun, task: Task) -> Any:
    """nano's tokenizer, made from the task's demonstrations and first prompts."""
    texts = [text_of(part) for pair in task.demonstrations(run.seed, 0, NANO_TEXTS) for part in pair]
    texts = texts or [text_of(task.prompt(number)) for number in range(min(len(task), NANO_TEXTS))]
    return tokenizers.nano(texts, shape.NANO_VOCABULARY)


def draw_samples(setup: Setup, ids: Sequence[int] | np.ndarray, name: str, count: int) -> list[PromptSamples]:
    """`count` scored completions of the reference policy to each of these prompts, in calls of the run's group size.

    Args:
      name: of the random stream, in STREAMS.
    """
    run, task, policy = setup.cfg, setup.task, setup.policy
    size = min(run.rollout.group_size, count)
    tokens = [setup.prompts[number] for number in ids]
    scored = len(dict.fromkeys(int(number) for number in ids))  # what repeats the last prompt fills a batch
    parts: list[list[PromptSamples]] = []
    for first in range(0, count, size):
        watchdog.entered(f"{_PHASES.get(name, name)} of the reference policy")
        completions = rollout.sample(
            policy,
            setup.ref_params,
            tokens,
            key=stream(samples_seed(run) if name == "measure" else run.seed, name),
            group_size=size,
            max_new_tokens=run.rollout.max_new_tokens,
            slots=run.rollout.slots,
            prompt_ids=ids,
            first_sample=first,
        )
        ref_logp_pg = jnp.sum(completions.logp, axis=-1) if task.reads_ref_logp else None
        scores = scoring.score(task, np.asarray(ids), completions, 0, ref_logp_pg, scored)
        logp_pg = np.sum(np.asarray(hosts.gather(completions.logp), np.float64), axis=-1)
        text = rollout.whole_text(policy, completions)
        parts.append([PromptSamples(*row) for row in zip(scores.reward, scores.answer, logp_pg, text, strict=True)])
    samples_p = [_joined(groups, count) for groups in zip(*parts, strict=True)]
    return samples_p if setup.classes is None else setup.classes.of_samples(ids, samples_p)


def _joined(groups: Sequence[PromptSamples], count: int) -> PromptSamples:
    """The first `count` samples of a prompt's groups."""
    reward, logp = (np.concatenate([getattr(group, name) for group in groups])[:count] for name in ("reward", "logp"))
    answer, text = ([x for group in groups for x in getattr(group, name)][:count] for name in ("answer", "text"))
    return PromptSamples(reward, answer, logp, text)


def check_demonstrations(run: LanguageRun, policy: Policy, task: Task) -> None:
    """Refuses, before any training, demonstrations that do not fit the completion length or do not end a completion.

    Raises:
      ValueError: there are none; the longest one, with its end token, is longer than rollout.max_new_tokens; or the
        token that closes them is none that ends a completion.
    """
    if not task.demonstrations(run.seed, 0, run.warmup.batch):
        raise ValueError(
            f"warmup.steps={run.warmup.steps}, but the task {task.name!r} has no demonstrations to imitate: set "
            "warmup.steps=0, or give the task a method `demonstrations`"
        )
    end = encoding.closing_id(policy.tokenizer, run.policy.chat)
    if end is None or end not in policy.eos_ids:
        names = f"is the id {end}, but completions end at" if end is not None else "is not set; completions end at"
        raise ValueError(
            f"{policy.source}: the tokenizer's eos_token, which closes the warm-up's demonstrations, {names} "
            f"{list(policy.eos_ids) or 'none'}: make eos_token in tokenizer_config.json and eos_token_id in "
            "generation_config.json the same, or set warmup.steps=0"
        )
    steps = max(run.warmup.steps, run.warmup.max_steps)
    texts = {text for step in range(steps) for _, text in task.demonstrations(run.seed, step, run.warmup.batch)}
    longest = 1 + max(len(encoding.encode_completion(policy.tokenizer, text)) for text in texts)
    if longest > run.rollout.max_new_tokens:
        raise ValueError(
            f"rollout.max_new_tokens={run.rollout.max_new_tokens} is too short for the warm-up's demonstrations: "
            f"the longest has {longest} tokens with its end token; use at least that"
        )


def warm_up(run: LanguageRun, policy: Policy, params: Any, task: Task, display: Display) -> Any:
    """Supervised steps on demonstrations; returns the new params.

    At least `warmup.steps` steps. With `warmup.max_steps` above that, samples of the first step's prompts are drawn
    after each further step, and training ends at the first check that the task accepts.

    Raises:
      ValueError: max_steps passed without such a check.
    """
    cfg = run.warmup
    tx = optim.make(dataclasses.replace(run.optimiser, learning_rate=cfg.learning_rate, warmup_steps=0, decay_steps=0))
    state = placement.fresh(policy.architecture, params, tx)
    prompts, encoded = EncodedPrompts(run, policy, task), {}
    checked = fitting(run, prompts, ids_of_step(run, len(task), 0), 0).ids
    most, end = max(cfg.steps, cfg.max_steps), encoding.closing_id(policy.tokenizer, run.policy.chat)
    assert end is not None, "check_demonstrations refuses a policy without it"
    words = "no check was made"
    for step in range(most):
        watchdog.entered(f"warm-up, step {step + 1} of {most}")
        pairs = task.demonstrations(run.seed, step, cfg.batch)
        for prompt, _ in pairs:
            if repr(prompt) not in encoded:
                encoded[repr(prompt)] = prompts.encode([prompt])[0]
        rows = [(encoded[repr(prompt)], text) for prompt, text in pairs]
        batch = warmup.placed(*warmup.demonstration_batch(policy, rows, run.rollout.max_new_tokens, end))
        state, loss = warmup.supervised_update(state, *batch, arch=policy.architecture, tx=tx)
        display.warm_up(step + 1, most, float(loss))
        may_end = step + 1 == most or (cfg.max_steps and step + 1 >= cfg.steps)
        warmup.check(step + 1, float(loss), state if may_end else None, cfg.learning_rate)
        if step + 1 < cfg.steps or not cfg.max_steps:
            continue
        drawn_by = Setup(run, task, policy, state.params, prompts, tx)
        samples = draw_samples(drawn_by, checked, "check", CHECK_SAMPLES)
        accepted, words = task.accepts_warm_up([answer for one in samples for answer in one.answer])
        display.note(f"warm-up step {step + 1}: {words}")
        if accepted:
            return state.params
    if cfg.max_steps:
        raise ValueError(
            f"warmup.max_steps={cfg.max_steps} passed, and at the last check the task did not accept the samples "
            f"({words}): raise max_steps, change what the task accepts, or change the seed"
        )
    return state.params


def measure(run: LanguageRun, samples_p: Sequence[PromptSamples], task: Task) -> dict[str, Any]:
    """What is known of the reference before training, as written to reference.json.

    Samples of it, under every prompt, give the share of completions with an answer; where all prompts have one declared
    set of answers, their counts with Wilson's 95 % intervals; then where the objective leads, and whether that is a
    collapse.
    """
    total = sum(len(samples.answer) for samples in samples_p)
    answered = sum(name is not None for samples in samples_p for name in samples.answer)
    objective = objective_of(run.algorithm)
    measured = {
        "samples": total,
        "valid": answered / total,
        "answers": None,
        "objective": describe_run(run, task),
        "optimum": {},
        "collapse": _collapse(run, samples_p, task),
        "text": [samples.text[:8] for samples in samples_p],
        "measured": _metrics(samples_p),
    }
    answers = common_answers(task)
    if answers is None:
        return measured
    counts = [sum(name == one for samples in samples_p for one in samples.answer) for name in answers]
    known = forecast.Task(answers, task.answers_have_equally_many_strings)
    return measured | {
        "answers": list(answers),
        "counts": counts,
        "interval": [[float(end) for end in augment.wilson_interval(jnp.float32(n), total)] for n in counts],
        "optimum": forecast.optima(objective, [samples.indexed(answers) for samples in samples_p], known),
    }


def unmeasured(run: LanguageRun, task: Task) -> dict[str, Any]:
    """reference.json of a run whose reference policy is not sampled before training."""
    sentence = describe_run(run, task)
    return {"samples": 0, "valid": None, "answers": None, "objective": sentence, "optimum": {}, "collapse": None}


def common_answers(task: Task) -> tuple[str, ...] | None:
    """The complete set of answers that all prompts of a task share; None where they do not, or are many prompts."""
    if len(task) > config.FEW_PROMPTS:
        return None
    sets = {task.answer_set(number) for number in range(len(task))}
    return sets.pop() if len(sets) == 1 else None


def answers_of(task: Task, number: int, samples: PromptSamples) -> tuple[str, ...]:
    """The answers of a prompt: all of them where the task declares them, else those that samples gave."""
    declared = task.answer_set(number)
    return tuple(dict.fromkeys(name for name in samples.answer if name is not None)) if declared is None else declared


def _collapse(run: LanguageRun, samples_p: Sequence[PromptSamples], task: Task) -> dict[str, Any] | None:
    """The worst collapse at the optimum over the prompts, see `forecast.collapse_at_optimum`; None without one."""
    objective, key, collapses = objective_of(run.algorithm), stream(run.seed, "bootstrap"), []
    if method_rules.forecast_method(run.algorithm) is None:
        return None
    for number, samples in enumerate(samples_p):
        answers = answers_of(task, number, samples)
        known = forecast.Task(answers, task.answers_have_equally_many_strings)
        collapse = forecast.collapse_at_optimum(objective, [samples.indexed(answers)], known, key=key)
        collapses += [] if collapse is None else [collapse]
    if not collapses:
        return None
    return max(collapses, key=lambda one: one["share"]) | {"prompts": len(samples_p), "collapsing": len(collapses)}


def log_optimum(
    algorithm: Algorithm, samples: PromptSamples, answers: tuple[str, ...], task: Task
) -> list[float] | None:
    """Log-probs (nats) of each answer, then of none, at the optimum under one prompt; None where it is not known."""
    if method_rules.forecast_method(algorithm) is None:
        return None
    known = forecast.Task(answers, task.answers_have_equally_many_strings)
    log_mass_c = forecast.class_log_mass(objective_of(algorithm), [samples.indexed(answers)], known)
    return None if log_mass_c is None else log_mass_c.tolist()


def _metrics(samples_p: Sequence[PromptSamples]) -> dict[str, float | None]:
    """The metrics of a run that samples of the reference policy have, under the same names."""
    counts = {p: collections.Counter(samples.answer) for p, samples in enumerate(samples_p)}
    of_answers = group_metrics.of_window({p: dict(counted) for p, counted in counts.items()})
    answered = [answer is not None for samples in samples_p for answer in samples.answer]
    reward = float(np.mean([samples.reward for samples in samples_p]))
    known = {"reward/mean": reward, "valid/fraction": float(np.mean(answered)), "kl/reverse": 0.0}
    return known | of_answers | {"answers/distinct": None}  # of a group, whose size is another


def describe_run(run: LanguageRun, task: Task) -> str:
    """`describe`, with what a run changes in it by leaving out completions or groups."""
    return "; ".join([describe(run.algorithm), *left_out(run, task.leaves_out_truncated)])


def left_out(run: LanguageRun, truncated: bool) -> list[str]:
    """What leaving out truncated completions, and groups of equal rewards, changes in an objective."""
    words = []
    if truncated:
        words.append(
            "truncated completions are left out, so that it is the objective of finished ones: E[R | finished] and the "
            "KL between pi(. | finished) and ref(. | finished)"
        )
    if run.rollout.equal_groups in ("redraw", "replace"):
        words.append(
            f"groups of equal rewards are left out (rollout.equal_groups={run.rollout.equal_groups}), so that a prompt "
            "weighs as often as its groups are mixed, and the optimum is not exactly the one stated"
        )
    return words


def describe(algorithm: Algorithm) -> str:
    """A sentence that says what a configuration really optimises and, where it is known, its optimum."""
    known = method_rules.forecast_method(algorithm) and method_rules.rows(algorithm)[1].placements
    return forecast.describe(objective_of(algorithm)) if known else method_rules.describe(algorithm)


def objective_of(algorithm: Algorithm) -> forecast.Objective:
    """The objective of a configuration, as core.forecast takes it; vanilla's where it knows no other optimum."""
    method = method_rules.forecast_method(algorithm) or "vanilla"
    return forecast.Objective(method, algorithm.kl, algorithm.beta, algorithm.threshold)
