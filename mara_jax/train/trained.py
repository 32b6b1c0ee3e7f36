"""What a run leaves of its policy: WORKDIR/model, or WORKDIR/adapter where an adapter was trained."""

import dataclasses
import pathlib
import shutil
from typing import Any

from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts
from mara_jax.policies import lora
from mara_jax.policies.policy import Policy
from mara_jax.train import adapter, checkpoint, inputs, placement, reference, watchdog

MODEL = "model"  # the folder in WORKDIR


def write_end(cfg: LanguageRun, policy: Policy, params: Any, workdir: pathlib.Path) -> str:
    """Writes the policy at the end of a run, in place of what an earlier end left; returns words that say where."""
    watchdog.entered("writing of the policy")
    out = workdir / (MODEL if policy.architecture.lora is None else adapter.NAME)
    hosts.on_process_zero(lambda: shutil.rmtree(out, ignore_errors=True))
    return write(cfg, policy, params, out, workdir)


def write(cfg: LanguageRun, policy: Policy, params: Any, out: pathlib.Path, workdir: pathlib.Path) -> str:
    """Writes a policy's trained parameters as a Hugging Face directory; returns words that say where.

    Args:
      policy: as from `adapter.trained`; params: what is trained of it; out: a path that does not exist, or is empty.

    Raises:
      FileExistsError: `out` holds something.
    """
    if policy.architecture.lora is None:
        return f"model: {hf.export(policy, params, out)}   (transformers and vLLM load it)"
    base = adapter.base(cfg, workdir)
    hf.export_adapter(policy, params, out, base=base, dtype="float32")
    return f"adapter: {out}   (peft loads it beside {base})"


def check_place(out: pathlib.Path) -> None:
    """Refuses, before anything is loaded, a place that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: choose another --out, or remove it")


def policy_of(cfg: LanguageRun, workdir: pathlib.Path) -> Policy:
    """The policy of a run that has begun, without its parameters.

    Raises:
      FileNotFoundError: its warm-up has not ended.
    """
    return adapter.trained(cfg, reference_of(cfg, workdir)[0])


def at_checkpoint(cfg: LanguageRun, workdir: pathlib.Path, step: int) -> tuple[Policy, Any]:
    """The policy of a checkpoint as commands sample from it, computed in float32, with all of its parameters.

    Raises:
      FileNotFoundError, ValueError: as of `policy_of`; a checkpoint that cannot be read.
    """
    cfg = dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, compute_dtype="float32"))
    policy, ref_params = reference_of(cfg, workdir)
    policy = adapter.trained(cfg, policy)
    params = checkpoint.read_params(workdir, step, abstract_params(policy))
    return policy, lora.attached(policy.architecture, ref_params, params)


def reference_of(cfg: LanguageRun, workdir: pathlib.Path) -> tuple[Policy, Any]:
    """The reference policy of a run that has begun; errors as of `policy_of`."""
    saved = workdir / "reference"
    if cfg.warmup.steps and not saved.is_dir():
        raise FileNotFoundError(f"{saved} does not exist: the run has not finished its warm-up")
    where = str(saved) if cfg.warmup.steps else inputs.pinned(workdir, cfg)
    group = inputs.REFERENCE if cfg.warmup.steps else inputs.WEIGHTS
    inputs.check(workdir, inputs.of_files(cfg, where, group))
    return reference.load(where, cfg.policy)


def abstract_params(policy: Policy) -> Any:
    """Shapes of what is trained of a policy, a tree as `State.params`."""
    return placement.abstract_params(policy.architecture)
