"""What a run does about a value that is not finite: it stops in one line, or goes on without the step's update."""

import pathlib
from typing import Any

import jax
import numpy as np

from mara_jax.parallel import hosts
from mara_jax.sampling import rollout
from mara_jax.train import finite, strict_json
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.setup import Setup
from mara_jax.train.state import State

FOLDER = "nonfinite"  # below the run directory: the batches at which runs stopped
CURE = "lower optimiser.learning_rate or set optimiser.max_grad_norm in a new workdir"


class NonFiniteError(ValueError):
    """A value of a step, or of the state, is NaN or infinite."""


class Guard:
    """Looks at every step's row before it is written, and at every state before it is saved.

    All numbers that it looks at are the same on every process, so that all of them stop at the same step.

    in_a_row: updates skipped one after another up to the last row, those before a resume among them.
    """

    def __init__(self, setup: Setup, workdir: pathlib.Path, rows: list[dict[str, Any]], checkpoints: Checkpoints):
        self.setup, self.workdir, self.checkpoints = setup, workdir, checkpoints
        self.in_a_row = hosts.on_process_zero(lambda: skipped_in_a_row(rows))

    def check_row(self, row: dict[str, Any], ids: np.ndarray, completions: rollout.Rollout, scores: Any) -> str | None:
        """Refuses a step whose numbers are not finite; returns a line to show where its update was skipped.

        Raises:
          NonFiniteError (on several processes `hosts.SharedError`): one line; the step's batch is saved.
        """
        cfg, what = self.setup.cfg, finite.first_nonfinite(row)
        if what is None and not row.get("guard/skipped"):
            self.in_a_row = 0
            return None
        what = what or "a parameter after the update"
        self.in_a_row += 1
        # What the sampler recorded depends on the weights alone, which a skipped update leaves as they are.
        heals = what != finite.SUMMARIES["sampler/logp_gap"]
        if cfg.guard == "skip" and heals and self.in_a_row < cfg.guard_limit:
            return f"WARNING: step {row['step']}: {what} is not finite, and its update was skipped (guard=skip)"
        skipped = cfg.guard == "skip" and heals
        many = f"{self.in_a_row} updates in a row were skipped, guard_limit={cfg.guard_limit}; " * skipped
        cure = CURE if cfg.guard == "skip" else f"{CURE}, or pass over such steps with --config.guard=skip"
        saved = self._save(row, what, ids, completions, scores)
        place = _place(ids, completions.logp) if what == finite.SUMMARIES["sampler/logp_gap"] else ""
        self._stop(f"step {row['step']}: {what}{place} is not finite; {many}the batch is in {saved}", cure)
        return None

    def check_saved(self, step: int, state: State, hidden: Any) -> None:
        """Refuses to save a state that is not finite, or a policy whose numbers are not; errors as of `check_row`.

        hidden: of the policy after the update, on the step's completions.
        """
        self.check_state(step, state)
        if not finite.all_finite(hidden):
            self._stop(
                f"step {step}: the policy after the update gives values that are not finite, and is not saved", CURE
            )

    def check_state(self, step: int, state: State) -> None:
        """Refuses to go on from a state that is not finite; errors as of `check_row`."""
        name = finite.nonfinite_array(state)
        if name is None:
            return
        kept = self.checkpoints.latest()
        if step == kept:
            cure = "delete that folder to resume from an earlier one, or start again in a new workdir"
            _raise(
                f"checkpoint {self.checkpoints.directory / str(step)}: {name} holds values that are not finite: {cure}"
            )
        if step == 0:
            _raise(f"the weights to start from hold values in {name} that are not finite: choose other policy.weights")
        self._stop(f"step {step}: {name} after the update is not finite, and is not saved", CURE)

    def _stop(self, what: str, cure: str) -> None:
        self.checkpoints.manager.wait_until_finished()
        kept = self.checkpoints.latest()
        good = (
            "there is no checkpoint yet"
            if kept is None
            else f"the newest good checkpoint is {self.checkpoints.directory / str(kept)}"
        )
        _raise(f"{what}; {good}: {cure}")

    def _save(self, row: dict[str, Any], what: str, ids: np.ndarray, completions: rollout.Rollout, scores: Any) -> str:
        """Writes the step's completions, and returns where."""
        tokens, logp, lengths, finished = (
            hosts.gather(x) for x in (completions.tokens, completions.logp, completions.lengths, completions.finished)
        )
        text = rollout.whole_text(self.setup.policy, completions)
        path = self.workdir / FOLDER / f"step_{row['step']}.json"
        rows = [
            {
                "prompt_id": int(number), "sample": j, "completion": text[i][j], "reward": float(scores.reward[i, j]),
                "answer": scores.answer[i][j], "finished": bool(finished[i, j]),
                "logp": logp[i, j, : lengths[i, j]].tolist(), "tokens": tokens[i, j, : lengths[i, j]].tolist(),
            }
            for i, number in enumerate(ids) for j in range(lengths.shape[1])
        ]  # fmt: skip
        prompts = {int(number): self.setup.task.prompt(int(number)) for number in ids}
        values = {name: row[name] for name in row if isinstance(row[name], float) and not name.startswith("time/")}
        content = {"step": row["step"], "not_finite": what, "metrics": values, "prompts": prompts, "completions": rows}

        def write() -> str:
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_text(strict_json.text(content, indent=1) + "\n")
            except OSError as error:
                return f"no file ({error.strerror or error})"
            return str(path)

        return hosts.on_process_zero(write)


def _raise(message: str) -> None:
    hosts.raise_as_one(NonFiniteError(message))


def _place(ids: np.ndarray, logp: jax.Array) -> str:
    """Which completion has the first log-prob that is not finite."""
    at = np.argwhere(~np.isfinite(hosts.gather(logp)))
    if not len(at):
        return ""
    prompt, sample, token = at[0].tolist()
    return f" (prompt {int(ids[prompt])}, sample {sample}, token {token})"


def skipped_in_a_row(rows: list[dict[str, Any]]) -> int:
    """How many of the last steps had their update skipped."""
    count = 0
    while count < len(rows) and rows[-1 - count].get("guard/skipped"):
        count += 1
    return count


def skipped_note(rows: list[dict[str, Any]]) -> str | None:
    """A line for the end of a run; None where no update was skipped."""
    count = sum(bool(row.get("guard/skipped")) for row in rows)
    return (
        f"guard=skip: {count} of {len(rows)} updates were skipped (guard/skipped in metrics.jsonl)" if count else None
    )
