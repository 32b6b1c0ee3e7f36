"""The files of a model's directory: which hold its weights, and what the directory holds instead of a model."""

import json
import re
from pathlib import Path
from typing import Any

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # at most, as git-lfs defines it
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SAVE_AGAIN = "read it with transformers and write it again with save_pretrained, which makes safetensors"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line where it is not UTF-8, not JSON or no object."""
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object: fetch the file again")
    return content


def refuse_pointer(file: Path) -> None:
    """ValueError where a file is the few lines that git-lfs leaves in place of one that it has not fetched."""
    if not file.is_file() or file.stat().st_size > _POINTER_BYTES:
        return
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a pointer of git-lfs, not the file itself: run git lfs pull in its folder, or download it"
            )


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model's directory.

    Raises:
      FileNotFoundError: there is none; the error says what the directory holds instead.
      ValueError: it is no JSON object, or an adapter lies beside it, which transformers would load as well.
    """
    adapter = (directory / "adapter_config.json").is_file()
    if (directory / "config.json").is_file():
        if adapter:
            raise ValueError(
                f"{directory} has adapter_config.json beside config.json: move the adapter to a folder of its own and "
                "name that in lora.adapter, or merge it into the weights"
            )
        config = read_json(directory / "config.json")
        if "model_type" not in config and (directory / "model" / "config.json").is_file():
            raise ValueError(f"{directory} is the folder of a run, not a model: give {directory / 'model'}")
        return config
    if adapter:
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{directory} holds an adapter, not a model: give the weights of its base ({base!r}), and this folder as "
            "lora.adapter"
        )
    names = sorted(file.name for file in directory.iterdir())
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if not names:
        cure = "is empty: download the model again"
    elif gguf:
        cure = f"has no config.json but {gguf}: give the name of that file itself"
    elif "params.json" in names:
        cure = "has params.json but no config.json: it is the author's own format, take the Hugging Face version"
    else:
        cure = "has no config.json: give the directory of a Hugging Face model"
    raise FileNotFoundError(f"{directory} {cure}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: model.safetensors, those its index names, or all that may hold its weights.

    Raises:
      FileNotFoundError: there are none, or one of several is not there.
      ValueError: the index is damaged.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _indexed(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    # Mistral's own names of tensors, which its repositories hold a second time; an adapter's tensors.
    others = [file for file in files if file.name.startswith(("consolidated", "adapter_model"))]
    files = [file for file in files if file not in others]
    shards = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    if shards and len(shards) < int(shards[0][3]):
        raise FileNotFoundError(
            f"{directory} holds {len(shards)} of the {int(shards[0][3])} files of {shards[0][1]}: download the others "
            "as well"
        )
    if files:
        return files
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if others:
        cure = (
            f"holds {others[0].name}, which is no model in Hugging Face's format: download model*.safetensors as well"
        )
    elif pickled:
        cure = f"holds {pickled[0]} but no .safetensors file: {_SAVE_AGAIN}"
    else:
        cure = "has no .safetensors file: give a directory with the weights in that format"
    raise FileNotFoundError(f"{directory} {cure}")


def _indexed(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: fetch the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{index} maps {tensor} to {name!r}, not to the name of a file: fetch the file again")
    return [directory / name for name in sorted(set(weight_map.values()))]
