"""The named tensors of a checkpoint, and the parameters read from them, one tensor at a time.

A checkpoint is a set of named tensors behind the small `Tensors` protocol. The parameter table alone says which names
and shapes it must have, and every tensor is used exactly once.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mara_jax.hf.files import refuse_pointer
from mara_jax.parallel import sharding
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture, Row

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# What a checkpoint may hold beside its weights: rotary frequencies that old Llama checkpoints store, and the
# head of a tied model, which must then equal the embedding.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq$")
_HEAD, _SCORE = "lm_head.weight", "score.weight"
# As safetensors calls the dtypes that are read, and the names that quantised weights give their parts.
_STORED = ("F32", "BF16", "F16")
_QUANTISED = re.compile(
    r".*(\.(qweight|qzeros|scales|biases|g_idx|SCB|codes|codebooks|input_scale|[kv]_scale|weight_format"
    r"|weight_(scale|zero_point|packed|shape|g_idx)\w*|absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|\.quant_state\..*)"
)


class Tensors(Protocol):
    """Named tensors of a checkpoint, under their Hugging Face names."""

    source: str

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> np.ndarray: ...
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class SafeTensors:
    """The tensors of one or several safetensors files, read on demand.

    A file is mapped into memory, and the pages that were read count as this process's memory while the file is open.
    So each file is opened for one tensor at a time; otherwise loading would take twice the size of the weights.

    Raises:
      ValueError: a file is incomplete, or two files hold the same tensor.
      FileNotFoundError: a file that the index names does not exist.
    """

    def __init__(self, source: str, files: Iterable[Path]):
        self.source = source
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is named by the index but is not there: download it as well")
            refuse_pointer(file)
            try:
                opened = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from None
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in self._file_of:
                    raise ValueError(f"{file} holds {name} a second time: keep one file for each tensor")
                stored = opened.get_slice(name)
                self._file_of[name], self._shape_of[name] = file, tuple(stored.get_shape())
                self._dtype_of[name] = stored.get_dtype()

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, F8_E4M3, ..."""
        return self._dtype_of[name]

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._file_of[name], framework="numpy") as opened:
            return opened.get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        with safe_open(self._file_of[name], framework="numpy") as opened:
            return opened.get_slice(name)[index]


def check_floats(tensors: Tensors) -> None:
    """ValueError for weights that are quantised, by the names of their parts or their dtypes, or of an unread dtype."""
    cure = "choose the model's weights in float32, bfloat16 or float16"
    for name in sorted(tensors.names()):
        if _QUANTISED.fullmatch(name):
            raise ValueError(f"{tensors.source} holds {name}, a part of quantised weights: {cure}")
        dtype = tensors.dtype(name)
        if dtype in _STORED or _DERIVED.match(name):
            continue
        if dtype == "F64":
            raise ValueError(f"{tensors.source} holds {name} in float64: write it again in float32")
        kind = {"I": "int", "U": "uint"}.get(dtype[0], dtype[0]) + dtype[1:]
        raise ValueError(f"{tensors.source} holds {name} in {kind}, so it is quantised or no weight: {cure}")


def _check_names(arch: Architecture, tensors: Tensors) -> None:
    """Every row of the table is there in its shape, and nothing else is."""
    rows = {row.name: row for row in parameters.table(arch)}
    names = set(tensors.names())
    if arch.score_head:
        _check_score_head(tensors)
    elif not arch.tie_embeddings and _HEAD not in names:
        raise ValueError(
            f"{tensors.source} lacks {_HEAD}, which config.json asks for: set tie_word_embeddings to true if the model "
            "shares its embedding with the head, or download the missing file"
        )
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


def _check_score_head(tensors: Tensors) -> None:
    """The head of a reward model is there, and scores sequences with one number."""
    if _SCORE not in set(tensors.names()):
        raise ValueError(
            f"{tensors.source} lacks {_SCORE}, the head of a reward model: choose a directory that has one, or train "
            "one from these weights with python -m mara_jax.reward_model"
        )
    labels = tensors.shape(_SCORE)[0]
    if labels != 1:
        raise ValueError(
            f"{tensors.source} holds {_SCORE} with {labels} labels, and a reward model has one: choose one with "
            "num_labels=1"
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
    return tensors.read(name) if index is None else tensors.part(name, index)


def _store(tensors: Tensors, row: Row, array: np.ndarray, slot: np.ndarray) -> None:
    """Write a tensor, or a part of one, into its place in our tree; ValueError where it is not finite there."""
    with np.errstate(over="ignore"):  # a number beyond the range becomes infinite, which is then found
        slot[...] = array.T if row.transpose else array
    # A wider dtype holds every number of a narrower one: the one with fewer bytes tells of both.
    if _is_finite(array if array.itemsize < slot.itemsize else slot):
        return
    wide = array.astype(np.float32)
    wrong, where = np.count_nonzero(~np.isfinite(wide)), f"{tensors.source} holds {row.name}"
    if wrong:
        raise ValueError(
            f"{where} with NaN or infinity in {wrong} of {array.size} places: download it again, or take an earlier "
            "checkpoint of its training"
        )
    raise ValueError(f"{where} with numbers up to {np.abs(wide).max():.3g}, beyond {slot.dtype}: load it in float32")


def _is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: in one or two passes, without a copy, faster than numpy's isfinite.

    Infinity and NaN have the largest exponent, so that their bits are the largest integers of their sign.
    """
    if array.dtype == np.float32 and np.isfinite(np.vdot(array, array)):
        return True  # a sum of squares is finite only if every number is; large ones may overflow it all the same
    size = array.dtype.itemsize
    infinity = np.array(np.inf, array.dtype).view(f"u{size}").item()
    sign = 1 << (8 * size - 1)
    largest, largest_negative = (array.view(f"{kind}{size}").max(initial=0) for kind in "iu")
    return int(largest) < infinity and int(largest_negative) < sign + infinity


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
      ValueError: a missing, unexpected or misshapen tensor, a dtype that is not a float, quantised weights, NaN or
        infinity, or an LM head that differs from the embedding it is tied to.
    """
    if param_dtype not in DTYPES:
        raise ValueError(f"param_dtype is {param_dtype!r}: use one of {', '.join(DTYPES)}")
    check_floats(tensors)
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
            _store(tensors, row, _read(tensors, row.name), slot)
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
        _store(tensors, row, _read(tensors, row.name, inner[::-1] if row.transpose else inner), slot)
    return host if stacked else host[0]
