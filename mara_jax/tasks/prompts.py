"""A file of prompts with reward and answer functions of the user's own."""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mara_jax import config
from mara_jax.config import limits, setting
from mara_jax.tasks import functions, prompt_file
from mara_jax.tasks.base import Context, LearnedReward, Prompt, Score, Task, TaskError
from mara_jax.tasks.calls import Calls, Outcome
from mara_jax.tasks.checked import is_number

_OF_REWARDS = ("prompts", "completions", "step", "ref_logp")  # what functions are always given, beside columns
_OF_ANSWERS = ("prompt", "completion")
LEARNED = "reward_model"  # its name beside those of functions
LARGEST_REWARD = 1e6  # beyond it squares and gradients leave float32
TRUNCATED = ("score", "zero", "mask")
FAILURE = ("stop", "value")
NARROW_OR_NOT = ("float32", "bfloat16")
FORMS = ("score", "probability")


@dataclass(frozen=True)
class Config(config.Task):
    """A file of prompts, a function that scores completions, and one that says which answer a completion gives."""

    module: str = config.task_module(__name__)
    prompts: str = setting("", "a .jsonl, .csv or .parquet file with a column `prompt`, or a saved dataset's directory")
    reward: str = setting("", "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION; several, separated by commas, are added")
    reward_model: str = setting("", "directory of a reward model, whose score is added; alone where reward is empty")
    reward_weights: str = setting("", "of several reward functions, separated by commas; empty: 1 each")
    reward_model_form: str = setting(
        "score",
        "its score as it is, or 1 / (1 + exp(-score)), the probability that it is preferred to a completion of score "
        "0, for methods that multiply or divide rewards",
        FORMS,
    )
    reward_model_weight: float = setting(1.0, "what its score is multiplied with, in that form", limits.REWARD)
    reward_model_dtype: str = setting("float32", "of its matmuls: bfloat16 on accelerators", NARROW_OR_NOT)
    answer: str = setting("", "FILE.py:FUNCTION that names a completion's answer; empty: its text is the answer")
    demonstrations: str = setting("", "a file of prompts with completions, for the warm-up; empty: those of `prompts`")
    truncated: str = setting(
        "score",
        "completions cut at rollout.max_new_tokens are scored like others, have reward zero and no answer, or, beyond "
        "that, are left out of the update (mask)",
        TRUNCATED,
    )
    failure: str = setting(
        "stop", "where a function fails at a completion: stop the run, or give the completion a value", FAILURE
    )
    failure_value: float = setting(0.0, "the reward of a completion at which a function failed", limits.REWARD)
    time_limit: float = setting(60.0, "seconds for a call of a function, after which it has failed", limits.POSITIVE)
    memory_limit: float = setting(8.0, "GiB of memory that a process of `workers` may allocate", limits.POSITIVE)
    workers: int = setting(1, "processes that call the functions, each with whole groups of completions", limits.COUNT)


class Prompts(Task):
    """The prompts of a file; rewards are weighted sums of what the functions say."""

    name = "prompts"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.leaves_out_truncated = cfg.truncated == "mask"
        if not cfg.prompts or not (cfg.reward or cfg.reward_model):
            missing = "prompts" if not cfg.prompts else "reward"
            example = {"prompts": "prompts.jsonl", "reward": "rewards.py:correct"}[missing]
            raise TaskError(f"task.{missing} is empty: set --config.task.{missing}={example}")
        self.rows = prompt_file.read(cfg.prompts)
        self.shown = prompt_file.read(cfg.demonstrations) if cfg.demonstrations else self.rows
        self.rewards = _weights(cfg)
        if cfg.reward_model:
            self.learned_reward = LearnedReward(cfg.reward_model, cfg.reward_model_dtype)
        names = [*self.rewards, *filter(None, [cfg.answer])]
        self.calls = Calls(names, cfg.workers, cfg.time_limit, cfg.memory_limit, cfg.failure == "stop")
        weakref.finalize(self, self.calls.close)
        for name, needed in self.calls.needed.items():
            given = _OF_REWARDS if name in self.rewards else _OF_ANSWERS
            functions.check_arguments(name, needed, given, self._others())
            for column in needed:
                self._check_column(name, column)
        self.reads_ref_logp = any("ref_logp" in self.calls.named[name] for name in self.rewards)
        clash = [name for name in self._others() if name in ("step", "ref_logp")]
        if clash:
            raise TaskError(f"{self.rows.path} has a column {clash[0]!r}, which rewards have from the run: rename it")

    def _check_column(self, function: str, column: str) -> None:
        """Refuses rows without a column that a function needs; null is a value like any other."""
        lacking = self.rows.lacking.get(column)
        if lacking:
            count, first = lacking
            raise TaskError(
                f"{self.rows.where(first)}: it has no {column!r}, which {function} wants, as {count} of "
                f"{len(self.rows)} rows: add it to them (null, if there is none), or give the argument a default"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, index: int) -> Prompt:
        """The text or the chat messages of a row."""
        return self.rows[index]["prompt"]

    def files(self) -> list[str]:
        """The prompt file or the files of a saved dataset, and those of other demonstrations."""
        paths = dict.fromkeys((self.rows.path, self.shown.path))
        return [str(file) for path in paths for file in (sorted(path.glob("*.arrow")) if path.is_dir() else [path])]

    def code_files(self) -> list[str]:
        """The files that define the functions."""
        return [*self.calls.files]

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[Prompt, str]]:
        """Completions of rows that have any, drawn at random; none where the prompt file has no such column.

        Raises:
          TaskError: no row has one, or the file named for its demonstrations has no such column.
        """
        if "completion" not in self.shown.columns:
            if self.cfg.demonstrations:
                raise TaskError(f"{self.shown.path} has no column 'completion': task.demonstrations needs it")
            return []
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
        pairs = []
        for _ in range(batch):
            row = self._demonstration(int(random.integers(len(self.shown))))
            known = row["completion"] if isinstance(row["completion"], list) else [row["completion"]]
            pairs.append((row["prompt"], known[int(random.integers(len(known)))]))
        return pairs

    def _demonstration(self, number: int) -> prompt_file.Row:
        """The first row from this one on that has a completion."""
        for offset in range(len(self.shown)):
            row = self.shown[(number + offset) % len(self.shown)]
            if row.get("completion") is not None:
                return row
        raise TaskError(f"no row of {self.shown.path} has a completion: give some, or set warmup.steps=0")

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """As `score_in_run`, outside of a run."""
        return self.score_in_run(prompt_index, texts, finished, Context())

    def score_in_run(
        self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool], context: Context
    ) -> Score:
        """Rewards and answers by the functions, in their processes."""
        if self.reads_ref_logp and context.ref_logp is None:
            raise TaskError(
                f"{self.cfg.reward} reads ref_logp, which is known in training alone: name another reward here"
            )
        if self.learned_reward is not None and context.learned is None:
            raise TaskError(f"task.reward_model={self.cfg.reward_model} has scored nothing: score through a run")
        rows = [self.rows[index] for index in prompt_index]
        values: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in self._others()}
        prompts = [row["prompt"] for row in rows]
        values |= {"prompts": prompts, "completions": [_completion(*pair) for pair in zip(prompts, texts, strict=True)]}
        of_run = {"step": [context.step] * len(texts)} | (
            {} if context.ref_logp is None else {"ref_logp": context.ref_logp}
        )
        said: dict[str, Sequence[Outcome]] = {
            name: self.calls.of("reward", name, values | of_run, prompt_index) for name in self.rewards
        }
        if self.learned_reward is not None:
            said[LEARNED] = [_learned(self.cfg.reward_model, score) for score in context.learned or ()]
        answers = [Outcome(text.strip() or None) for text in texts]
        if self.cfg.answer:
            answers = self.calls.of("answer", self.cfg.answer, values, prompt_index)
        cut = [not ended and self.cfg.truncated != "score" for ended in finished]
        reward, answer, failed = [], [], []
        for row in range(len(texts)):
            try:
                value = self._reward({name: outcomes[row] for name, outcomes in said.items()})
                given = _answer(self.cfg.answer, answers[row])
                failed.append(False)
            except TaskError as error:
                if self.cfg.failure == "stop":
                    where = f"{self.rows.where(prompt_index[row])}, completion {texts[row]!r:.80}"
                    raise TaskError(
                        f"{error} ({where}): mend it, or set task.failure=value (evaluate: --failure=value)"
                    ) from None
                value, given = self.cfg.failure_value, None
                failed.append(True)
            reward.append(0.0 if cut[row] else value)
            answer.append(None if cut[row] else given)
        return Score(reward, answer, self._columns(said, failed))

    def _reward(self, said: dict[str, Outcome]) -> float:
        """The weighted sum of what the functions say of one completion; ValueError where one of them fails."""
        total, judged = 0.0, False
        for name, outcome in said.items():
            if outcome.error is not None:
                raise TaskError(outcome.error)
            value = outcome.value
            if value is None:
                continue
            if not is_number(value):
                raise TaskError(f"{name} returned {value!r:.60}: return finite numbers, or None")
            if abs(value) > LARGEST_REWARD:
                raise TaskError(f"{name} returned {value:g}: return numbers of at most {LARGEST_REWARD:g} in size")
            if name == LEARNED and self.cfg.reward_model_form == "probability":
                value = preferred(value)
            weight = self.cfg.reward_model_weight if name == LEARNED else self.rewards[name]
            total, judged = total + weight * value, True
        if not judged:
            raise TaskError(f"{', '.join(said)} returned None: at least one function must judge each completion")
        return total

    def _columns(self, said: Mapping[str, Sequence[Outcome]], failed: list[bool]) -> dict[str, list[float]]:
        """What is logged beside the rewards: each function's own, where there are several, or a reward model is one of
        them, their further columns, and where one failed."""
        columns: dict[str, list[float]] = {"failed": [float(one) for one in failed]}
        for name, outcomes in said.items():
            short = name.rpartition(":")[2]
            if len(said) > 1:
                columns[short] = [_number(outcome.value) for outcome in outcomes]
            for column in dict.fromkeys(column for outcome in outcomes for column in outcome.columns):
                columns[column] = [_number(outcome.columns.get(column)) for outcome in outcomes]
        return columns

    def _others(self) -> list[str]:
        """The columns that belong to the functions."""
        return [name for name in self.rows.columns if name not in ("prompt", "completion")]


def _completion(prompt: Any, text: str) -> Any:
    """A completion as TRL hands it to reward functions: a message where the prompt is a list of messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def preferred(score: float) -> float:
    """By Bradley and Terry, the probability that a completion is preferred to one of score 0: 1 / (1 + exp(-score))."""
    return 1 / (1 + math.exp(-score)) if score > 0 else math.exp(score) / (1 + math.exp(score))


def _learned(where: str, score: float | str) -> Outcome:
    """What the reward model said of one completion."""
    return Outcome(error=f"task.reward_model={where}: {score}") if isinstance(score, str) else Outcome(score)


def _answer(name: str, outcome: Outcome) -> str | None:
    if outcome.error is not None:
        raise TaskError(outcome.error)
    if outcome.value is not None and not isinstance(outcome.value, str):
        raise TaskError(f"{name} returned {outcome.value!r:.60}: return a text, or None")
    return outcome.value


def _number(value: Any) -> float:
    """What is logged of a value: 0 for none and for what is no number."""
    return float(value) if is_number(value) else 0.0


def _weights(cfg: Config) -> dict[str, float]:
    """The reward functions with their weights."""
    names = [name.strip() for name in cfg.reward.split(",") if name.strip()]
    given = [weight.strip() for weight in cfg.reward_weights.split(",") if weight.strip()]
    try:
        weights = [float(weight) for weight in given] or [1.0] * len(names)
    except ValueError:
        raise TaskError(f"task.reward_weights={cfg.reward_weights!r} are no numbers: write 1,.5") from None
    if len(weights) != len(names) or len(set(names)) < len(names) or not all(map(math.isfinite, weights)):
        raise TaskError(
            f"task.reward names {len(names)} functions and task.reward_weights {len(weights)} weights: give a finite "
            "weight for each function, and name each function once"
        )
    return dict(zip(names, weights, strict=True))


def make(cfg: Config) -> Prompts:
    """The task with these settings."""
    return Prompts(cfg)
