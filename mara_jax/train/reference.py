"""The reference of a run: base weights, the warm-up that teaches them the format, and what is measured of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config, hf
from mara_jax.config import Algorithm, LanguageRun
from mara_jax.core import augment, forecast
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Score, Task
from mara_jax.train import optim, placement, shape, warmup
from mara_jax.train.metrics import Display

CHECK_SAMPLES = 64  # drawn after a step of the warm-up, to see whether its ranges are met
# Random streams: each has its own key, folded from the run's seed and its place here. Append only.
STREAMS = {
    name: number
    for number, name in enumerate(("rollout", "reference", "measure", "init", "check", "bootstrap", "adapter"))
}


def stream(seed: int, name: str) -> jax.Array:
    """The key of one stream of random numbers of a run."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[name])


def load_base(run: LanguageRun, task: Task) -> tuple[Policy, Any]:
    """The policy that `policy.weights` names, before any warm-up.

    "nano" is a Qwen2-shaped model with random weights and a tokenizer of its own, made from the task's
    demonstrations; everything else goes to hf.load.
    """
    cfg = run.policy
    if cfg.weights != shape.NANO:
        return load(cfg.weights, cfg)
    demonstrations = task.demonstrations(run.seed, 0, 2000)
    texts = [text for pair in demonstrations for text in pair]
    tokenizer = tokenizers.nano(texts, shape.NANO_VOCABULARY)
    arch = shape.nano(cfg)
    ends = tokenizers.end_tokens(tokenizer)
    policy = Policy(arch, tokenizer, ends, ends[0], {}, shape.NANO)
    layout, make = sharding.current(), functools.partial(transformer.init, arch)
    if layout is not None:
        make = jax.jit(make, out_shardings=parameters.shardings(arch, layout))
    return policy, make(stream(run.seed, "init"))


def load(where: str, cfg: config.Policy) -> tuple[Policy, Any]:
    """Weights from a directory, file or hub id, computed with as the config says."""
    return hf.load(where, **shape.choices(cfg), layout=sharding.current())


def prompt_tokens(policy: Policy, task: Task, chat: bool) -> list[list[int]]:
    """Each prompt of the task as token ids, in the tokenizer's chat template where `chat` is set."""
    return tokenizers.encode_prompts(policy.tokenizer, task.prompts, chat)


@dataclasses.dataclass(frozen=True)
class Samples:
    """n scored completions of each of p prompts: reward, answer [p, n]; text, nested list; logp [p, n] (nats)."""

    reward: np.ndarray
    answer: np.ndarray
    text: list[list[str]]
    logp: np.ndarray

    @property
    def valid(self) -> float:
        """Share of completions with an answer."""
        return float(np.mean(self.answer >= 0))

    def counts(self, answers: int) -> list[int]:
        """How many completions gave each answer."""
        return [int(np.sum(self.answer == a)) for a in range(answers)]

    def by_prompt(self) -> list[forecast.Samples]:
        """The samples of each prompt, as core.forecast takes them."""
        return [forecast.Samples(*arrays) for arrays in zip(self.reward, self.answer, self.logp, strict=True)]


def score(task: Task, prompt_ids, completions: rollout.Rollout) -> Score:
    """The task's verdict on the rows of a rollout that this process holds; reward and answer as [p, g], 0 elsewhere."""
    shape, mine_b = completions.lengths.shape, hosts.local_mask(completions.lengths).ravel()
    texts = [text for group in completions.text for text in group]
    flat = hosts.raise_on_all_processes(
        lambda: task.score(
            np.repeat(prompt_ids, shape[1])[mine_b].tolist(),
            [text for text, mine in zip(texts, mine_b, strict=True) if mine],
            hosts.local_values(completions.finished).ravel()[mine_b].tolist(),
        )
    )
    reward_b, answer_b = np.zeros(mine_b.size, np.float32), np.zeros(mine_b.size, np.int32)
    reward_b[mine_b], answer_b[mine_b] = flat.reward, flat.answer
    return Score(reward_b.reshape(shape), answer_b.reshape(shape))


def draw_samples(run, policy, params, task, prompts, name: str, count: int) -> Samples:
    """`count` scored completions of each prompt from one stream, in calls of the run's own group size."""
    size = min(run.rollout.group_size, count)
    parts, logps, texts = [], [], [[] for _ in prompts]
    for first in range(0, count, size):
        completions = rollout.sample(
            policy,
            params,
            prompts,
            key=stream(run.seed, name),
            group_size=size,
            max_new_tokens=run.rollout.max_new_tokens,
            slots=run.rollout.slots,
            first_sample=first,
        )
        scored = score(task, np.arange(len(prompts)), completions)
        parts.append(Score(*(hosts.gather(hosts.shard_groups(verdict)) for verdict in scored)))
        logps.append(np.sum(np.asarray(hosts.gather(completions.logp), np.float64), axis=-1))
        for group, more in zip(texts, rollout.whole_text(policy, completions), strict=True):
            group.extend(more)
    reward, answer = (np.concatenate([getattr(x, name) for x in parts], axis=1) for name in ("reward", "answer"))
    logp = np.concatenate(logps, axis=1)
    return Samples(reward[:, :count], answer[:, :count], [group[:count] for group in texts], logp[:, :count])


def check_context(run: LanguageRun, policy: Policy, task: Task) -> None:
    """Refuses, before anything is written, prompts that cannot be encoded or leave too little of the context.

    Raises:
      ValueError: no prompt of tokens, or the longest one and its completion do not fit the positions of the model.
    """
    most, new = policy.architecture.max_positions, run.rollout.max_new_tokens
    longest = max(len(ids) for ids in prompt_tokens(policy, task, run.policy.chat))
    if longest + new > most:
        cure = f"use at most {most - longest}" if longest < most else "choose a model with a longer context"
        raise ValueError(
            f"rollout.max_new_tokens={new} after the longest prompt of {longest} tokens makes {longest + new}, but "
            f"{policy.source} has {most} positions: {cure}"
        )


def check_demonstrations(run: LanguageRun, policy: Policy, task: Task) -> None:
    """Refuses, before any training, demonstrations that do not fit the completion length or do not end a completion.

    Raises:
      ValueError: the longest one, with its end token, is longer than rollout.max_new_tokens; or the token that closes
        them is none that ends a completion.
    """
    end = policy.tokenizer.eos_token_id
    if end is None or end not in policy.eos_ids:
        names = f"is the id {end}, but completions end at" if end is not None else "is not set; completions end at"
        raise ValueError(
            f"{policy.source}: the tokenizer's eos_token, which closes the warm-up's demonstrations, {names} "
            f"{list(policy.eos_ids) or 'none'}: make eos_token in tokenizer_config.json and eos_token_id in "
            "generation_config.json the same, or set warmup.steps=0"
        )
    steps = max(run.warmup.steps, run.warmup.max_steps)
    texts = [text for step in range(steps) for _, text in task.demonstrations(run.seed, step, run.warmup.batch)]
    longest = 1 + max(len(ids) for ids in policy.tokenizer(texts, add_special_tokens=False).input_ids)
    if longest > run.rollout.max_new_tokens:
        raise ValueError(
            f"rollout.max_new_tokens={run.rollout.max_new_tokens} is too short for the warm-up's demonstrations: "
            f"the longest has {longest} tokens with its end token; use at least that"
        )


def warm_up(run: LanguageRun, policy, params, task: Task, prompts: list[list[int]], display: Display) -> Any:
    """Supervised steps on demonstrations until the format holds; returns the new params.

    At least `warmup.steps` steps. With `warmup.max_steps` above that, samples are drawn after each further step, and
    training ends at the first check whose valid share and share of the first answer both lie in their ranges.

    Raises:
      ValueError: max_steps passed without such a check.
    """
    cfg = run.warmup
    tx = optim.make(dataclasses.replace(run.optimiser, learning_rate=cfg.learning_rate, warmup_steps=0, decay_steps=0))
    state = placement.fresh(policy.architecture, params, tx)
    ids = dict(zip(task.prompts, prompts, strict=True))
    most = max(cfg.steps, cfg.max_steps)
    valid, ones = 0.0, 0.0
    for step in range(most):
        pairs = [(ids[prompt], text) for prompt, text in task.demonstrations(run.seed, step, cfg.batch)]
        batch = warmup.placed(*warmup.demonstration_batch(policy, pairs, run.rollout.max_new_tokens))
        state, loss = warmup.supervised_update(state, *batch, arch=policy.architecture, tx=tx)
        display.warm_up(step + 1, most, float(loss))
        if step + 1 < cfg.steps or not cfg.max_steps:
            continue
        samples = draw_samples(run, policy, state.params, task, prompts, "check", CHECK_SAMPLES)
        counts = samples.counts(len(task.answers))
        valid, ones = samples.valid, counts[0] / max(sum(counts), 1)
        display.note(f"warm-up step {step + 1}: {valid:.0%} valid, {ones:.0%} of them {task.answers[0]!r}")
        if _inside(valid, cfg.valid_range) and _inside(ones, cfg.ones_range):
            return state.params
    if cfg.max_steps:
        raise ValueError(
            f"warmup.max_steps={cfg.max_steps} passed with {valid:.0%} valid and {ones:.0%} {task.answers[0]!r} at the "
            f"last check, outside warmup.valid_range={cfg.valid_range} or ones_range={cfg.ones_range}: raise "
            "max_steps, widen the ranges, or change the seed"
        )
    return state.params


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def samples_to_measure(run: LanguageRun, policy, params, task: Task, prompts: list[list[int]]) -> Samples:
    """The completions of the reference that a run is measured by: a function of its weights and the seed."""
    return draw_samples(run, policy, params, task, prompts, "measure", run.warmup.measure_samples)


def sample_rows(samples: Samples, answers: tuple[str, ...]) -> list[dict[str, Any]]:
    """The samples as rows, for reference_samples.jsonl: prompt, ref_logp (nats), reward, answer or None, text."""
    return [
        {
            "prompt": p,
            "ref_logp": float(samples.logp[p, i]),
            "reward": float(samples.reward[p, i]),
            "answer": answers[samples.answer[p, i]] if samples.answer[p, i] >= 0 else None,
            "text": text,
        }
        for p, texts in enumerate(samples.text)
        for i, text in enumerate(texts)
    ]


def measure(run: LanguageRun, samples: Samples, task: Task) -> dict[str, Any]:
    """What is known of the reference before training, as written to reference.json.

    Samples of it give the share of valid completions, the count of each answer with Wilson's 95 %
    interval, and log Z (log M for the forward KL) of each answer per prompt, which MARA over answers uses;
    then where the objective leads, and whether that is a collapse.
    """
    counts = samples.counts(len(task.answers))
    reward_pn, answer_pn = jnp.asarray(samples.reward), jnp.asarray(samples.answer)
    algorithm, answers = run.algorithm, len(task.answers)
    beta = max(algorithm.beta, forecast.LEAST_BETA)
    log_mass_pa = augment.answer_log_mass(reward_pn, answer_pn, answers, beta, algorithm.threshold, algorithm.kl)
    total = samples.answer.size
    objective, samples_p = objective_of(algorithm), samples.by_prompt()
    answered = forecast.Task(task.answers, getattr(task, "answers_have_equally_many_strings", False))
    log_optimum_c = forecast.class_log_mass(objective, samples_p, answered)
    key = stream(run.seed, "bootstrap")
    return {
        "samples": total,
        "valid": samples.valid,
        "answers": list(task.answers),
        "counts": counts,
        "interval": [[float(end) for end in augment.wilson_interval(jnp.float32(n), total)] for n in counts],
        "log_mass": _json_numbers(np.asarray(log_mass_pa, np.float64).tolist()),
        "objective": forecast.describe(objective),
        "optimum": forecast.optima(objective, samples_p, answered),
        "log_optimum": None if log_optimum_c is None else _json_numbers(log_optimum_c.tolist()),
        "collapse": forecast.collapse_at_optimum(objective, samples_p, answered, key=key),
        "text": [group[:8] for group in samples.text],
    }


def _json_numbers(value: Any) -> Any:
    """The same with None for -inf, which JSON cannot write; train.report.read_reference reads it back."""
    if isinstance(value, list):
        return [_json_numbers(item) for item in value]
    return None if value == -np.inf else value


def objective_of(algorithm: Algorithm) -> forecast.Objective:
    """The objective of a configuration, as core.forecast takes it."""
    methods: dict[str, forecast.Method] = {"answer": "answers", "string": "strings"}
    method = "vanilla" if algorithm.method == "vanilla" else methods[algorithm.anchor]
    return forecast.Objective(method, algorithm.kl, algorithm.beta, algorithm.threshold)
