"""A reward model's scores and training are the same on one device and on 8 simulated ones (slow)."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mara_jax import hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.train import reward_model

pytestmark = pytest.mark.slow
HERE = pathlib.Path(__file__).parent


def test_every_layout_computes_the_same(tmp_path):
    tokenizer = tokenizers.nano(["a b c"], 259)
    tokenizer.add_tokens(["x"])  # 260 rows, which two devices divide
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 32, "tie_embeddings": False, "max_positions": 64}
    arch = transformer.Architecture("llama", 260, 32, 2, **shape)
    base = Policy(arch, tokenizer, (0, 2), 0, {}, "random")
    policy, params = reward_model.begun(base, transformer.init(arch, jax.random.key(0)), jax.random.key(1))
    where = hf.export(policy, params, tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "reward_model_program.py"), str(where)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, data, mixed = map(json.loads, done.stdout.splitlines())
    assert np.std(one["scores"]) > 0.05 and one["losses"][1] < one["losses"][0]
    for other in (data, mixed):
        np.testing.assert_allclose(other["scores"], one["scores"], atol=1e-5)
        np.testing.assert_allclose(other["losses"], one["losses"], atol=1e-5)
        np.testing.assert_allclose(other["after"], one["after"], atol=5e-3)  # Adam divides by small second moments
    assert one["held"] == data["held"] == 1 and mixed["held"] < 0.4
