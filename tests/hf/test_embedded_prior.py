"""A prior inside the package, by its name: a small one made here stands in its place."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import mara_jax
from mara_jax import config, hf
from mara_jax.hf import shapes, smiles_tokenizer
from mara_jax.hf.load import EMBEDDED
from mara_jax.plan import prompts
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.train import shape

NAME = "chemistry-prior"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = smiles_tokenizer.of_tokens(["C", "c", "1", "O", "[nH]"])
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16, "tie_embeddings": True, "max_positions": 64}
    policy = Policy(transformer.Architecture("llama", len(tokenizer), 16, 1, **sizes), tokenizer, (2,), 0, {}, "small")
    out = tmp_path_factory.mktemp("prior") / "model"
    return hf.export(policy, transformer.init(policy.architecture, jax.random.key(0)), out, dtype="bfloat16")


@pytest.fixture
def embedded(directory, monkeypatch):
    monkeypatch.setitem(EMBEDDED, NAME, ("mara_jax", str(directory)))
    return directory


def test_loaded_by_its_name_with_its_tokenizer(embedded):
    policy, params = hf.load(NAME)
    _, expected = hf.load(embedded)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert policy.tokenizer.convert_ids_to_tokens(policy.tokenizer.encode("c1cc[nH]c1"))[:2] == ["<bos>", "c"]
    assert policy.eos_ids == (2,) and {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_its_shape_and_files_are_known_before_it_is_loaded(embedded):
    arch = shapes.architecture_of(NAME)
    assert arch == dataclasses.replace(shape.policy_architecture(config.Policy(weights=NAME)))
    assert (arch.family, arch.embed, arch.layers, arch.vocab_size) == ("llama", 16, 1, 9)
    names = {path.name for path in hf.files_of(NAME)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    run = config.LanguageRun(policy=config.Policy(weights=NAME))
    assert prompts._tokenizer(run, None).eos_token == "<eos>"  # pyright: ignore[reportArgumentType]


def test_an_installation_without_it_says_how_to_train_one(monkeypatch, tmp_path):
    monkeypatch.setitem(EMBEDDED, NAME, ("mara_jax", str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match="train one with python -m") as error:
        hf.load(NAME)
    assert "\n" not in str(error.value)


def test_what_is_shipped_is_small_and_was_measured():
    """At most 4 MB, with its statistics."""
    folder = pathlib.Path(mara_jax.__file__).parent / EMBEDDED[NAME][1]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    measured = json.loads((folder / "statistics.json").read_text())
    assert measured["statistics"]["valid"] >= 0.9 and measured["settings"]["smiles"] == "moses"
