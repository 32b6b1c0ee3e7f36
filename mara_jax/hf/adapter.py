"""Low-rank adapters in the format of the peft library: adapter_config.json and adapter_model.safetensors."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mara_jax.config.schema import LORA_TARGETS
from mara_jax.hf import export_check
from mara_jax.hf.config_keys import ADAPTER
from mara_jax.hf.export import (
    another_process_writes,
    atomic_directory,
    check_finite,
    rows_with_dtypes,
    write_json,
    write_safetensors,
)
from mara_jax.hf.files import read_json
from mara_jax.hf.tensors import DTYPES, SafeTensors, check_floats, read_arrays
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import lora
from mara_jax.policies.parameters import Lora
from mara_jax.policies.policy import Policy

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(policy: Policy, adapter: Any, out: str | Path, *, base: str = "", dtype: str | None = None) -> Path:
    """Write an adapter so that peft's `PeftModel.from_pretrained(model, out)` loads it.

    Written beside `out` and renamed at the end, as by `export`; of several processes process 0 writes.

    args: policy: its architecture has a `lora`; adapter: its parameters alone, unrolled or scanned; out: a path that
        does not exist, or an empty directory; base: the directory or hub id of the model it belongs to, by default
        where the policy came from; dtype: 'float32', 'bfloat16' or 'float16', by default each array's own.
    returns: the path written.
    errors: FileExistsError where `out` holds something; ValueError where adapter is not the architecture's.
    """
    arch, out = policy.architecture, Path(out)
    if arch.lora is None:
        raise ValueError("the policy's architecture has no adapter: export() writes whole models")
    rows = rows_with_dtypes(lora.rows(arch), arch.layers, adapter, dtype)
    check_finite(rows, adapter)
    if another_process_writes(rows, adapter):
        return out
    alpha = arch.lora.alpha
    modules = {row.path[-2]: row.name.split(".")[-3] for row, _ in rows}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or policy.source,
        "r": arch.lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [modules[name] for name in arch.lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_directory(out) as building:
        write_json(building / _CONFIG, config)
        written = write_safetensors(building / _WEIGHTS, rows, adapter)
        with export_check.refusals(out):
            export_check.check_tensors(rows, written, SafeTensors(str(building), [building / _WEIGHTS]))
    hosts.barrier("export")
    return out


def load_adapter(
    policy: Policy, where: str | Path, *, layout: sharding.Layout | None = None
) -> tuple[Policy, dict[str, Any]]:
    """Read an adapter that this package or peft wrote.

    args: policy: of the model it belongs to; where: a directory; layout: shards the arrays.
    returns: (the policy with the adapter in its architecture, the adapter), to be used through `lora.attached`.
    errors: FileNotFoundError where a file is not there; ValueError, one line, for an adapter of another kind or model.
    """
    directory = Path(where)
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}: give a directory that this package wrote, or peft's save_pretrained with "
                "safe_serialization=True"
            )
    config, tensors = read_json(directory / _CONFIG), SafeTensors(str(directory), [directory / _WEIGHTS])
    try:
        settings = _settings(config, tensors)
        check_floats(tensors)
        arch = dataclasses.replace(policy.architecture, lora=settings)
        rows = lora.rows(arch)
        _check_tensors({row.name: row.stored_shape for row in rows}, tensors)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    shardings = None if layout is None else lora.shardings(arch, layout)
    adapter = read_arrays(rows, lora.leaf_shapes(arch), shardings, tensors, DTYPES["float32"])
    return dataclasses.replace(policy, architecture=arch), adapter


def _settings(config: Mapping[str, Any], tensors: SafeTensors) -> Lora:
    """Rank, alpha and targets; the targets by the tensors that are there, since a config may name them by a pattern."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}: this code knows 'LORA'")
    ADAPTER.check(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (
        isinstance(rank, bool)
        or isinstance(alpha, bool)
        or not (isinstance(rank, int) and isinstance(alpha, int | float))
    ):
        raise ValueError(f"r={rank!r} and lora_alpha={alpha!r} must be numbers: fetch the file again")
    if _is_true(config, "use_rslora"):  # scaled by alpha / sqrt(r)
        alpha = alpha * rank**0.5
    kernels = {name.split(".")[-3].removesuffix("_proj") for name in tensors.names() if name.count(".") > 2}
    return Lora(rank, float(alpha), tuple(name for name in LORA_TARGETS if name in kernels))


def _is_true(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false: fetch the file again")
    return bool(value)


def _check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: SafeTensors) -> None:
    names = set(tensors.names())
    for name in sorted(expected.keys() ^ names):
        state = "lacks" if name in expected else "holds the unexpected"
        raise ValueError(f"it {state} {name}: it must adapt the same kernels in every layer of the policy's model")
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            stored = list(tensors.shape(name))
            raise ValueError(f"it holds {name} of shape {stored}, expected {list(shape)}: it belongs to another model")
