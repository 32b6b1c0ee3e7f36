"""An update that begins from the products that sampling kept, against one that makes them again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import END

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Optimiser, Rollout, Warmup
from mara_jax.parallel import sharding
from mara_jax.plan import work
from mara_jax.policies import lora, transformer
from mara_jax.policies.params import KERNELS, Architecture, Lora
from mara_jax.sampling import decode, logprobs, rollout
from mara_jax.train import shape, step
from mara_jax.train.state import Batch

PROMPTS = [[1, 2, 4], [5], [7, 7, 9, 1, 2]]
GROUP, WIDTH = 8, 10
ALGORITHM = Algorithm(method="mara", anchor="string", beta=0.3, threshold=0.5)
QWEN2 = Architecture("qwen2", 16, 16, 2, heads=2, kv_heads=1, head_dim=8, mlp=32, qkv_bias=True)
ADAPTED = dataclasses.replace(QWEN2, lora=Lora(3, 5.0, KERNELS))
ARCHS = {
    "qwen2": QWEN2,
    "qwen3": dataclasses.replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm=True, tie_embeddings=False),
    "scanned": dataclasses.replace(QWEN2, scan_layers=True, remat="elementwise"),
    "adapter": ADAPTED,
    "scanned adapter": dataclasses.replace(ADAPTED, scan_layers=True),
}

pytestmark = pytest.mark.usefixtures("quick_compilation", "growing", "float64")


@pytest.fixture(scope="module")
def growing():
    """Of these short completions, too, the cache grows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decode.LEAST_LENGTH, jax.default_backend(), 4)
        assert decode.cache_lengths(WIDTH) == [6, 10]
        yield


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def weights(shapes: dict, seed: int) -> dict:
    rng, tree = np.random.default_rng(seed), {}
    for path, (size, _) in shapes.items():
        transformer.table.put(tree, path, jnp.asarray((path[-1] == "scale") + 0.5 * rng.normal(size=size)))
    return tree


def policy_of(name: str):
    """The architecture, what is trained, the reference, and the policy's parameters."""
    arch = dataclasses.replace(ARCHS[name], compute_dtype="float64")
    base = weights(transformer.table.leaf_shapes(arch), 0)
    trained = weights(lora.leaf_shapes(arch), 1)
    return arch, trained, base, lora.attached(arch, base, trained)


@functools.cache
def drawn(name: str, slots: int, keep: bool) -> rollout.Drawn:
    arch, _, _, params = policy_of(name)
    tokens_ps, lengths_p = rollout.pad_prompts(PROMPTS, 0, multiple=8)
    return rollout.generate(
        arch, params, jnp.asarray(tokens_ps), jnp.asarray(lengths_p), jnp.arange(3), jax.random.key(1), jnp.ones(3),
        first_sample_p=jnp.zeros(3, jnp.int32), group_size=GROUP, max_new_tokens=WIDTH, eos_ids=(END,), pad_id=0,
        slots=slots, keep=keep,
    )  # fmt: skip


def batch_of(name: str, slots: int, buckets: int = 3) -> Batch:
    """The rollout as a batch whose kept products stand in their own order."""
    arch, _, base, _ = policy_of(name)
    found = drawn(name, slots, True)
    tokens_ps, lengths_p = (jnp.asarray(x) for x in rollout.pad_prompts(PROMPTS, 0, multiple=8))
    packing = logprobs.packed(np.asarray(found.lengths), WIDTH, buckets, kept=found.kept)
    plain = dataclasses.replace(arch, lora=None)
    hidden = logprobs.reference_hidden(plain, base, tokens_ps, lengths_p, found.tokens, packing)
    reward = jnp.asarray(np.random.default_rng(0).integers(0, 2, found.lengths.shape), jnp.float64)
    return Batch(
        prompt_tokens=tokens_ps, prompt_lengths=lengths_p, tokens=found.tokens, lengths=found.lengths, reward=reward,
        answer=reward.astype(jnp.int32) - 1, log_mass=jnp.full((3, 1), -1.0), ref_hidden=hidden, packing=packing,
        kept=found.kept,
    )  # fmt: skip


def gradient(name: str, batch: Batch):
    arch, trained, base, _ = policy_of(name)
    of = jax.jit(step.gradient, static_argnames=("arch", "algorithm"))
    return of(trained, base, arch=arch, algorithm=ALGORITHM, batch=batch, reference=None, beta=0.3, threshold=0.5)


@pytest.mark.parametrize(
    ("name", "slots"),
    [("qwen2", 0), ("qwen2", 6), ("qwen3", 5), ("scanned", 6), ("adapter", 0), ("scanned adapter", 5)],
)
def test_the_gradient_from_kept_products_is_that_of_a_forward_pass(name, slots):
    batch = batch_of(name, slots)
    (expected, metrics), (got, kept_metrics) = (
        gradient(name, one) for one in (dataclasses.replace(batch, kept=None), batch)
    )
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-11 * float(jnp.max(jnp.abs(one)) + 1))
    for key in metrics:
        np.testing.assert_allclose(kept_metrics[key], metrics[key], rtol=1e-10, atol=1e-12)
    assert float(max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(got))) > 1e-3


@pytest.mark.parametrize("slots", [0, 6, 5])
def test_keeping_changes_no_sample_and_each_counted_token_has_one_place(slots):
    plain, found = (drawn("qwen2", slots, keep) for keep in (False, True))
    for name in ("tokens", "logp", "lengths", "finished", "steps"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(found, name))
    assert plain.kept is None
    read_b = np.asarray(found.lengths).ravel() - 1
    assert 0 < read_b.sum() < read_b.size * (WIDTH - 1), "some completions end early, some tokens count"
    place_n = np.asarray(found.kept.place)
    counted = [row * (WIDTH - 1) + time for row, count in enumerate(read_b) for time in range(count)]
    np.testing.assert_array_equal(np.sort(place_n[: len(counted)]), counted)
    assert np.all(place_n[len(counted) :] == -1)


def test_what_is_kept_is_what_is_used_and_no_kernel_is_multiplied_forward():
    arch, trained, base, _ = policy_of("qwen2")
    batch = batch_of("qwen2", 0)
    wrong = jax.tree.map(lambda x: x, batch.kept.products)
    wrong["layers_1"]["gate"]["product"] *= 1.5
    other = dataclasses.replace(batch, kept=batch.kept._replace(products=wrong))
    before, after = (gradient("qwen2", one)[0] for one in (batch, other))
    differs = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, after)
    assert differs["layers_1"]["gate"]["kernel"] > 1e-3

    def flops(batch):
        return work.flops(
            lambda trained, batch: step.gradient(trained, base, arch, ALGORITHM, batch, None, 0.3, 0.5), trained, batch
        )

    tokens = batch.prompt_tokens.size + batch.packing.place_cn.size
    saved = 2 * work.layer_parameters(arch) * tokens
    assert flops(dataclasses.replace(batch, kept=None)) - flops(batch) == saved


def test_an_update_can_be_of_any_size_that_holds_its_tokens():
    found = [gradient("qwen2", batch_of("qwen2", 0, buckets))[0] for buckets in (1, 9)]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-11)


def test_several_updates_parts_or_devices_are_refused_in_one_line():
    for changes, said in (
        ({"optimiser": Optimiser(micro_batches=2)}, "optimiser.micro_batches=2"),
        ({"optimiser": Optimiser(updates=2), "algorithm": Algorithm(importance="token")}, "optimiser.updates=2"),
        ({"rollout": Rollout(keep="products", length_buckets=0)}, "rollout.length_buckets=0"),
        ({"rollout": Rollout(keep="all")}, "choose nothing, products"),
    ):
        run = LanguageRun(**{"rollout": Rollout(keep="products"), "warmup": Warmup(steps=1), **changes})
        with pytest.raises(ValueError, match=said):
            config.check(run)
    two = sharding.layout(jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor")))
    with sharding.use(two), pytest.raises(ValueError, match="is for one device, and this run has 2"):
        shape.keeps(Rollout(keep="products"))
    batch = batch_of("qwen2", 0)
    arch, _, _, params = policy_of("qwen2")
    ids_bt = batch.tokens.reshape(-1, WIDTH)
    of = (arch, params, batch.prompt_tokens, batch.prompt_lengths, ids_bt, ids_bt, batch.packing, batch.kept)
    with sharding.use(two), pytest.raises(ValueError, match="kept from a rollout serve one device"):
        transformer.forward_group(*of)
