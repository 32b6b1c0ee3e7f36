"""JobSets, the SkyPilot task and the Dockerfile of launch/: valid by published schemas, and true of the command."""

import copy
import pathlib
import shlex
import subprocess
import sys
import tomllib

import dockerfile_steps
import manifests
import pytest
import yaml

from mara_jax import cli, config, main
from mara_jax.parallel import joining, mesh

ROOT = pathlib.Path(__file__).parents[2]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "launch" / name).read_text())


def job_of(jobset: dict) -> dict:
    """The Job of the one replicated job."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(jobset: dict) -> dict:
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


def parsed(flags: list[str]):
    """The flags by the command's own parser, whose config must be one that can run."""
    values = main.parse(["main", *flags])
    config.resolve(values.config)
    return values


# ---- JobSet ---------------------------------------------------------------------------------------------------------

JOBSETS = ["jobset_gpu.yaml", "jobset_tpu.yaml"]


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_are_valid(name):
    assert manifests.errors(read(name)) == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (lambda jobset: jobset["spec"]["failurePolicy"].update(maxRestart=3), "'maxRestart' was unexpected"),
        (lambda jobset: job_of(jobset).update(backoffLimit="none"), "'none' is not of type 'integer'"),
        (lambda jobset: container_of(jobset).update(argz=[]), "'argz' was unexpected"),
        (lambda jobset: container_of(jobset).pop("name"), "'name' is a required property"),
        (
            lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][0].pop("action"),
            "'action' is a required property",
        ),
    ],
)
def test_what_is_wrong_with_a_jobset_is_told(where, words):
    wrong = copy.deepcopy(read(JOBSETS[0]))
    where(wrong)
    assert any(words in told for told in manifests.errors(wrong))


@pytest.mark.parametrize("name", JOBSETS)
def test_every_end_of_a_pod_has_the_rule_that_the_page_says(name):
    """The first rule of the Job that matches a pod fails it with a message, by which the JobSet's first match acts."""
    jobset = read(name)
    job, policy = job_of(jobset), jobset["spec"]["failurePolicy"]
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    (refused, saved, disrupted) = job["podFailurePolicy"]["rules"]
    container = container_of(jobset)["name"]
    assert refused["onExitCodes"] == {"containerName": container, "operator": "In", "values": [cli.REFUSED]}
    assert saved["onExitCodes"] == {"containerName": container, "operator": "In", "values": [cli.STOPPED]}
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    first, second = policy["rules"]
    # The message is Kubernetes's: "Container main for pod default/x failed with exit code 2 matching FailJob rule ..."
    assert first["onJobFailureMessagePatterns"] == [f"failed with exit code {cli.REFUSED} "]
    assert (first["action"], second["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert first["onJobFailureReasons"] == second["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_processes_on_gpu_nodes_find_each_other():
    jobset = read("jobset_gpu.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    (number,) = container_of(jobset)["env"]
    assert "job-completion-index" in number["valueFrom"]["fieldRef"]["fieldPath"]
    flags = [flag.replace(f"$({number['name']})", "1") for flag in container_of(jobset)["args"]]
    values = parsed(flags)
    name = jobset["metadata"]["name"]
    # JobSet's name of a pod: that of the JobSet, of the replicated job, the number of the Job, the index of the pod.
    assert values.coordinator_address.split(":")[0] == f"{name}-{replicated['name']}-0-0.{name}"
    assert int(values.coordinator_address.split(":")[1]) == container_of(jobset)["ports"][0]["containerPort"]
    assert values.num_processes == job_of(jobset)["completions"]
    assert joining.distributed_arguments({}, values.coordinator_address, values.num_processes, values.process_id)


def test_hosts_of_a_slice_have_all_of_its_chips():
    jobset = read("jobset_tpu.yaml")
    selector = job_of(jobset)["template"]["spec"]["nodeSelector"]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container_of(jobset)["resources"]["limits"]["google.com/tpu"]
    assert job_of(jobset)["completions"] * chips == rows * columns
    sizes = config.resolve(parsed(container_of(jobset)["args"]).config).mesh
    wanted = {axis: getattr(sizes, axis) for axis in mesh.AXES}
    assert mesh.resolve_sizes(wanted, rows * columns) == {"data": 1, "fsdp": rows * columns, "tensor": 1}


# ---- SkyPilot -------------------------------------------------------------------------------------------------------


def test_the_skypilot_task_starts_the_command_on_every_node(tmp_path):
    task = read("skypilot.yaml")
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [cli.STOPPED]
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-euc", task["run"]], env=nodes | {"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    module, *flags = done.stdout.splitlines()[1:]
    values = parsed(flags)
    assert module == "mara_jax.main" and task["num_nodes"] == values.num_processes == 2
    assert (values.coordinator_address, values.process_id) == ("10.0.0.1:9876", 1)
    assert any(values.workdir.startswith(mount) for mount in task["volumes"])


# ---- Dockerfile -----------------------------------------------------------------------------------------------------

STAGES = dockerfile_steps.stages(dockerfile_steps.FILE.read_text())


def test_each_stage_installs_its_extra_and_starts_the_command():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage, installed in (("cpu", "."), ("cuda", ".[cuda]"), ("tpu", ".[tpu]")):
        steps = STAGES[stage]
        assert ["python", "-m", "pip", "install", "--editable", installed] in [
            shlex.split(text) for kind, text in steps if kind == "RUN"
        ]
        assert stage == "cpu" or any(stage in package for package in extras[stage])
        assert dict(steps)["ENTRYPOINT"] == '["python", "-m", "mara_jax.main"]'


def test_what_images_copy_exists_and_is_not_ignored():
    kept = [
        line[1:] for line in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    copied = [name for kind, text in STAGES["base"] if kind == "COPY" for name in text.split()[:-1]]
    assert sorted(copied) == sorted(kept) and all((ROOT / name).exists() for name in copied)


def test_steps_of_a_stage_are_taken(tmp_path):
    """A small one, whose steps all leave something behind."""
    text = """FROM python:3.12 AS base
# a comment
ENV ONE=1 TWO='2 3'
WORKDIR /opt/x
COPY LICENSE README.md ./
COPY launch launch
ENTRYPOINT ["sh", "-c"]
FROM base AS cpu
RUN echo "$ONE$TWO" \\
# another
  >said && which python >>said
FROM base AS other
RUN exit 1
"""
    steps = dockerfile_steps.stages(text)
    assert [kind for kind, _ in steps["cpu"]] == ["ENV", "WORKDIR", "COPY", "COPY", "ENTRYPOINT", "RUN"]
    dockerfile_steps.take(steps["cpu"], tmp_path, ["touch started"])
    place = tmp_path / "opt" / "x"
    assert {path.name for path in place.iterdir()} == {"LICENSE", "README.md", "launch", "said", "started"}
    assert (place / "said").read_text().split("\n")[:2] == ["12 3", f"{tmp_path}/venv/bin/python"]
    with pytest.raises(subprocess.CalledProcessError):
        dockerfile_steps.take(steps["other"], tmp_path / "other", [])


@pytest.mark.slow
def test_the_stage_for_cpus_builds_and_runs(tmp_path):
    flags = ["--config=configs/onetwo.py:nano", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    done = subprocess.run(
        [sys.executable, dockerfile_steps.__file__, "cpu", tmp_path / "image", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "objective" in done.stdout and not (tmp_path / "run").exists()
