"""A checkpoint of Qwen2.5-3B's shape and size, 6.2 GB of random bfloat16: in and out; its first layers once through."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import random_checkpoint
import torch
import transformers
from safetensors import safe_open
from transformers.models.qwen2 import modeling_qwen2

from mara_jax import hf
from mara_jax.hf import shapes
from mara_jax.policies import parameters

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
LAYERS = 4  # as XLA for CPUs multiplies float32 copies of the weights, the forward pass of all 36 takes 18 GB
CONFIG = shapes.PUBLISHED["qwen2.5-3b"] | {"num_hidden_layers": LAYERS}
TOKENS = np.arange(2 * 12, dtype=np.int32).reshape(2, 12) * 6143 % 151_643
LENGTHS = np.array([12, 9], np.int32)


def opened(directory: pathlib.Path, name: str, framework: str = "pt"):
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return safe_open(directory / index[name], framework=framework)


def read(directory: pathlib.Path, name: str) -> torch.Tensor:
    with opened(directory, name) as file:
        return file.get_tensor(name)


def torch_logits(directory: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' own layers in float32, one layer's weights in memory at a time."""
    config = transformers.Qwen2Config(**CONFIG, attn_implementation="sdpa")
    layer, norm = modeling_qwen2.Qwen2DecoderLayer(config, 0), modeling_qwen2.Qwen2RMSNorm(config.hidden_size, 1e-6)
    embedding = read(directory, "model.embed_tokens.weight")
    with torch.no_grad():
        x = embedding[torch.tensor(tokens)].float()
        positions = torch.arange(tokens.shape[1])[None]
        rope = modeling_qwen2.Qwen2RotaryEmbedding(config)(x, positions)
        for number in range(config.num_hidden_layers):
            names = layer.state_dict().keys()
            layer.load_state_dict({name: read(directory, f"model.layers.{number}.{name}").float() for name in names})
            x = layer(x, position_ids=positions, position_embeddings=rope)
        norm.load_state_dict({"weight": read(directory, "model.norm.weight").float()})
        x = norm(x)
        return torch.cat([x @ rows.float().T for rows in embedding.split(16_384)], dim=-1).numpy()


def assert_same_bytes(one: pathlib.Path, other: pathlib.Path, names: list[str]) -> None:
    for name in names:
        a, b = read(one, name), read(other, name)
        assert a.dtype == b.dtype == torch.bfloat16 and a.shape == b.shape, name
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


@pytest.fixture
def folder(tmp_path):
    """Emptied at the end: pytest keeps the folders of its last three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_a_3b_checkpoint_in_and_out_in_13_tenths_of_its_size(folder):
    where, out = folder / "checkpoint", folder / "out"
    out.mkdir()
    size = random_checkpoint.write(where, "qwen2.5-3b")
    done = subprocess.run(
        [sys.executable, HERE / "qwen_scale_program.py", where, out],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)
    print(f"files: {size:,} bytes;", done.stdout)
    assert stages["export"]["peak_bytes"] <= 1.3 * size
    names = [row.name for row in parameters.table(shapes.architecture_of("qwen2.5-3b"))]
    files = list((out / "model").glob("*.safetensors"))
    assert len(files) > 1
    held = sorted(name for file in files for name in safe_open(file, framework="pt").keys())  # noqa: SIM118
    assert held == sorted(names)
    assert_same_bytes(where, out / "model", names)


def test_logits_of_its_first_layers_are_those_of_transformers(folder):
    where = folder / "checkpoint"
    random_checkpoint.write(where, "qwen2.5-3b", layers=LAYERS)
    policy, params = hf.load(where, param_dtype="bfloat16", tokenizer=False)
    logits, expected = np.asarray(policy.logits(params, TOKENS, LENGTHS)), torch_logits(where, TOKENS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-3 * expected.std())
