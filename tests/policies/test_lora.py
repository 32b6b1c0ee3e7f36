"""Low-rank adapters: what is trained, what it computes and its gradient, against the chain rule and merged kernels."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacking import to_scanned

from mara_jax import config
from mara_jax.parallel import sharding
from mara_jax.policies import lora, parameters, transformer
from mara_jax.policies.parameters import Architecture, Lora

RANK, ALPHA = 3, 5.0
PLAIN = Architecture("qwen2", 38, 16, 2, 4, 2, 8, 24)
ARCH = dataclasses.replace(PLAIN, lora=Lora(RANK, ALPHA, config.LORA_TARGETS))
SCANNED = dataclasses.replace(ARCH, scan_layers=True)
TOKENS = np.random.default_rng(0).integers(0, 38, (3, 7), dtype=np.int32)
AT = np.broadcast_to(np.arange(7, dtype=np.int32), TOKENS.shape)
WEIGHT = np.random.default_rng(9).normal(size=(3, 7, 38)).astype(np.float32)


def drawn(shapes: dict, deviation: float, seed: int, dtype: str) -> dict:
    """Numbers other than those of init: no bias is zero and no scale one, so that none can be lost unnoticed."""
    rng, tree = np.random.default_rng(seed), {}
    for path, (shape, _) in shapes.items():
        parameters.put(tree, path, jnp.asarray((path[-1] == "scale") + deviation * rng.normal(size=shape), dtype))
    return tree


def base_of(arch: Architecture) -> dict:
    return drawn(parameters.leaf_shapes(arch), 0.3, 0, arch.compute_dtype)


def adapter_of(arch: Architecture) -> dict:
    """An adapter whose b is not zero."""
    return drawn(lora.leaf_shapes(arch), 0.3, 1, arch.compute_dtype)


@functools.partial(jax.jit, static_argnums=0)
def logits(arch: Architecture, params: dict) -> jax.Array:
    return transformer.logits(arch, params, transformer.forward(arch, params, TOKENS, AT)[0])


def loss(arch: Architecture, params: dict) -> tuple[jax.Array, jax.Array]:
    out = logits(arch, params)
    return jnp.sum(WEIGHT * jnp.sin(out)), out


def test_a_new_adapter_gives_the_base_bit_for_bit_and_a_used_one_its_merged_kernels():
    arch = SCANNED
    base, plain = base_of(arch), dataclasses.replace(arch, lora=None)
    of_base = logits(plain, base)
    new = logits(arch, lora.attached(arch, base, lora.init(arch, jax.random.key(2))))
    exact = jax.default_backend() == "cpu"  # a GPU fuses the added zeros into matmuls that then round otherwise
    np.testing.assert_allclose(new, of_base, rtol=0, atol=0 if exact else 1e-5)
    used = lora.attached(arch, base, adapter_of(arch))
    assert np.abs(logits(arch, used) - of_base).max() > 0.1
    np.testing.assert_allclose(logits(arch, used), logits(plain, lora.merged(used)), rtol=0, atol=1e-5)


def test_in_float64_values_and_gradients_are_those_of_merged_kernels():
    """dA = s dW B', dB = s A' dW, where dW is the gradient of the plain model's kernel at W + s A B."""
    with jax.enable_x64(True):
        arch = dataclasses.replace(ARCH, layers=1, compute_dtype="float64", remat="elementwise")
        base, adapter = base_of(arch), adapter_of(arch)
        merged = lora.merged(lora.attached(arch, base, adapter))
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        whole, plain_loss = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)(
            dataclasses.replace(arch, lora=None), merged
        )
        ours, value = jax.jit(jax.grad(lambda x: loss(arch, lora.attached(arch, base, x)), has_aux=True))(adapter)
        np.testing.assert_allclose(value, plain_loss, rtol=0, atol=1e-12)
        assert jax.tree.structure(ours) == jax.tree.structure(adapter)
        for at in {row.path[:-1] for row in lora.rows(arch)}:
            kernel, d_kernel = (np.asarray(parameters.at(tree, (*at, "kernel"))) for tree in (merged, whole))
            a, b = (np.asarray(parameters.at(adapter, (*at, name))) for name in ("lora_a", "lora_b"))
            by_hand = parameters.at(base, (*at, "kernel")) + ALPHA / RANK * a @ b
            np.testing.assert_allclose(kernel, by_hand, rtol=0, atol=1e-14)
            expected = (d_kernel @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ d_kernel)
            for name, d_factor in zip(("lora_a", "lora_b"), expected, strict=True):
                np.testing.assert_allclose(
                    parameters.at(ours, (*at, name)), ALPHA / RANK * d_factor, rtol=0, atol=1e-11
                )


@pytest.mark.parametrize("targets", [config.LORA_TARGETS, ("q",)])
def test_no_gradient_of_a_kernel_is_made_for_an_adapter(targets):
    """Nor kept alive by what waits for one."""
    arch = dataclasses.replace(PLAIN, lora=Lora(RANK, ALPHA, targets))

    def dots(arch: Architecture, trained: dict, made) -> set:
        program = jax.jit(jax.grad(lambda x: loss(arch, made(x))[0])).lower(trained).compile().as_text()
        return {tuple(map(int, found)) for found in re.findall(r" f32\[(\d+),(\d+)\]\S* dot\(", program)}

    base = base_of(PLAIN)
    kernels = {shape for path, (shape, _) in parameters.leaf_shapes(PLAIN).items() if path[-1] == "kernel"}
    kernels |= {shape[::-1] for shape in kernels}
    assert dots(PLAIN, base, lambda x: x) & kernels
    assert not dots(arch, adapter_of(arch), lambda x: lora.attached(arch, base, x)) & kernels


def test_only_named_kernels_are_adapted_and_drawn_as_peft_draws_them():
    arch = dataclasses.replace(ARCH, embed=64, mlp=256, lora=Lora(8, 16.0, ("q", "down")))
    adapter = lora.init(arch, jax.random.key(0))
    assert {path: shape for path, (shape, _) in lora.leaf_shapes(arch).items()} == {
        (f"layers_{i}", name, factor): shape
        for i in range(2)
        for name, factor, shape in [
            ("q", "lora_a", (64, 8)), ("q", "lora_b", (8, 32)),
            ("down", "lora_a", (256, 8)), ("down", "lora_b", (8, 64)),
        ]
    }  # fmt: skip
    assert lora.count(arch) == 2 * (8 * (64 + 32) + 8 * (256 + 64))
    a = np.asarray(adapter["layers_1"]["down"]["lora_a"])
    # Uniform within 1 / sqrt(256): torch's kaiming_uniform_ of a [r, in] matrix with a = sqrt(5).
    assert np.abs(a).max() <= 1 / 16 and np.abs(a).max() > 0.99 / 16
    assert a.std() == pytest.approx(1 / 16 / np.sqrt(3), rel=0.05) and abs(a.mean()) < 0.003
    assert not np.any(adapter["layers_0"]["q"]["lora_b"])
    scanned = lora.init(dataclasses.replace(arch, scan_layers=True), jax.random.key(0))
    chex.assert_trees_all_equal(scanned, to_scanned(adapter, 2))


def test_attaching_copies_nothing_of_the_base():
    base = base_of(ARCH)
    params = lora.attached(ARCH, base, adapter_of(ARCH))
    for path in parameters.leaf_shapes(ARCH):
        assert parameters.at(params, path) is parameters.at(base, path)
    assert lora.attached(PLAIN, None, base) is base  # without an adapter all parameters are the trained ones
    for path, leaf in parameters.leaf_shapes(ARCH).items():
        same = parameters.at(lora.merged(params), path) is parameters.at(base, path)
        assert same == (path[-1] != "kernel"), leaf


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "words"),
    [
        (0, 1.0, ("q",), "rank=0"),
        (2, float("inf"), ("q",), "alpha=inf"),
        (2, 1.0, (), "name some of q, k, v, o, gate, up, down"),
        (2, 1.0, ("lm_head",), "lm_head"),
        (17, 1.0, ("q",), "rank is 17, but the model is 16 wide"),
    ],
)
def test_an_impossible_adapter_is_refused(rank, alpha, targets, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, lora=Lora(rank, alpha, targets))


def test_the_targets_of_a_config_are_the_kernels_of_a_layer():
    assert tuple(r.path[-2] for r in parameters.table(PLAIN) if "kernel" in r.path)[:7] == config.LORA_TARGETS
    assert config.lora_targets(config.Lora(targets="down, v,q")) == ("q", "v", "down")


def test_factors_lie_as_their_kernel_and_the_rank_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    found = lora.shardings(SCANNED, sharding.layout(mesh))  # pyright: ignore[reportArgumentType]
    assert tuple(found["layers"]["up"]["lora_a"].spec) == (None, "fsdp", None)
    assert tuple(found["layers"]["up"]["lora_b"].spec) == (None, None, "tensor")
    assert tuple(found["layers"]["o"]["lora_a"].spec) == (None, "tensor", None)
    assert tuple(found["layers"]["o"]["lora_b"].spec) == (None, None, "fsdp")
