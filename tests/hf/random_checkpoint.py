"""A checkpoint of random bfloat16 in a published model's shape."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mara_jax.hf import shapes
from mara_jax.policies import parameters

FILE_BYTES = 10**9


def random_tensor(draw: np.random.Generator, row: parameters.Row) -> np.ndarray:
    """Random bits: any sign and mantissa, four octaves about 1 / sqrt(2048); those of norms from 1 to 2."""
    bits = draw.integers(0, 2**16, row.stored_shape, np.uint16)
    bits &= np.uint16(0x007F if row.fill else 0x81FF)
    bits |= np.uint16(0x3F80 if row.fill else 0x3C00)
    return bits.view(ml_dtypes.bfloat16)


def write(out: pathlib.Path, name: str, layers: int | None = None) -> int:
    """Of a published shape, or its first layers, in several files, one in memory at a time; returns their bytes."""
    out.mkdir()
    draw, file, files = np.random.default_rng(0), {}, []
    arch = shapes.architecture_of(name)
    arch = dataclasses.replace(arch, layers=layers or arch.layers)
    rows = parameters.table(arch)
    weight_map = {}
    for row in rows:
        file[row.name] = random_tensor(draw, row)
        weight_map[row.name] = f"part-{len(files)}.safetensors"
        if sum(x.nbytes for x in file.values()) > FILE_BYTES or row is rows[-1]:
            files.append(out / weight_map[row.name])
            save_file(file, files[-1])
            file = {}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(shapes.PUBLISHED[name] | {"num_hidden_layers": arch.layers}))
    return sum(file.stat().st_size for file in files)
