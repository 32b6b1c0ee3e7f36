"""Every export is read back, and compared with what was to be written, before it gets its name."""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mara_jax.hf.architecture import architecture
from mara_jax.hf.files import read_config, read_json, weight_files
from mara_jax.hf.load import make_policy
from mara_jax.hf.tensors import DTYPES, SafeTensors, Tensors, read_params
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import parameters, scores
from mara_jax.policies.parameters import Row
from mara_jax.policies.policy import Policy

# Parameters up to which logits are compared too: two more copies of the model are then in memory, in float32.
FEW = 200_000_000
TOLERANCE = 1e-5  # of logits, as a share of the largest
_TEXTS = ("Two primes: 7, 11.\n", " It's  12€ é 日本")
_TOKENS = 8


def check(policy: Policy, rows: list[tuple[Row, str]], params: Any, written: dict[str, int], directory: Path) -> None:
    """Compares an export with its policy: architecture, end tokens, ids of texts, every tensor, and logits.

    Tensors are read one at a time. Logits are compared where the model is small and lies on one device.

    Args:
      rows: of the parameter table, with the dtype each was written in.
      params: the parameters, without an adapter.
      written: the checksum of each tensor as it was written.
      directory: what was written.

    Raises:
      ValueError: something differs; the line names it.
    """
    again = _read(policy, directory)
    for field in dataclasses.fields(again.architecture):
        ours, theirs = (getattr(one.architecture, field.name) for one in (policy, again))
        if ours != theirs and field.name not in ("lora", "without_token"):
            raise ValueError(f"{field.name} was {ours!r} and is {theirs!r}")
    if policy.eos_ids and again.eos_ids != policy.eos_ids:
        raise ValueError(f"the end tokens were {list(policy.eos_ids)} and are {list(again.eos_ids)}")
    _check_tokenizer(policy.tokenizer, again.tokenizer)
    tensors = SafeTensors(str(directory), weight_files(directory))
    check_tensors(rows, written, tensors)
    small = parameters.count(policy.architecture) <= FEW
    if small and sharding.current() is None and not hosts.several_processes():
        _check_logits(policy, rows, params, tensors)


@contextmanager
def refusals(out: Path) -> Iterator[None]:
    """One line that names the export for what `check` and `check_tensors` raise."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{out} reads back differently from what was written, so it is not kept: {error}") from None


def _read(policy: Policy, directory: Path) -> Policy:
    """The policy that a directory describes, computed with as the given one; its weights are not read."""
    choices = {
        name: getattr(policy.architecture, name)
        for name in ("scan_layers", "compute_dtype", "remat", "attention", "score_head")
    }
    config, tokenizer = read_config(directory), None
    if policy.tokenizer is not None:
        from mara_jax.hf.tokenizer import from_directory

        tokenizer = from_directory(directory)
    arch = architecture(config, str(directory), **choices)
    return make_policy(arch, tokenizer, read_json(directory / "generation_config.json"), config, str(directory))


def _check_tokenizer(ours: Any, theirs: Any) -> None:
    if ours is None:
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(f"{name} was {getattr(ours, name)} and is {getattr(theirs, name)}")
    templates = [str(one.chat_template).replace("\r\n", "\n") for one in (ours, theirs)]  # as Python reads a file
    if templates[0] != templates[1]:
        raise ValueError("the chat template changed")
    for text in _TEXTS:
        before, after = (one(text).input_ids for one in (ours, theirs))
        if before != after:
            raise ValueError(f"the tokens of {text!r} were {before} and are {after}")


def check_tensors(rows: list[tuple[Row, str]], written: dict[str, int], tensors: SafeTensors) -> None:
    """That each tensor on the disk is the one that was written; errors as of `check`."""
    for row, dtype in rows:
        array = tensors.read(row.name)
        same = array.shape == row.stored_shape and array.dtype == DTYPES[dtype]
        if not same or checksum(array) != written[row.name]:
            raise ValueError(f"{row.name} on the disk is not what was written")


def checksum(array: np.ndarray) -> int:
    """Of a tensor's bytes."""
    # As bytes, which need no copy: bfloat16 has no buffer that Python knows.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _check_logits(policy: Policy, rows: list[tuple[Row, str]], params: Any, tensors: Tensors) -> None:
    """Both models in float32, ours rounded as it was written: nothing but an error sets them apart."""
    dtypes = {row.path: dtype for row, dtype in rows}
    rounded: dict[str, Any] = {}
    for path, dtype in dtypes.items():
        array = np.asarray(parameters.at(params, path)).astype(DTYPES[dtype]).astype(np.float32)
        parameters.put(rounded, path, jnp.asarray(array))
    plain = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=None))
    arch = plain.architecture
    vocab = arch.vocab_size
    ids, count = (np.arange(_TOKENS) * vocab // _TOKENS)[None], np.array([_TOKENS])
    outputs = functools.partial(scores.compiled_scores, arch) if arch.score_head else plain.logits
    ours = np.asarray(outputs(rounded, ids, count))
    theirs = np.asarray(outputs(read_params(arch, tensors, "float32"), ids, count))
    if not np.isfinite(ours).all():
        raise ValueError("the parameters give logits that are not finite, before anything was written")
    gap, most = np.max(np.abs(ours - theirs)), TOLERANCE * np.max(np.abs(ours))
    if not gap <= most:
        raise ValueError(f"logits differ by {gap:.3g}, more than {most:.3g}")
