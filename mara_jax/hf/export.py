"""Write a model as a directory that Hugging Face transformers loads."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.hf import export_check, export_files
from mara_jax.hf.tensors import DTYPES
from mara_jax.parallel import hosts
from mara_jax.policies import lora, parameters
from mara_jax.policies.parameters import Row
from mara_jax.policies.policy import Policy

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def rows_with_dtypes(rows: Sequence[Row], layers: int, params: Any, dtype: str | None) -> list[tuple[Row, str]]:
    """The rows of a table with the dtype each is written in; ValueError where params are not exactly these rows."""
    shapes = parameters.shapes_of(rows, layers)
    leaves: dict[tuple[str, ...], Any] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, key))
            else:
                leaves[(*path, key)] = value

    walk(params, ())
    for path in sorted(leaves.keys() ^ shapes.keys()):
        state = "lack" if path in shapes else "have the unexpected"
        raise ValueError(f"the parameters {state} {'/'.join(path)}: they must be those of the policy's architecture")
    for path, (shape, _) in shapes.items():
        if tuple(leaves[path].shape) != shape:
            raise ValueError(
                f"{'/'.join(path)} has shape {list(leaves[path].shape)}, expected {list(shape)}: the "
                "parameters must be those of the policy's architecture"
            )
    dtypes = {path: dtype or str(leaf.dtype) for path, leaf in leaves.items()}
    for path, name in dtypes.items():
        if name not in _STORED:
            raise ValueError(f"{'/'.join(path)} would be written in {name}: use one of {', '.join(_STORED)}")
    return [(row, dtypes[row.path]) for row in rows]


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    """The largest magnitude, NaN where there is one; without a copy, which abs would be."""
    return jnp.maximum(jnp.max(x), -jnp.min(x))


def check_finite(rows: Iterable[tuple[Row, str]], params: Any) -> None:
    """Refuses, on all processes alike and before anything is written, values that are not finite in the dtype written.

    Raises:
      ValueError: one line with the tensor's name.
    """
    # One array after another: a program of all would hold a copy of the model.
    largest = jax.tree.map(lambda x: jax.device_get(_largest(x)), params)
    for row, dtype in rows:
        if _fits(parameters.at(largest, row.path), dtype):
            continue
        value = float(jnp.max(jnp.abs(parameters.read(params, row))))  # of several layers' array, this layer's
        if not np.isfinite(value):
            raise ValueError(f"{row.name} holds NaN or infinity: export an earlier checkpoint")
        if not _fits(value, dtype):
            raise ValueError(f"{row.name} holds {value:.3g}, which is infinity in {dtype}: write dtype='bfloat16'")


def _fits(value: Any, dtype: str) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(value).astype(DTYPES[dtype]).astype(np.float32)))


def _size(row: Row, dtype: str) -> int:
    return int(np.prod(row.shape)) * DTYPES[dtype].itemsize


def _shards(rows: list[tuple[Row, str]], limit: int) -> list[list[tuple[Row, str]]]:
    """Cut the rows, in order, into files of at most `limit` bytes (a single tensor may be larger)."""
    shards: list[list[tuple[Row, str]]] = [[]]
    room = limit
    for row, dtype in rows:
        size = _size(row, dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((row, dtype))
        room -= size
    return shards


def write_safetensors(file: Path, rows: Iterable[tuple[Row, str]], params: Any) -> dict[str, int]:
    """One safetensors file, a tensor in host memory at a time (the package's writer wants them all).

    Returns:
      The checksum of each tensor, as `export_check` compares it.
    """
    rows = list(rows)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for row, dtype in rows:
        end = offset + _size(row, dtype)
        header[row.name] = {
            "dtype": _STORED[dtype],
            "shape": list(row.stored_shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums: dict[str, int] = {}
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for row, dtype in rows:
            array = hosts.gather(parameters.read(params, row))
            array = array.T if row.transpose else array
            array = np.ascontiguousarray(array, dtype=DTYPES[dtype])
            sums[row.name] = export_check.checksum(array)
            # As bytes, which need no copy: bfloat16 has no buffer that Python knows.
            stream.write(array.reshape(-1).view(np.uint8).data)
    return sums


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(directory: Path, rows: list[tuple[Row, str]], params: Any, limit: int) -> dict[str, int]:
    shards = _shards(rows, limit)
    if len(shards) == 1:
        return write_safetensors(directory / "model.safetensors", shards[0], params)
    weight_map, sums = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sums |= write_safetensors(directory / name, shard, params)
        weight_map |= {row.name: name for row, _ in shard}
    total = sum(_size(row, dtype) for row, dtype in rows)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    return sums


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; FileExistsError where that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: choose another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp makes it private
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def another_process_writes(rows: Iterable[tuple[Row, str]], params: Any) -> bool:
    """Whether process 0, not this one, writes; this one has then taken part in gathering each tensor for it."""
    if hosts.is_process_zero():
        return False
    for row, _ in rows:
        hosts.gather(parameters.read(params, row))
    hosts.barrier("export")
    return True


def export(
    policy: Policy,
    params: Any,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write config, weights and tokenizer so that AutoModelForCausalLM and AutoTokenizer of transformers 4 and 5 load
    them, as vLLM and llama.cpp's converter do; a reward model so that AutoModelForSequenceClassification does.

    Everything is written to a temporary directory beside `out`, read back and compared (see `export_check`), and
    renamed at the end, so that `out` is never half there. Of several processes, all of which call this, process 0
    writes.

    args: policy; params: of the policy's architecture, unrolled or scanned, an adapter attached or not: it is merged
        into its kernels; out: a path that does not exist,
        or an empty directory; dtype: 'float32', 'bfloat16' or 'float16', by default each parameter's own;
        max_shard_bytes: of one file.
    returns: the path written.
    errors: FileExistsError where `out` holds something; ValueError where params are not the architecture's, or not
        finite in the dtype that they are written in, or where what was written reads back differently.
    """
    arch, out, params = policy.architecture, Path(out), lora.merged(params)
    rows = rows_with_dtypes(parameters.table(arch), arch.layers, params, dtype)
    check_finite(rows, params)
    if another_process_writes(rows, params):
        return out
    with atomic_directory(out) as building:
        write_json(building / "config.json", export_files.config(policy, rows[0][1]))
        write_json(building / "generation_config.json", export_files.generation(policy))
        written = _write_weights(building, rows, params, max_shard_bytes)
        if policy.tokenizer is not None:
            export_files.write_tokenizer(policy.tokenizer, building)
        with export_check.refusals(out):
            export_check.check(policy, rows, params, written, building)
    hosts.barrier("export")
    return out
