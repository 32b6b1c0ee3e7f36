"""What plan counts from shapes, texts and numbers alone: against hand arithmetic and brute force."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from jax.sharding import AbstractMesh, AxisType

from mara_jax import config
from mara_jax.hf import shapes
from mara_jax.parallel import mesh, sharding
from mara_jax.plan import abstract, chips, command, hlo, phases, planning, suggest
from mara_jax.policies import parameters
from mara_jax.train import capacity, reward_model, shape

ROOT = pathlib.Path(__file__).parents[2]
NANO = f"--config={ROOT}/configs/onetwo.py:nano"
RUN = config.LanguageRun(rollout=config.Rollout(prompts_per_step=2, group_size=8, max_new_tokens=10))


def layout(data: int, fsdp: int, tensor: int) -> sharding.Layout:
    abstract = AbstractMesh((data, fsdp, tensor), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
    return sharding.layout(abstract)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736),
        ("allenai/OLMo-2-1124-7B", 7_298_617_344),
    ],
)
def test_published_shapes_have_the_published_numbers_of_parameters(name, count):
    assert parameters.count(shapes.architecture_of(name)) == count


def test_a_shape_comes_from_a_config_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shapes.PUBLISHED["qwen2.5-3b"]))
    found = shape.policy_architecture(config.Policy(weights=str(tmp_path), remat="layer"))
    assert (found.embed, found.layers, found.kv_heads, found.remat) == (2048, 36, 2, "layer")
    with pytest.raises(FileNotFoundError, match="the shape of 'somebody/unknown' is not known"):
        shape.policy_architecture(config.Policy(weights="somebody/unknown"))


# nano: 2 layers of 128, 4 heads of 32 (2 for keys), feed-forward 512, 512 words.
KERNELS = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512)
NORMS, BIASES = 5 * 128, 2 * (128 + 64 + 64)


@pytest.mark.parametrize(("cut", "ways"), [((8, 1, 1), (1, 1, 1)), ((1, 8, 1), (8, 8, 1)), ((2, 2, 2), (4, 2, 2))])
def test_what_a_device_holds_by_hand(cut, ways):
    """Kernels are cut over fsdp and tensor, norms over fsdp alone, biases over tensor alone."""
    own = 4 * (KERNELS // ways[0] + NORMS // ways[1] + BIASES // ways[2])
    rows, heads = 16 // (cut[0] * cut[1]), 2 // cut[2]
    with sharding.use(layout(*cut)):
        held = capacity.held(RUN, shape.nano(RUN.policy))
    # Two moments, and Adam's count of steps.
    assert held == (own, own, 2 * own + 4, 2 * 2 * rows * heads * 10 * 32 * 4, 0)


ADAPTED = dataclasses.replace(RUN, lora=config.Lora(rank=4, targets="q,up"))


def test_with_an_adapter_a_device_holds_one_policy_and_the_adapters_moments():
    """q maps 128 to 128, up 128 to 512: the factors' side of 4 is never cut, 128 over fsdp, heads and 512 over
    tensor."""
    with sharding.use(layout(2, 2, 2)):
        held, whole = (capacity.held(run, shape.run_architecture(run)) for run in (ADAPTED, RUN))
    own = 4 * 2 * (4 * (128 // 2 + 128 // 2) + 4 * (128 // 2 + 512 // 2))
    assert held == (own, whole.reference, 2 * own + 4, whole.cache, 0)


def test_the_work_of_an_adapted_policy_by_hand():
    """Factors take 2 FLOPs a number and position forward, 6 in an update, which leaves out the gradients of frozen
    kernels and of the table, 2 each. Decoding multiplies them out once, 2 FLOPs a number of the kernel and rank."""
    sizes = abstract.Sizes(2, 32, 8, 10)
    rollout, reference, update = (
        [abstract.phase_programs(run, shape.run_architecture(run), sizes)[name].flops() for run in (RUN, ADAPTED)]
        for name in abstract.PHASES
    )
    adapter, kernels, layers = 2 * 4 * (128 + 128 + 128 + 512), 2 * (128 * 128 + 128 * 512), KERNELS - 512 * 128
    prompts, read, predicted = 2 * 32, 16 * 9, 16 * 10
    assert rollout[1] - rollout[0] == 2 * adapter * prompts + 2 * 4 * kernels
    assert reference[1] == reference[0]
    frozen = 2 * layers * (prompts + read) + 2 * 512 * 128 * predicted
    # Nothing is trained below the first layer's q: no gradient of its input, nor of its keys and values.
    # But by q's thin factor it is made: the normed input, made anew for that factor's gradient, waits for it.
    below = 2 * (128 * 128 + 2 * 128 * 64) * (prompts + read)
    pairs = 2 * 32 * 32 + 16 * 9 * 9 + 16 * 9 * 32
    assert update[1] - update[0] == 6 * adapter * (prompts + read) - frozen - below - 2 * 2 * 128 * pairs


def test_the_reference_of_a_bfloat16_policy_is_held_in_it_but_for_norms():
    arch = dataclasses.replace(shape.nano(RUN.policy), compute_dtype="bfloat16")
    with sharding.use(layout(1, 8, 1)):
        held = capacity.held(RUN, arch)
    assert held.reference == 2 * KERNELS // 8 + 4 * NORMS // 8 + 2 * BIASES
    assert held.parameters == 4 * (KERNELS // 8 + NORMS // 8 + BIASES)


SCORING = dataclasses.replace(shape.nano(RUN.policy), score_head=True)


@pytest.mark.parametrize(("cut", "ways"), [((8, 1, 1), (1, 1, 1)), ((2, 2, 2), (4, 2, 2))])
def test_a_device_also_holds_its_share_of_a_reward_model(cut, ways):
    """Kernels, norms and biases as the policy's; a score of 128 numbers, cut over fsdp, in float32 beside bfloat16."""
    with sharding.use(layout(*cut)):
        alone, scored = (capacity.held(RUN, shape.nano(RUN.policy), arch) for arch in (None, SCORING))
        narrow = dataclasses.replace(SCORING, compute_dtype="bfloat16")
        of_narrow = capacity.held(RUN, shape.nano(RUN.policy), narrow).reward_model
    kernels, norms, biases = KERNELS // ways[0], NORMS // ways[1], BIASES // ways[2]
    assert scored == alone._replace(reward_model=4 * (kernels + norms + biases + 128 // ways[1]))
    assert of_narrow == 2 * (kernels + biases) + 4 * (norms + 128 // ways[1])


def test_scores_are_planned_as_they_are_made():
    """The shapes of the calls are those of rows of the full length; work and bytes by hand."""
    sizes = abstract.Sizes(2, 32, 100, 10)
    program = abstract.scores_program(SCORING, sizes)
    made = [tokens.shape for _, tokens, _ in reward_model.batches([[number] * 42 for number in range(200)], shards=1)]
    assert made == [(32, 64)] * 6 + [(8, 64)] and program.calls == 7 and program.batch[0].shape == (32, 64)
    tokens = 7 * 32 * 64
    layers, pairs, rotary = 2 * (KERNELS - 512 * 128) * tokens, 4 * 2 * 4 * 32 * 64 * tokens, tokens * 32**2
    assert program.flops() == layers + pairs + rotary
    with sharding.use(layout(1, 2, 2)):
        assert abstract.scores_program(SCORING, sizes._replace(group=3)).batch[0].shape == (8, 64)  # six, rounded up
        assert phases.least_bytes("scores", SCORING, sizes) == 4 * (KERNELS + NORMS + BIASES + 128) / 2
    with pytest.raises(ValueError, match=r"prompts of 512 tokens .* longer than the 512 that the reward model reads"):
        abstract.scores_program(SCORING, sizes._replace(prompt_tokens=512))


def test_a_compiler_counts_no_reward_model_but_in_its_own_phase():
    """What a program does not take stays beside it: 100 bytes used, of which those that it takes are known."""
    known = phases.Memory(parameters=10, reference=20, optimiser=30, reward_model=15, cache=0, batch=5, temporaries=0)
    taken = {"rollout": 10 + 5, "scores": 15 + 5, "reference": 20 + 5, "update": 10 + 20 + 30 + 5}
    for name, size in taken.items():
        assert phases._refused(name, known, (100, False), adapted=False).temporaries == 100 - size, name


def test_a_reward_model_is_part_of_a_suggestion():
    """A mesh must divide its width, too, and its bytes and seconds are counted."""
    arch, sizes = shape.nano(RUN.policy), abstract.Sizes(8, 32, 8, 10)
    odd = dataclasses.replace(SCORING, embed=126)
    assert all(mesh.fsdp <= 2 for mesh in suggest.meshes(RUN, arch, sizes, 8) if suggest._divides(odd, mesh))
    chip = chips.Chip("c", 1e12, {"float32": 1e12}, 1e12, 1e12)
    alone, scored = (
        suggest.estimate(RUN, arch, sizes, chip, suggest.MeshShape(2, 2, 2), one) for one in (None, SCORING)
    )
    assert scored.bytes - alone.bytes == pytest.approx(4 * (KERNELS + NORMS + BIASES + 128) / 4)
    read = 64 * (32 + 10)
    layers = KERNELS - 512 * 128
    assert scored.seconds - alone.seconds == pytest.approx(2 * layers * read / 8 / 1e12)


def test_a_run_without_room_is_refused_with_its_parts():
    arch = shape.nano(RUN.policy)
    with sharding.use(layout(1, 8, 1)):
        need = capacity.held(RUN, arch).total
        capacity.check(RUN, arch, need)
        with pytest.raises(
            ValueError, match=r"a device must hold .* \(parameters .*, cache .*cut it over more devices"
        ):
            capacity.check(RUN, arch, need - 1)
        capacity.check(RUN, arch, 8 * need, devices=8)
        with pytest.raises(ValueError, match="the host of 8 devices must hold"):
            capacity.check(RUN, arch, 8 * need - 1, devices=8)
        scored = capacity.held(RUN, arch, SCORING)
        capacity.check(RUN, arch, scored.total, reward_arch=SCORING)
        with pytest.raises(ValueError, match=r"cache .*, reward model .*\)"):
            capacity.check(RUN, arch, scored.total - 1, reward_arch=SCORING)
        large = dataclasses.replace(SCORING, mlp=1 << 20)
        with pytest.raises(ValueError, match=r"task.reward_model_dtype=bfloat16"):
            capacity.check(RUN, arch, need, reward_arch=large)
        long = dataclasses.replace(RUN, rollout=dataclasses.replace(RUN.rollout, max_new_tokens=100_000))
        with pytest.raises(ValueError, match=r"lower rollout\.prompts_per_step"):
            capacity.check(long, arch, need)


TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,16]) -> f32[8,16] {
  %all-reduce.9 = f32[64,16]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add.1
  ROOT %slice = f32[8,16]{1,0} dynamic-slice(%all-reduce.9, %at)
}

%body.2 (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[4,8]{1,0} all-gather-done(%ag)
  %rs = f32[8,16]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

%cond.2 (carry: (s32[], bf16[4,8])) -> pred[] {
  %any = pred[] all-reduce(%done), replica_groups={}, to_apply=%add.1
}

%async_collective_fusion.1 (p: f32[4]) -> f32[8] {
  %ag.5 = f32[8]{0:T(128)} all-gather(%p), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}
}

%async_collective_fusion.2 (p: f32[4]) -> f32[8] {
  %ag.6 = f32[8]{0:T(128)} all-gather(%p), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}
}

%body.3 (carry: (u32[], f32[3])) -> (u32[], f32[3]) {
  %f1 = f32[8] fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = f32[8] fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  %a2a = f32[3]{0:T(128)} all-to-all(%x), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = (u32[]{:T(128)}, f32[3]{0:T(128)}) tuple(%next, %a2a)
}

%cond.3 (carry: (u32[], f32[3])) -> pred[] {
  %constant.7 = u32[]{:T(128)} constant(13), metadata={op_name="while"}
  %carry = (u32[]{:T(128)}, f32[3]{0:T(128)}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%at, %constant.7), direction=LT
}

%body.4 (carry: (s32[])) -> (s32[]) {
  ROOT %same = (s32[]) tuple(%carry)
}

%body.5 (carry: (s32[])) -> (s32[]) {
  %ag = bf16[6,8]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%cond.4 (carry: (s32[])) -> pred[] {
  ROOT %any = pred[] fusion(%carry), kind=kLoop, calls=%add.1
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %ar = (f32[10]{0}, bf16[6]{0}) all-reduce(%p, %q), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add.1
  %cp = f32[16]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %w1 = (s32[], bf16[4,8]) while(%t), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %w2 = (s32[], bf16[4,8]) while(%t), condition=%cond.2, body=%body.2
  %w3 = (u32[], f32[3]) while(%t), condition=%cond.3, body=%body.3
  %w4 = (s32[]) while(%t), condition=%cond.4, body=%body.4
  %w5 = (s32[], bf16[4,8]) while(%t), condition=%cond.4, body=%body.5
}
"""


def test_collectives_are_read_from_hlo_text():
    """Five rounds of a loop that tells, seven of one that counts by two, three and four of those that do not, by hand.

    The one of these that has no exchanges takes no number.
    """
    found = {(one.kind, one.group, one.count, one.bytes, one.sent) for one in hlo.collectives(TEXT, trips=(3, 4))}
    assert found == {
        ("all-gather", 4, 8, 64, 8 * 48),
        ("reduce-scatter", 8, 8, 512, 8 * 7 * 512),
        ("all-reduce", 8, 8, 1, 8 * 1),
        ("all-gather", 2, 4, 96, 4 * 48),
        ("all-reduce", 4, 1, 52, 2 * 39),
        ("collective-permute", 2, 1, 64, 64),
        ("all-to-all", 2, 7, 12, 7 * 6),
        ("all-gather", 2, 7, 32, 7 * 16),  # one, spread over two fusions
    }


@pytest.mark.parametrize("most", [1, 2, 7, 30])
def test_the_largest_batch_is_the_largest(most):
    """Against counting: every threshold, start and guess; what fits and what does not are neighbours."""
    for limit in range(most + 2):
        for first in range(1, most + 1):
            for guess in (None, 0, 1, limit, most, most + 5):
                fits, fails = planning.largest(lambda units, limit=limit: units <= limit, first, most, guess)
                assert fits == min(limit, most)
                assert fails == (None if limit >= most else limit + 1)


def test_a_right_guess_is_confirmed_by_two_questions():
    asked = []
    planning.largest(lambda units: asked.append(units) or units <= 40, 1, 1000, guess=40)
    assert asked == [40, 41]
    asked.clear()
    planning.largest(lambda units: asked.append(units) or units <= 37, 1, 1000, guess=40)
    assert asked == [40, 39, 37, 38]
    assert planning.extrapolated((2, 10.0), (4, 14.0), 85.0) == 39  # 6 + 2 a unit
    assert planning.extrapolated((2, 10.0), (4, 14.0), 5.0) == 0


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
            (int(17.5 * 2**30), False),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.25G) "
            "exceeds available HBM (15.75G).",
            (int(40.25 * 2**30), True),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.", (4096, False)),
        ("INVALID_ARGUMENT: used 3G of patience", None),
    ],
)
def test_bytes_of_a_compilers_refusal(message, needed):
    """The second message is what libtpu 0.0.42 says."""
    assert phases.needed_bytes(message) == needed


def test_the_floor_is_by_hand():
    chip = chips.Chip("c", 1.0, {"bfloat16": 2e12}, 4e9, 5e9)
    assert phases.floor(chip, "bfloat16", 6e12, 8e9, 1e9) == {"compute": 3.0, "memory": 2.0, "links": 0.2}
    assert phases.floor(chip, "float64", 6e12, 8e9, 1e9) == {}


def test_least_bytes_of_the_phases_by_hand():
    """Nano on fsdp 2 x tensor 2: 2 sequences a device of 10 tokens after a prompt of 32."""
    arch, count = shape.nano(RUN.policy), KERNELS + NORMS + BIASES
    sizes = abstract.Sizes(2, 32, 2, 10)
    with sharding.use(layout(1, 2, 2)):
        assert phases.least_bytes("reference", arch, sizes) == 4 * count / 2
        assert phases.least_bytes("update", arch, sizes) == 4 * count + 24 * count / 4
        slot = 2 * 2 * 1 * 32 * 4  # keys and values, layers, one head here, its width
        assert phases.least_bytes("rollout", arch, sizes) == 10 * 2 * count + 9 * slot * (32 + 2 * 5)


def test_a_rollout_of_fewer_rows_takes_more_steps_and_less_cache():
    """16 completions of 10 tokens, 6 rows at once: three rounds of nine steps after the first token."""
    sizes = abstract.sizes_of(dataclasses.replace(RUN, rollout=dataclasses.replace(RUN.rollout, slots=6)), 20)
    assert (sizes.rows, sizes.steps) == (6, 27)
    few = dataclasses.replace(RUN, rollout=dataclasses.replace(RUN.rollout, slots=4))
    arch = shape.nano(RUN.policy)
    assert 4 * capacity.cache_bytes(few, arch) == capacity.cache_bytes(RUN, arch)


@pytest.mark.parametrize(("name", "cut", "compiled"), [("3b", (1, 8, 1), 11.91), ("7b", (1, 8, 1), 29.49)])
def test_estimates_are_near_what_was_compiled(name, cut, compiled):
    """GiB that plan found for 8 H100, a third up or a tenth down."""
    choices: Any = {"compute_dtype": "bfloat16", "remat": "layer", "scan_layers": True, "attention": "kernels"}
    policy = config.Policy(weights=f"qwen2.5-{name}", **choices)
    run = config.LanguageRun(policy=policy, rollout=config.Rollout(16, 16, 480))
    candidate = suggest.estimate(
        run,
        shape.policy_architecture(policy),
        abstract.Sizes(16, 32, 16, 480),
        chips.CHIPS["v5e"],
        suggest.MeshShape(*cut),
    )
    assert 0.9 < candidate.bytes / 2**30 / compiled < 1.33


def test_a_mesh_is_suggested_that_divides_and_has_room():
    """3B: alone on H100s parameters and moments, 46 GiB, leave no room; on v5e all 16 chips must share them."""
    policy = config.Policy(weights="qwen2.5-3b", compute_dtype="bfloat16", remat="layer", scan_layers=True)
    run = config.LanguageRun(policy=policy, rollout=config.Rollout(16, 16, 480))
    arch, sizes = shape.policy_architecture(run.policy), abstract.Sizes(16, 32, 16, 480)
    for kind, count in (("v5e", 16), ("h100", 8)):
        best = suggest.best(run, arch, sizes, chips.CHIPS[kind], count)
        assert best is not None
        assert best.data * best.fsdp * best.tensor == count
        assert best.fsdp * best.tensor > 1
        assert best.bytes < chips.CHIPS[kind].memory
    for data, fsdp, tensor in suggest.meshes(run, arch, sizes, 16):
        assert 2 % tensor == 0  # key heads
        sharding.row_axes(layout(data, fsdp, tensor), 16, 16)
    assert suggest.best(run, arch, sizes._replace(prompts=1, group=3), chips.CHIPS["v5e"], 16) is None


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([NANO], "--topology is missing, as in python -m mara_jax.plan"),
        (["--topology=cpu:8"], "--config is missing"),
        ([NANO, "--topology=v9:8"], "--topology='v9:8' is none: write KIND:SIZE, as in v5e:4x4"),
        ([NANO, "--topology=v5p:4x4"], "v5p has 3 sizes, as in v5p:4x4x4"),
        ([NANO, "--topology=h100:2x4"], "h100 has 1 size, as in h100:8"),
        ([NANO, "--topology=cpu:8", "--shape=gpt"], "--shape='gpt' is not known: choose one of qwen2.5-0.5b"),
        ([NANO, "--topology=cpu:8", "--config.rollout.groups=1"], "rollout has no 'groups'"),
        ([f"--config={ROOT}/configs/toy.py", "--topology=cpu:8"], "the toy needs no plan"),
    ],
)
def test_bad_input_is_one_line(argv, told, capsys):
    assert command.main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mara_jax: ") and error.count("\n") == 1 and told in error


@pytest.mark.parametrize(("kind", "told"), [("v5e:4x4", "pip install 'jax[tpu]=="), ("h100:8", "jax-cuda12-pjrt==")])
def test_a_missing_compiler_is_named(kind, told, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="but no") as error:
        chips.devices(chips.parse(kind))
    assert told in str(error.value)
