"""docs/config_keys.md: every setting and what becomes of it. Run as a program, it writes the page.

python tests/hf/config_keys_page.py
"""

import dataclasses
import pathlib
from collections.abc import Iterable

import peft
import transformers
from transformers.modeling_rope_utils import RopeParameters

from mara_jax.hf import config_keys
from mara_jax.hf.config_keys import Keys
from mara_jax.policies.families import FAMILIES

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "config_keys.md"
# What transformers reads of a config.json beside the fields of its classes.
BESIDE_FIELDS = """model_type torch_dtype name_or_path _commit_hash num_labels output_attentions attn_implementation
    experts_implementation per_layer_config rope_theta rope_scaling partial_rotary_factor _name_or_path""".split()
INTRO = """# What is read of a model's settings

A setting that is not listed here is refused by its name, since it may change what the model computes: remove it if you
know that it has no effect on the logits. Families have their Hugging Face names: {families}. Written by
`tests/hf/config_keys_page.py` from `mara_jax/hf/config_keys.py` and the classes of transformers and peft; a test fails
when those have a field that is not here.

* **read**: it decides what is computed, or is checked.
* **harmless**: it has no effect on the logits of this model.
* **only at**: harmless at these values (or where it is missing), refused at any other."""


def family_fields() -> dict[str, set[str]]:
    """model_type -> the fields of its configuration class."""
    return {
        family: {field.name for field in dataclasses.fields(transformers.AutoConfig.for_model(family))}
        for family in FAMILIES
    }


def model_fields() -> set[str]:
    """Every key that transformers knows of the config.json of these families."""
    generation = transformers.GenerationConfig._get_default_generation_params()
    return set(generation) | set(BESIDE_FIELDS) | set().union(*family_fields().values())


def rope_fields() -> set[str]:
    return set(RopeParameters.__annotations__)


def adapter_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(peft.LoraConfig)}


def known(keys: Keys) -> set[str]:
    return {*keys.read, *keys.harmless, *keys.only_at}


def treatment(keys: Keys, key: str) -> str:
    """The last two cells of a row."""
    if key in keys.read:
        return f"read | {keys.read[key]}"
    if key in keys.harmless:
        return f"harmless | {keys.harmless[key]}"
    values, meaning, *_ = keys.only_at[key]
    shown = ", ".join("null" if value is None else f"`{value!r}`" for value in values)
    return f"only at {shown} | else: {meaning}"


def table(keys: Keys, where: dict[str, set[str]], title: str) -> Iterable[str]:
    """One section: its rows in the order read, only at, harmless; `where` says of whom each key is."""
    yield f"\n## {title}\n\n| key | of | | |\n|---|---|---|---|"
    for key in (*keys.read, *keys.only_at, *keys.harmless):
        owners = [name for name, fields in where.items() if key in fields]
        owner = "all" if len(owners) == len(FAMILIES) > 1 else ", ".join(owners) or "published files"
        yield f"| `{key}` | {owner} | {treatment(keys, key)} |"


def page() -> str:
    families = family_fields()
    beside = model_fields() - set().union(*families.values())
    lines = [INTRO.format(families=", ".join(FAMILIES))]
    lines += table(config_keys.MODEL, families | {"transformers": beside}, "config.json")
    for kind, keys in config_keys.ROPE.items():
        lines += table(keys, {"transformers": rope_fields()}, f"Rotary settings of type {kind}")
    lines += table(config_keys.ADAPTER, {"peft": adapter_fields()}, "adapter_config.json")
    lines += table(config_keys.GGUF, {"llama.cpp": known(config_keys.GGUF)}, "GGUF metadata of the architecture")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
