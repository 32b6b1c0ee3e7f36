"""Plans made by compiling, each in its own process: known bytes, real steps, compilers that may be there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from mara_jax.plan import chips

HERE, ROOT = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[2]
SMALL = ["policy.layers=1", "policy.embed=128", "rollout.prompts_per_step=4", "rollout.group_size=4"]
SMALL += ["rollout.max_new_tokens=4", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [clean.get("PYTHONPATH")])]
    environment = clean | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def plan(topology: str, *fields: str, **environment: str) -> dict:
    flags = [f"--config={ROOT}/configs/onetwo.py:nano", f"--topology={topology}", "--prompt_tokens=20", "--json"]
    return json.loads(
        run("-m", "mara_jax.plan", *flags, *(f"--config.{field}" for field in fields), **environment).stdout
    )


@pytest.fixture(scope="module")
def exchanged() -> dict:
    return json.loads(run(str(HERE / "collectives_program.py")).stdout)


def test_collectives_of_a_hand_made_program(exchanged):
    """Five kernels of 64 x 64 over 4 devices: each receives three quarters; one sum of 64 numbers over the same 4."""
    sent: dict[tuple, int] = {}
    for one in exchanged["chain"]:
        sent[one["kind"], one["group"]] = sent.get((one["kind"], one["group"]), 0) + one["sent"]
    assert sent == {("all-gather", 4): 5 * 64 * 64 * 4 * 3 // 4, ("all-reduce", 4): 2 * 64 * 4 * 3 // 4}


def test_the_heads_gradient_is_summed_over_devices_once_not_in_every_chunk(exchanged):
    size = 512 * 64 * 4
    reduced = [one for one in exchanged["head"] if one["kind"] != "all-gather"]
    assert not any(one["looped"] for one in exchanged["head"])
    assert [(one["group"], one["count"]) for one in reduced] == [(8, 1)]
    assert reduced[0]["sent"] <= 2 * size * 7 // 8


@pytest.mark.slow
def test_a_plan_for_simulated_devices():
    record = plan("cpu:8", *SMALL, "rollout.max_new_tokens=256", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert record["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and record["devices"] == 8
    assert record["shape"]["prompt_tokens"] == 32  # padded
    # One layer of 128, 4 heads of 32 (2 for keys), feed-forward 512, 512 words. Kernels are cut in 4, norms over fsdp,
    # biases over tensor; Adam and the schedule count steps.
    kernels = 512 * 128 + 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512
    own = 4 * (kernels // 4 + 3 * 128 // 2 + (128 + 64 + 64) // 2)
    for name, phase in record["phases"].items():
        memory = phase["memory"]
        assert (memory["parameters"], memory["reference"], memory["optimiser"]) == (own, own, 2 * own + 8)
        # 4 rows a device, one of the two key heads, 256 slots of 32 float32 numbers, keys and values.
        assert memory["cache"] == (2 * 4 * 1 * 256 * 32 * 4 if name == "rollout" else 0)
        assert phase["told"] == "compiled" and memory["temporaries"] > 0
        assert memory["total"] == sum(memory.values()) - memory["total"]
        assert 0 < phase["sent"] == sum(one["sent"] for one in phase["collectives"])
    # Decoding: 255 steps, at each of which devices ask whether all rows have ended.
    looped = [one for one in record["phases"]["rollout"]["collectives"] if one["looped"]]
    assert {one["count"] % 255 for one in looped} == {0} and 255 in {one["count"] for one in looped}
    assert record["fits"] and "It fits: " in record["verdict"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_a_population_is_planned_beside_single_runs(devices):
    """Four members: on three devices one each, and one is left; a single run's 8 completions three cannot divide."""
    small = [field for field in SMALL if not field.startswith("mesh") and "prompts_per_step" not in field]
    fields = [*small, "rollout.group_size=8", "lora.rank=2", "population.seeds=4", "population.at_once=12"]
    record = plan(f"cpu:{devices}", *fields, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    count = {2: 4, 3: 3}[devices]
    assert (record["shape"]["members"], record["members"], record["members_on_a_device"]) == (
        count,
        4,
        count // devices,
    )
    assert record["fits"] and f"{count} of 4 members side by side" in record["verdict"]
    assert (record["alone_s"] is None) == (devices == 3)
    assert all(phase["collectives"] == [] for phase in record["phases"].values())


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    ("shape_of", "fields"),
    [
        ("nano", {"mesh.fsdp": 8, "rollout.group_size": 32, "rollout.max_new_tokens": 48}),
        (
            [4, 256, 4096],
            {"mesh.fsdp": 8, "rollout.group_size": 32, "rollout.max_new_tokens": 64, "policy.chat": False},
        ),
    ],
)
def test_memory_is_within_15_percent_of_a_real_step(shape_of, fields, tmp_path):
    """On 8 simulated devices in one process; see plan_program.py for what is measured."""
    # Small arrays, too, in pages of their own: what the heap keeps of them would hide what a step takes anew.
    asked = json.dumps({"shape": shape_of, "fields": fields})
    run(str(HERE / "plan_program.py"), asked, str(tmp_path / "out"), MALLOC_MMAP_THRESHOLD_="65536")
    found = json.loads((tmp_path / "out").read_text())
    planned = 8 * max(phase["total"] for phase in found["planned"].values())
    print("planned", planned, "measured", found["measured"], "ratio", planned / found["measured"]["total"])
    assert planned == pytest.approx(found["measured"]["total"], rel=0.15)


@slow
def test_memory_of_scores_is_within_15_percent_of_real_ones(tmp_path):
    """On 8 simulated devices in one process; see scores_program.py for what is measured."""
    run(str(HERE / "scores_program.py"), str(tmp_path / "out"), MALLOC_MMAP_THRESHOLD_="65536")
    both = json.loads((tmp_path / "out").read_text())
    planned = 8 * both["planned"]["total"]
    print(
        "planned", planned, both["planned"], "measured", both["measured"], "ratio", planned / both["measured"]["total"]
    )
    assert planned == pytest.approx(both["measured"]["total"], rel=0.15)
    assert both["measured"]["model"] == 8 * both["planned"]["reward_model"]


@slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:4"])
def test_a_plan_for_accelerators_that_are_not_there(topology):
    missing = chips.missing_compiler(chips.parse(topology))
    if missing:
        pytest.skip(missing)
    record = plan(topology, "policy.compute_dtype=bfloat16", "mesh.fsdp=4", "rollout.max_new_tokens=8")
    assert [phase["told"] for phase in record["phases"].values()] == ["compiled"] * 3
    assert record["fits"]
    assert {one["kind"] for one in record["phases"]["update"]["collectives"]} & {"all-gather", "collective-permute"}
    assert all(phase["floor_s"]["compute"] > 0 for phase in record["phases"].values())
