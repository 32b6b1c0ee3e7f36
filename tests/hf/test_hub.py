"""Weights by a hub id: which commit is read, from a cache as huggingface_hub lays it out, without a network."""

import json
import pathlib

import numpy as np
import pytest
from huggingface_hub import constants

from mara_jax import hf
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy

OLD, NEW = "a" * 40, "b" * 40
ARCH = transformer.Architecture("qwen2", 64, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16)


def move_main(cache: pathlib.Path, commit: str) -> None:
    """Makes `main` of the repository in the cache another commit."""
    (cache / "models--some--model" / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """A hub cache with two commits of some/model, whose last norms are 1 and 2; `main` is the older."""
    import jax

    policy = Policy(ARCH, None, (0,), 0, {}, "random")
    params = transformer.init(ARCH, jax.random.key(0))
    for value, commit in ((1.0, OLD), (2.0, NEW)):
        params["final_norm"] = jax.tree.map(lambda x, value=value: x * 0 + value, params["final_norm"])
        hf.export(policy, params, tmp_path / "models--some--model" / "snapshots" / commit)
    (tmp_path / "models--some--model" / "refs").mkdir()
    move_main(tmp_path, OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def norm(name: str) -> float:
    _, params = hf.load(name, tokenizer=False)
    return float(np.asarray(params["final_norm"]["scale"])[0])


def test_a_pinned_name_keeps_its_commit_when_main_moves(cache):
    pinned = hf.pinned("some/model")
    assert pinned == f"some/model@{OLD}" and norm(pinned) == norm("some/model") == 1
    move_main(cache, NEW)
    assert norm("some/model") == 2 and norm(pinned) == 1
    assert hf.pinned(pinned) == pinned and hf.pinned("some/model@main") == f"some/model@{NEW}"


def test_names_that_are_no_hub_ids_stay(cache):
    folder = str(cache / "models--some--model" / "snapshots" / OLD)
    assert hf.pinned(folder) == folder
    assert {path.name for path in hf.files_of(folder)} == {"config.json", "generation_config.json", "model.safetensors"}
    assert hf.pinned("some/file.gguf") == "some/file.gguf"


@pytest.mark.parametrize("name", ["some/other", f"some/model@{'c' * 40}", "some/model@next"])
def test_what_the_cache_lacks_is_one_line(cache, name):
    with pytest.raises(FileNotFoundError, match=r"the hub did not give it") as caught:
        hf.pinned(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_commit_is_not_read_off_a_branch_name(cache):
    """A branch may hold a slash; its snapshot's folder is the commit all the same."""
    refs = cache / "models--some--model" / "refs" / "pr"
    refs.mkdir()
    (refs / "1").write_text(NEW)
    assert hf.pinned("some/model@pr/1") == f"some/model@{NEW}"
    assert json.loads((hf.locate("some/model@pr/1") / "config.json").read_text())["vocab_size"] == 64
