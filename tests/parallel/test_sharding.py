"""The table from logical to mesh axes, sizes of meshes, and what is refused: all of it without devices."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mara_jax import config
from mara_jax.parallel import joining, mesh, sharding
from mara_jax.policies import parameters, transformer

ARCH = transformer.Architecture(
    family="qwen2", vocab_size=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48
)


def layout(data: int, fsdp: int, tensor: int, overrides: str = "") -> sharding.Layout:
    abstract = AbstractMesh((data, fsdp, tensor), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
    return sharding.layout(abstract, overrides)  # pyright: ignore[reportArgumentType]


def test_sizes_of_a_mesh():
    assert mesh.resolve_sizes({"data": -1, "fsdp": 2, "tensor": 2}, 8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.resolve_sizes({"data": 1, "fsdp": -1, "tensor": 1}, 8) == {"data": 1, "fsdp": 8, "tensor": 1}
    for wanted, told in (
        ((3, 1, 1), "makes 3 devices, there are 8"),
        ((-1, 3, 1), "3 does not divide the 8 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "each size is at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            mesh.resolve_sizes(dict(zip(mesh.AXES, wanted, strict=True)), 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What placing a mesh asks of a TPU's chip."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


@pytest.mark.parametrize(
    ("kind", "slice_of", "wanted"),
    [("TPU v6 lite", (4, 4, 1), (4, 2, 2)), ("TPU v5", (4, 4, 4), (16, 2, 2)), ("TPU v5", (4, 4, 4), (8, 4, 2))],
)
def test_a_mesh_may_split_the_axes_of_a_slice(kind, slice_of, wanted):
    """Every chip has one place, and those of a tensor axis are neighbours."""
    coords = itertools.product(*map(range, slice_of))
    chips = [Chip(number, at, kind) for number, at in enumerate(coords)]  # pyright: ignore[reportArgumentType]
    made = mesh.make_mesh(dict(zip(mesh.AXES, wanted, strict=True)), chips)
    assert dict(made.shape) == dict(zip(mesh.AXES, wanted, strict=True))
    assert {chip.id for chip in made.devices.flat} == set(range(len(chips)))
    for pair in made.devices.reshape(-1, 2):
        assert sum(abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords, strict=True)) == 1


def test_slices_lie_along_the_outermost_axes():
    """Two slices of 2 x 2 chips: only data, or where it is 1 the outer half of fsdp, crosses the slow network."""
    coords = list(itertools.product(range(2), range(2), [0]))
    chips: Any = [Chip(4 * n + i, at, "TPU v5 lite", slice_index=n) for n in range(2) for i, at in enumerate(coords)]
    for wanted in ((2, 2, 2), (1, 8, 1), (1, 4, 2), (8, 1, 1)):
        made = mesh.make_mesh(dict(zip(mesh.AXES, wanted, strict=True)), chips)
        assert made.devices.shape == wanted
        assert [chip.slice_index for chip in made.devices.flat] == [0] * 4 + [1] * 4
    three: Any = [Chip(4 * n + i, at, "TPU v5 lite", slice_index=n) for n in range(3) for i, at in enumerate(coords)]
    with pytest.raises(ValueError, match="on 3 slices: let mesh"):
        mesh.make_mesh({"data": 4, "fsdp": 1, "tensor": 3}, three)


def test_gpus_of_several_hosts_make_one_mesh():
    """Each host is a slice of its own there; the devices of a tensor axis share one."""
    gpus: Any = [Chip(i, (0, 0, 0), "NVIDIA H100", "gpu", process_index=i // 8, slice_index=i // 8) for i in range(16)]
    for wanted in ((2, 4, 2), (1, 16, 1)):
        made = mesh.make_mesh(dict(zip(mesh.AXES, wanted, strict=True)), gpus)
        assert [gpu.id for gpu in made.devices.flat] == list(range(16))


def test_a_kernel_is_cut_over_fsdp_and_tensor():
    two = layout(2, 2, 2)
    assert sharding.partition_spec(two, ("embed", "heads")) == PartitionSpec("fsdp", "tensor")
    assert sharding.partition_spec(two, ("rows", None, "heads")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert sharding.partition_spec(layout(8, 1, 1), ("embed", "heads")) == PartitionSpec(
        None, None
    )  # axes of size 1 are left out
    moved = layout(2, 2, 2, "embed:data+fsdp, kv_heads:none")
    assert sharding.partition_spec(moved, ("embed", "kv_heads")) == PartitionSpec(("data", "fsdp"), None)


def test_every_parameter_has_its_place_and_so_have_its_moments():
    two, leaves = layout(2, 2, 2), parameters.leaf_shapes(ARCH)
    placed = sharding.param_shardings(two, leaves)
    assert placed["layers_1"]["q"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["layers_0"]["q"]["bias"].spec == PartitionSpec("tensor")
    assert placed["embed"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    held = sum(np.prod(parameters.at(placed, path).shard_shape(shape)) for path, (shape, _) in leaves.items())
    norms = 5 * 32  # cut in 2, the rest in 4 but for biases, cut in 2
    biases = 2 * (32 + 16 + 16)
    assert held == (parameters.count(ARCH) - norms - biases) / 4 + (norms + biases) / 2
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    shapes = jax.eval_shape(lambda: transformer.init(ARCH, jax.random.key(0)))
    state = sharding.opt_state_shardings(two, tx, jax.eval_shape(tx.init, shapes), placed)
    adam = state[1][0]
    assert adam.mu == placed and adam.nu == placed
    assert adam.count.spec == PartitionSpec()


def test_a_norm_over_all_heads_lies_where_the_heads_lie():
    arch, two = dataclasses.replace(ARCH, family="olmo2"), layout(2, 2, 2, "kv_heads:none")
    placed = sharding.param_shardings(two, parameters.leaf_shapes(arch))["layers_0"]
    assert placed["q"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["q_norm"]["scale"].spec == PartitionSpec("tensor")
    assert placed["k_norm"]["scale"].spec == PartitionSpec(None)


@pytest.mark.parametrize(
    ("sizes", "overrides", "expected"),
    [
        ((2, 2, 2), "", (("tensor", "fsdp"), None)),  # parts of a tensor shard lie together once fsdp is gathered
        ((1, 8, 1), "", ("fsdp", None)),
        ((8, 1, 1), "", (None, None)),
        ((1, 1, 8), "", ("tensor", None)),
        ((2, 2, 2), "embed:data+fsdp", (("tensor", "data", "fsdp"), None)),
        ((2, 2, 2), "embed:none", ("tensor", None)),
        ((1, 32, 1), "", (None, "fsdp")),  # 48 inputs in 32 parts cannot be, so it is cut by its 32 outputs
    ],
)
def test_a_kernel_back_to_the_residual_stream_is_cut_by_its_inputs(sizes, overrides, expected):
    found = layout(*sizes, overrides)
    assert sharding.param_sharding(found, ("mlp", "embed"), (48, 32)).spec == PartitionSpec(*expected)
    stacked = sharding.param_sharding(found, ("layers", "mlp", "embed"), (2, 48, 32))
    assert stacked.spec == PartitionSpec(None, *expected)
    for axes in (("embed", "mlp"), ("vocab", "embed"), ("layers", "embed")):  # all others as the table says
        assert sharding.param_sharding(found, axes, (64, 64)).spec == sharding.partition_spec(found, axes)


def _shapes_of_scans(jaxpr):
    """Of each scan in a program the shapes that it stacks, one layer's share of each, as a set."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield {var.aval.shape[1:] for var in equation.outvars[equation.params["num_carry"] :]}
        for value in equation.params.values():
            yield from _shapes_of_scans(value.jaxpr) if hasattr(value, "jaxpr") else ()


@pytest.mark.parametrize("remat", config.REMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_gathered_kernel_is_kept_for_the_backward_pass(remat, dtype):
    """Of all layers together they would be the whole model, on every device; only their gradients are stacked."""
    arch = dataclasses.replace(ARCH, scan_layers=True, remat=remat, compute_dtype=dtype)
    tree: dict[str, Any] = {}
    for path, (shape, _) in parameters.leaf_shapes(arch).items():
        parameters.put(tree, path, jax.ShapeDtypeStruct(shape, jnp.float32))
    tokens_bt = jax.ShapeDtypeStruct((8, 3), jnp.int32)

    def loss(tree, tokens_bt):
        hidden_btd, _ = transformer.forward(arch, tree, tokens_bt, jnp.zeros_like(tokens_bt))
        return jnp.sum(hidden_btd.astype(jnp.float32) ** 2)

    with sharding.use(layout(1, 8, 1)):
        forward, backward = _shapes_of_scans(jax.make_jaxpr(jax.grad(loss))(tree, tokens_bt).jaxpr)
    kernels = {
        shape[1:] for shape, axes in parameters.leaf_shapes(arch).values() if axes[0] == "layers" and len(shape) == 3
    }
    assert kernels <= backward and not kernels & forward


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("kv:none", "LOGICAL is one of rows, embed"),
        ("heads", "write LOGICAL:MESH"),
        ("heads:sequence", "mesh axes are data, fsdp, tensor"),
        ("heads:tensor+tensor", "each at most once"),
        ("heads:fsdp", "both 'rows' and 'heads' on mesh axis 'fsdp'"),
    ],
)
def test_overrides_that_cannot_be(overrides, told):
    with pytest.raises(ValueError, match=told):
        layout(2, 2, 2, overrides)


def test_collisions_and_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="gate would have both 'embed' and 'mlp' on mesh axis 'tensor'"):
        sharding.partition_spec(layout(2, 2, 2, "embed:tensor"), ("embed", "mlp"), "gate")
    with pytest.raises(ValueError, match=r"has 2 .*'kv_heads', which mesh.tensor=4 .*=kv_heads:none"):
        sharding.check_divisible(layout(1, 2, 4), parameters.axis_sizes(ARCH))
    sharding.check_divisible(layout(1, 2, 4, "kv_heads:none"), parameters.axis_sizes(ARCH))
    with pytest.raises(ValueError, match=r"embed/embedding has 32 .*mesh.fsdp=3"):
        sharding.param_shardings(layout(1, 3, 1), parameters.leaf_shapes(ARCH))
    with pytest.raises(ValueError, match="lacks: it has"):
        sharding.partition_spec(layout(1, 1, 1), ("head",))


@pytest.mark.parametrize(
    ("prompts", "samples", "expected"),
    [
        (1, 8, ((), ("data", "fsdp"))),  # one group over all devices
        (4, 3, (("data", "fsdp"), ())),  # whole groups
        (2, 6, (("data",), ("fsdp",))),
        (3, 4, ((), ("data", "fsdp"))),
    ],
)
def test_rows_are_cut_into_equal_runs(prompts, samples, expected):
    assert sharding.row_axes(layout(2, 2, 2), prompts, samples) == expected


def test_rows_that_do_not_divide_are_refused_in_training_and_whole_elsewhere():
    with pytest.raises(ValueError, match=r"1 prompts .* x 6 samples .* cut into 4 .*multiple of 4"):
        sharding.row_axes(layout(2, 2, 2), 1, 6)
    assert [s.is_fully_replicated for s in sharding.row_shardings(layout(2, 2, 2), 1, 6)] == [True, True]


def test_without_a_layout_nothing_is_constrained():
    array = jax.numpy.ones((2, 3))
    assert sharding.current() is None and sharding.constrain(array, "rows") is array
    with sharding.use(layout(1, 1, 1)):
        assert sharding.current() is None  # one device


OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None, None), None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
        ({"SLURM_STEP_NUM_TASKS": "2"}, (None, None, None), {}),
        (OMPI | {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.0.0.1:1"}, (None, None, None), {}),
        (OMPI, ("a:1", None, None), ("a:1", 4, 3)),
        ({}, ("a:1", 2, 1), ("a:1", 2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("a:1", 2, 1), ("a:1", 2, 1)),
    ],
)
def test_processes_are_found_or_named(environment, given, expected):
    if isinstance(expected, tuple):
        names = ("coordinator_address", "num_processes", "process_id")
        expected = dict(zip(names, expected, strict=True)) | {"cluster_detection_method": "deactivate"}
    assert joining.distributed_arguments(environment, *given) == expected


@pytest.mark.parametrize(
    ("environment", "given", "told"),
    [
        ({}, ("a:1", 2, None), "--process_id is missing"),
        (OMPI, (None, None, None), "--coordinator_address is missing"),
        ({}, ("a", 2, 1), "'a' is no HOST:PORT"),
        ({}, ("a:1", 2, 2), "between 0 and 1"),
        ({}, ("a:1", 0, 0), "at least 1"),
    ],
)
def test_flags_of_processes_that_cannot_be(environment, given, told):
    with pytest.raises(ValueError, match=told):
        joining.distributed_arguments(environment, *given)
