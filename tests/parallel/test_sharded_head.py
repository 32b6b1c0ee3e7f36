"""The head in blocks of the vocabulary, and the lookup in a table cut along its channels."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from mara_jax.parallel import sharding
from mara_jax.sampling import sharded_head

HERE = pathlib.Path(__file__).parent


def test_blocks_and_lookup_are_the_plain_ones_in_float64():
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "sharded_head_program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for sizes, differences in json.loads(done.stdout).items():
        assert max(differences.values()) < 1e-12, (sizes, differences)


@pytest.mark.parametrize(
    ("positions", "vocab", "parts", "blocks"),
    [
        (8176, 151_936, 1, 64),  # 16e6 logits: 1,957 words, 77.6 blocks; its divisors nearby are 64 and 128
        (8176, 151_936, 2, 32),
        (60_000, 152_064, 1, 144),  # no narrower than 1,024 words
        (4, 512, 1, 1),
        (4000, 50_257, 1, 29),  # 29 x 1,733 words
        (4000, 50_257, 2, 0),  # two parts of it there are not
        (100_000, 65_537, 1, 0),  # prime: in chunks of positions then
    ],
)
def test_number_of_blocks(monkeypatch, positions, vocab, parts, blocks):
    monkeypatch.setattr(sharding, "shard_count", lambda logical: {"vocab": parts, "embed": 16}[logical])
    assert sharded_head.blocks(positions, vocab) == blocks


def test_no_blocks_where_the_matrix_is_whole():
    assert sharded_head.blocks(8176, 151_936) == 0
