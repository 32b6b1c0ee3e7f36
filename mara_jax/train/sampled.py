"""A policy to sample from, by name, for commands: a model or an adapter upon its base, and how prompts reach it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.hf.load import read_json
from mara_jax.policies import encoding, lora
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Prompt
from mara_jax.train import adapter, checkpoint, prompts, trained
from mara_jax.train import workdir as workdirs

CHAT = ("auto", "yes", "no")  # whether prompts stand in the chat template; auto: where there is one


class Sampled(NamedTuple):
    """A policy with its parameters; chat: whether its prompts stand in the chat template."""

    policy: Policy
    params: Any
    chat: bool

    def encode(self, texts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """The tokens of prompts.

        Raises:
          ValueError: no completion of that length fits behind one of them.
        """
        rows, most = encoding.encode_prompts(self.policy.tokenizer, texts, self.chat), self.policy.architecture
        for ids in rows:
            total = len(ids) + max_new_tokens
            if total > most.max_positions:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens and --max_new_tokens={max_new_tokens} make {total}, but "
                    f"{self.policy.source} has {most.max_positions} positions: shorten one of them"
                )
        return rows

    def warning(self) -> str | None:
        """A line where nothing ends a completion."""
        return None if self.policy.eos_ids else prompts.endings(self.policy, self.chat)


def load(where: str, chat: str) -> Sampled:
    """A model, an adapter upon the model that it names, or the policy of a run.

    Args:
      where: as `hf.load` takes it, the directory of an adapter, WORKDIR of a run (the policy that it left, or its
        newest checkpoint where it has not ended) or WORKDIR/checkpoints/STEP; chat: one of CHAT.

    Raises:
      ValueError, FileNotFoundError: as of `hf.load` and `hf.load_adapter`; weights without a tokenizer; a run without
        a checkpoint.
    """
    path = Path(where)
    workdir, step = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "")
    if _is_run(workdir):
        run = workdirs.read_run(workdir, "--weights")
        policy, params = _of_run(run, workdir, step)
        chat = chat if chat != "auto" or run.policy.chat else "no"  # as it was trained
    else:
        policy, params = _of_files(where)
    if policy.tokenizer is None:
        raise ValueError(f"{policy.source} has no tokenizer: put its tokenizer.json beside the weights")
    in_template = chat == "yes" or (chat == "auto" and policy.tokenizer.chat_template is not None)
    return Sampled(prompts.ended_by_turns(policy, in_template), params, in_template)


def _of_files(where: str) -> tuple[Policy, Any]:
    config = Path(where) / "adapter_config.json"
    return _adapted(config) if config.is_file() else hf.load(where)


def _of_run(run: LanguageRun, workdir: Path, step: str) -> tuple[Policy, Any]:
    left = workdir / (adapter.NAME if run.lora.rank else trained.MODEL)
    if not step and left.is_dir():
        return _of_files(str(left))
    if step and not step.isdecimal():
        raise ValueError(f"{workdir}/checkpoints/{step} is no checkpoint: name WORKDIR/checkpoints/STEP, or WORKDIR")
    return trained.at_checkpoint(run, workdir, checkpoint.step_to_read(workdir, int(step) if step else None))


def _is_run(path: Path) -> bool:
    """Whether this is the folder of a run, or of a population: its config.json is not a model's."""
    config = path / "config.json"
    return config.is_file() and "algorithm" in read_json(config)


def _adapted(config: Path) -> tuple[Policy, Any]:
    base = read_json(config).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config} does not name its base model: add base_model_name_or_path")
    policy, params = hf.load(str(base))
    policy, adapter = hf.load_adapter(policy, config.parent)
    return policy, lora.attached(policy.architecture, params, adapter)
