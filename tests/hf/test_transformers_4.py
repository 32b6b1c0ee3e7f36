"""Exports are read by transformers 4.57, installed in a folder of its own, and by the one in use: the same of both."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import reader_program
from small_tokenizers import BOS, END, EOS, byte_level, pieces

from mara_jax import hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import transformer
from mara_jax.policies.parameters import RopeScaling
from mara_jax.policies.policy import Policy

pytestmark = pytest.mark.slow
# Of the time of 4.57; torch, numpy and safetensors are those in use.
PINNED = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
TURNS = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end_of_turn>\n{% endfor %}"
SIZES: dict = {"embed": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 48, "max_positions": 256}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def random_policies() -> dict[str, Policy]:
    """Models of every family and rotary embedding, tied and not, with tokenizers of every kind, one padded."""
    small = tokenizers.nano(["12 primes 7 11"])
    described = {
        "nano": ("qwen2", True, None, small),
        "qwen3 tied": ("qwen3", True, None, byte_level(chat_template=TURNS)),
        "qwen3 untied": ("qwen3", False, None, byte_level("", EOS, additional_special_tokens=[END])),
        "llama scaled": ("llama", False, LLAMA3, pieces(BOS, EOS, chat_template=TURNS)),
        "llama linear": ("llama", True, RopeScaling("linear", 2.0), byte_level(BOS)),
        "mistral": ("mistral", False, None, pieces(BOS, chat_template=TURNS)),
        "olmo2": ("olmo2", False, None, byte_level(additional_special_tokens=[END], chat_template=TURNS)),
    }
    policies = {}
    for name, (family, tied, scaling, tokenizer) in described.items():
        arch = transformer.Architecture(family, 512, tie_embeddings=tied, rope_scaling=scaling, **SIZES)
        policies[name] = Policy(arch, tokenizer, (tokenizer.eos_token_id,), 0, {}, name)
    return policies


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[pathlib.Path, np.ndarray]]:
    """The exports of all models, of SmolLM2 from its GGUF file too, and our logits."""
    out, found = tmp_path_factory.mktemp("exports"), {}
    models = {name: (policy, None) for name, policy in random_policies().items()} | {"smollm2": ("smollm2", None)}
    for name, (policy, params) in models.items():
        if isinstance(policy, str):
            policy, params = hf.load("smollm2-135m-instruct")
        params = transformer.init(policy.architecture, jax.random.key(1)) if params is None else params
        where = hf.export(policy, params, out / name.replace(" ", "_"))
        # A text: behind tokens that no text has, SmolLM2's numbers are so large that float32 rounds by more than 1e-4.
        ids = np.array([policy.tokenizer(reader_program.TEXTS[0]).input_ids])
        found[name] = where, np.asarray(policy.logits(params, ids, np.array([ids.shape[1]])))[0]
        # Once more through our own reader, which then has all that it was written from.
        again, same = hf.load(where)
        assert again.architecture == dataclasses.replace(
            policy.architecture, without_token=again.architecture.without_token
        )
        logits = np.asarray(again.logits(same, ids, np.array([ids.shape[1]])))[0]
        np.testing.assert_allclose(logits, found[name][1], atol=1e-5)
    return found


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> pathlib.Path:
    """A folder with transformers 4.57: the one that TRANSFORMERS_4 names, or one into which it is installed now."""
    if os.environ.get("TRANSFORMERS_4"):
        return pathlib.Path(os.environ["TRANSFORMERS_4"])
    folder = tmp_path_factory.mktemp("transformers_4")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PINNED]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def read(out: pathlib.Path, exports, path: pathlib.Path | None) -> tuple[str, dict, dict[str, np.ndarray]]:
    """The version, what it said and the logits, by the name of the model."""
    program, root = pathlib.Path(reader_program.__file__), pathlib.Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, ([] if path is None else [path]) + [root]))}
    directories = {name: str(where) for name, (where, _) in exports.items()}
    args = [sys.executable, str(program), str(out), *directories.values()]
    done = subprocess.run(args, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(out.with_suffix(".json").read_text())
    logits = dict(np.load(out.with_suffix(".npz")))
    said = {name: answer["said"][directory] for name, directory in directories.items()}
    return answer["version"], said, {name: logits[f"arr_{i}"] for i, name in enumerate(directories)}


def test_both_read_what_we_wrote(exports, transformers_4, tmp_path, capsys):
    old, said_old, logits_old = read(tmp_path / "old", exports, transformers_4)
    new, said_new, logits_new = read(tmp_path / "new", exports, None)
    assert old.startswith("4.57") and int(new.split(".")[0]) >= 5
    lines = [f"{'largest difference of logits':30} {old:>9} {new:>9}   ids, chat, special tokens"]
    for name, (where, ours) in exports.items():
        gaps = [float(np.max(np.abs(logits[name] - ours))) for logits in (logits_old, logits_new)]
        policy, _ = hf.load(where)
        ids = [policy.tokenizer(text).input_ids for text in reader_program.TEXTS]
        expected = {"ids": ids, "size": len(policy.tokenizer), "tied": policy.architecture.tie_embeddings}
        if policy.tokenizer.chat_template is not None:
            template = {"tokenize": False, "add_generation_prompt": True}
            expected["chat"] = policy.tokenizer.apply_chat_template(reader_program.CHAT, **template)
        for said in (said_old[name], said_new[name]):
            assert {key: said.get(key) for key in expected} == expected, name
            assert sorted(np.atleast_1d(said["ends"])) == list(policy.eos_ids)
            assert set(said["inputs"]) == {"input_ids", "attention_mask"}
        for key in ("texts", "special", "chat"):
            assert said_old[name].get(key) == said_new[name].get(key), (name, key)
        lines.append(f"{name:30} {gaps[0]:9.1e} {gaps[1]:9.1e}   equal")
        assert max(gaps) < 1e-4, name
    with capsys.disabled():
        print("\n" + "\n".join(lines))
