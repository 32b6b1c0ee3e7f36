"""What README.md and docs/ print: commands parse and run, Python blocks give the numbers beside them, names exist."""

import ast
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import documented
import pytest

from mara_jax import config
from mara_jax.config import schema
from mara_jax.tasks import digits, onetwo, prompts, reasoning_gym
from mara_jax.tasks.chemistry import task as chemistry

ROOT = documented.ROOT
COMMANDS = documented.in_blocks()
# They read files that the page tells to write: see the test of that page.
WRITTEN = ("--config=colours_config.py", "own.jsonl", "runs/own ", "problems.jsonl", "programs.jsonl")
PACKAGE = [
    command
    for command in COMMANDS
    if command.target.startswith("mara_jax") and not any(file in command.text for file in WRITTEN)
]
NO_PARSER = {"mara_jax"}  # it takes no arguments

# What cannot run here, by a part of the command: why, and what stands for it.
NOT_RUN = {
    "main --config=configs/onetwo.py --": "needs the weights of Qwen2.5-3B",
    "main --config=configs/creative.py --": "needs the weights of Qwen3-1.7B and of its reward model",
    "--topology=v5e": "needs XLA's TPU compiler, which the extra `plan` installs",
    "--topology=h100": "needs XLA's GPU compiler, which the extra `plan` installs",
    "configs/prompts.py:sums": "needs reasoning-gym, whose task is run in tests/tasks/test_reasoning_gym.py",
    "--model=qwen2.5-3b": "needs a GPU with 63 GiB",
    "benchmarks/step_vs_trl.py": "installs TRL in an environment of its own",
    "benchmarks/rollout_vs_transformers.py": "installs a second transformers in an environment of its own",
    "--config.tracker=trackio": "needs the package trackio; tests/train/test_trackers.py writes to it",
    "make prior": "sets up an environment and trains for two hours; tests/prior trains a small one",
    "prior --workdir=runs/prior": "needs molsets and two hours; tests/prior trains a small one",
    "--smiles=own.smi": "reads a file of one's own; tests/prior trains on one",
    "--weights=runs/prior/model": "reads what two hours of training leave",
    "make run": "sets up an environment; what it starts is run below as `make -n` prints it",
    "make test": "is this suite",
}
# Flags that make a command small, by a part of the command; of a name's several values the last one counts.
SMALLER = {
    "main --config=configs/toy.py --": ["--config.steps=20"],
    "main --config=configs/toy.py:sweep": [
        "--config.steps=2", "--config.sweep.betas=(.03,.1)", "--config.sweep.seeds=1",
    ],
    "main --config=configs/onetwo.py": [
        "--config.steps=2", "--config.rollout.group_size=2", "--config.rollout.length_buckets=1",
        "--config.reference.samples=4",
    ],
    "main --config=configs/onetwo_study.py": [
        "--config.steps=2", "--config.rollout.group_size=2", "--config.rollout.length_buckets=1",
        "--config.reference.samples=4", "--config.warmup.steps=1", "--config.population.betas=(.1,)",
        "--config.population.seeds=1",
    ],
    "main --config=configs/digits.py": [
        "--config.steps=2", "--config.warmup.steps=2", "--config.rollout.group_size=2", "--config.reference.samples=2",
    ],
    "main --config=configs/prompts.py": [
        "--config.steps=2", "--config.warmup.steps=2", "--config.rollout.group_size=2", "--config.policy.weights=nano",
    ],
    "main --config=configs/chemistry.py": [
        "--config.steps=2", "--config.rollout.group_size=20", "--config.rollout.max_new_tokens=24",
        "--config.rollout.length_buckets=1", "--config.task.budget=8", "--config.task.randomised=1",
    ],
    "main --config=configs/creative.py:smol": [
        "--config.steps=2", "--config.policy.weights=nano", "--config.policy.layers=1", "--config.policy.embed=64",
        "--config.warmup.steps=2", "--config.rollout.prompts_per_step=1", "--config.rollout.length_buckets=1",
        "--config.reference.samples=20", "--config.evaluation.every=0",
    ],
    "--workdir=runs/creative-reward": ["--weights=nano", "--batch=4"],
    "evaluate run --weights=runs/creative/": ["--samples=2", "--max_new_tokens=4"],
    "threshold_percentile=75": ["--config.rollout.group_size=8"],  # two good completions of a group are needed
    "generate --weights=smollm2": ["--samples=2", "--max_new_tokens=2"],
    "--config.profile.first=3": ["--config.steps=4"],
    "predict --config": ["--config.warmup.steps=2", "--samples=8", "--resamples=100"],
    "predict --r": ["--resamples=100"],
    "evaluate run --weights=runs/watched": ["--samples=4"],
    "mara_jax.reward_model": ["--steps=2", "--every=2", "--layers=1", "--embed=32"],
    "evaluate run --weights=runs/scored": ["--samples=2", "--max_new_tokens=2"],
    "figures": ["--only=3"],
    "mara_jax.bench": ["--repeats=1"],
    "bench --model=small": ["--model=tiny"],
    "bench --config": ["--config.rollout.group_size=2", "--config.rollout.max_new_tokens=8"],
}  # fmt: skip
NANO = "--config=configs/onetwo.py:nano"
# Those that take a second or two each.
QUICK = ("python -m mara_jax", "main --help", "configs/toy.py --", "predict --rows")
# Words that must be printed, by a part of the command.
PRINTS = {
    "audit --config=configs/onetwo.py:nano": "exactly; optimum: every answer equally likely",
    "audit --as=grpo": "neither",
    "predict --rows": 'puts 98.4%',
    "main --help": "algorithm.beta",
    "evaluate compare runs/nano": "vanilla",
    "evaluate compare runs/answers": "vanilla",
    "evaluate compare runs/onetwo": "vanilla",
    "evaluate compare runs/population": "vanilla",
    "evaluate compare runs/watched": "Pareto-best of reward and ",
    "evaluate show runs/modes": "good answers: ",
    "audit --rivals": "0.632 0.316 0.053 0.000 0.000",
}  # fmt: skip
# A row: answer, reward, how often. At beta .01: 12 / (12 + 28 exp(-5) + 60 exp(-10)) = 98.4 % of "blue".
SAMPLES = (("blue", 1.0, 12), ("green", 0.95, 28), ("red", 0.9, 60))


def is_quick(command: documented.Command) -> bool:
    return any(command.text == part or (part in command.text and part != QUICK[0]) for part in QUICK)


def reason_not_to_run(command: documented.Command) -> str:
    return next((reason for part, reason in NOT_RUN.items() if part in command.text), "")


def smaller(command: documented.Command, workdir: pathlib.Path) -> list[str]:
    """The command's target and arguments, small, with its paths below `workdir`."""
    arguments = [re.sub(r"(?<![\w/])(runs/|samples\.csv)", rf"{workdir}/\1", word) for word in command.arguments]
    if command.page != "Makefile" and command.target in ("mara_jax.main", "mara_jax.bench"):
        # One run of the pretrained model is enough, that of `make run`: its configuration is parsed above as it stands.
        arguments = [re.sub(r"(onetwo|onetwo_study)\.py:smol", r"\1.py:nano", word) for word in arguments]
    for part, flags in SMALLER.items():
        if part in command.text:
            arguments += flags
    if "main --config=configs/onetwo.py" in command.text and "--config.warmup.steps" not in command.text:
        arguments += ["--config.warmup.steps=1", "--config.warmup.max_steps=0"]
    return [command.target, *arguments]


def made(target: str) -> list[documented.Command]:
    """The commands of this package that `make TARGET` would start."""
    done = subprocess.run(["make", "-n", target, "ARGS="], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if " -m mara_jax" in line]
    return [documented._command(ROOT / "Makefile", "python " + line.split(" ", 1)[1]) for line in lines]


# ---- commands -------------------------------------------------------------------------------------------------------


def test_every_command_of_this_package_is_parsed_by_its_own_parser():
    lines = [c for c in [*PACKAGE, *made("run"), *made("run-nano"), *documented.in_sentences()] if c.arguments]
    lines = [c for c in lines if c.target.startswith("mara_jax") and c.target not in NO_PARSER]
    lines = [c for c in lines if "--help" not in c.arguments]
    # Two that must not pass: the program would otherwise prove nothing.
    toy = ["mara_jax.main", "--config=configs/toy.py", "--workdir=x"]
    wrong = [[*toy, "--config.nothing=1"], ["mara_jax.bench", "--nothing"]]
    done = subprocess.run(
        [sys.executable, "tests/documented_program.py"], cwd=ROOT, capture_output=True, text=True,
        input=json.dumps([*wrong, *([c.target, *c.arguments] for c in lines)]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert "nothing" in answers[0] and "nothing" in answers[1]
    assert {c.text: answer for c, answer in zip(lines, answers[2:], strict=True) if answer} == {}
    assert len(lines) >= 30


@pytest.mark.parametrize("script", sorted({c.target for c in COMMANDS if "benchmarks/" in c.target}))
def test_benchmarks_have_the_flags_that_pages_name(script):
    source = (ROOT / script).read_text() + (ROOT / "benchmarks" / "side_by_side.py").read_text()
    for command in COMMANDS:
        for flag in command.arguments if command.target == script else ():
            name = flag.split("=")[0]
            assert f'"{name}"' in source or f'"{name.replace("--no-", "--")}"' in source, command.text


@pytest.mark.parametrize("target", sorted({c.target for c in COMMANDS if c.words[0] == "make"}))
def test_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_the_table_of_what_is_not_run_names_documented_commands():
    for part in NOT_RUN:
        assert any(part in command.text for command in COMMANDS), f"{part!r} is in no page"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """Where documented commands write, with the file of samples that one of them reads."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "runs").mkdir()
    rows = [f",{reward},{answer}" for answer, reward, count in SAMPLES for _ in range(count)]
    (folder / "samples.csv").write_text("\n".join(["ref_logp,reward,answer", *rows]) + "\n")
    return folder


def run(command, one: documented.Command, workdir: pathlib.Path) -> None:
    done = command(*smaller(one, workdir))
    assert done.returncode == 0, done.stderr
    for part, words in PRINTS.items():
        if part in one.text:
            assert words in " ".join(done.stdout.split()), done.stdout


@pytest.mark.parametrize("one", [c for c in PACKAGE if is_quick(c)], ids=lambda c: c.text)
def test_quick_commands_run(command, workdir, one):
    run(command, one, workdir)


# Runs that others read, first; then everything in the order of the pages.
SLOW = [c for c in PACKAGE if not is_quick(c) and not reason_not_to_run(c) and "process_id" not in c.text]
SLOW = sorted(SLOW, key=lambda c: "evaluate" in c.text or "predict --r" in c.text or "runs/answers/" in c.text)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["run", "run-nano"])
def test_what_make_starts_runs(command, workdir, target):
    (one,) = made(target)
    run(command, one, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("one", SLOW, ids=lambda c: c.text)
def test_commands_run(command, workdir, one):
    run(command, one, workdir)


@pytest.mark.slow
def test_two_processes_as_the_page_starts_them(quick_environment, workdir):
    """The shell loop of docs/parallel.md as it stands, but for sizes, the port and the folder."""
    blocks = documented.BLOCK.findall((ROOT / "docs" / "parallel.md").read_text())
    (block,) = [block for _, block in blocks if "process_id" in block]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [*SMALLER["main --config=configs/onetwo.py"], "--config.warmup.steps=2", "--config.rollout.group_size=8"]
    script = block.replace("9876", str(port)).replace("runs/", f"{workdir}/runs/")
    script = script.replace(NANO, f"{NANO} {' '.join(flags)}").replace("python ", f"{sys.executable} ")
    environment = os.environ | quick_environment
    with subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environment, start_new_session=True) as shell:
        try:
            assert shell.wait(timeout=600) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # processes in the background outlive their shell
    assert len((workdir / "runs" / "two" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "constants"),
    [("scaling", {"GROUPS": (1, 2), "LENGTHS": (8, 16), "GROUP": 2}), ("toy_sweep", {"STEPS": 10, "SEEDS": 2})],
)
def test_benchmarks_run_with_smaller_sizes(workdir, script, constants):
    """They print one JSON object a line, the comparison's with its ratio."""
    (one,) = [c for c in COMMANDS if c.target == f"benchmarks/{script}.py"]
    flags = smaller(one, workdir)[1:]
    program = (
        f"import sys; sys.path.insert(0, 'benchmarks'); import {script} as script; "
        f"vars(script).update({constants!r}); sys.argv[1:] = {flags!r}; script.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert script != "toy_sweep" or all(line["ratio"] > 0 for line in lines)


# ---- Python ---------------------------------------------------------------------------------------------------------


def check_python(block: str, capsys) -> None:
    """Runs a block: a print whose comment begins with numbers prints them, to three digits."""
    exec(compile(block, "documented", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    comments = re.findall(r"^\s*print\(.*?\)(?:\s+# (.*))?$", block, re.MULTILINE)
    assert len(printed) >= len(comments)
    for line, comment in zip(printed[-len(comments) :], comments, strict=True):
        numbers = [float(word) for word in re.findall(r"(?<![\w.])\.\d+", comment.split(":")[0])]
        assert [float(word) for word in re.findall(r"[\d.]+(?:e-\d+)?", line)][: len(numbers)] == pytest.approx(
            numbers, abs=6e-4
        ), line


PAGES_WITH_PYTHON = ("objectives", "methods", "measures", "chemistry_oracles", "study")


@pytest.mark.parametrize("page", [f"docs/{name}.md" for name in PAGES_WITH_PYTHON])
def test_python_of_pages_gives_the_numbers_beside_it(page, capsys):
    (block,) = documented.python_blocks(page)
    check_python(block, capsys)


@pytest.mark.slow
def test_python_of_the_readme_gives_the_numbers_beside_it(capsys, tmp_path, monkeypatch):
    (block,) = documented.python_blocks("README.md")
    monkeypatch.chdir(tmp_path)
    check_python(block, capsys)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_the_task_of_the_page_is_trained_by_its_command(tmp_path, quick_environment):
    """The files that docs/tasks.md tells to write, in an empty folder."""
    for name, block in zip(("colours.py", "colours_config.py"), documented.python_blocks("docs/tasks.md"), strict=True):
        (tmp_path / name).write_text(block)
    (one,) = [command for command in COMMANDS if WRITTEN[0] in command.text]
    done = subprocess.run(
        [sys.executable, "-m", one.target, *one.arguments, "--config.steps=2", "--config.warmup.steps=20"],
        cwd=tmp_path, env=os.environ | quick_environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "runs" / "colours" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid/fraction"] > 0.5 and 1 <= last["answers/distinct"] <= 6 and last["task/letters"] > 0
    assert "how the run changed its completions" in done.stdout


@pytest.mark.slow
def test_the_files_of_the_page_on_prompts_are_trained_and_sampled(tmp_path, quick_environment):
    """The files that docs/prompts.md tells to write, in a folder of their own."""
    page = (ROOT / "docs" / "prompts.md").read_text()
    for name, language in (("own.jsonl", "json"), ("own.py", "python")):
        (tmp_path / name).write_text(re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[0])
    train, export, *sample, measure = [
        command
        for command in COMMANDS
        if command.page == "prompts.md" and any(file in command.text for file in WRITTEN[1:3])
    ]
    small = ["--config.steps=2", "--config.warmup.steps=60", "--config.warmup.batch=16"]
    environment = os.environ | quick_environment | {"PYTHONPATH": str(ROOT)}

    def printed(*command: str) -> str:
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in command]
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "how the run changed its completions" in printed(train.target, *train.arguments, *small)
    last = json.loads((tmp_path / "runs" / "own" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid/fraction"] == last["reward/mean"] > 0.5 and last["task/failed"] == 0
    assert "step 2 of runs/own: model: runs/own-model" in printed(export.target, *export.arguments)
    shown, as_json = (printed(one.target, *one.arguments, "--samples=8") for one in sample)
    assert "Name a warm colour.\n8 completions, " in shown
    assert "pass@8" in printed(measure.target, *measure.arguments, "--samples=8")
    rows = [json.loads(line) for line in as_json.splitlines()]
    assert [row["prompt"] for row in rows] == ["Name a warm colour.", "Name a cold colour."]


@pytest.mark.slow
def test_the_files_of_the_page_on_rewards_are_trained(tmp_path, quick_environment):
    """The two files that docs/rewards.md tells to write; their demonstrations are mostly right."""
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)
    commands = [command for command in COMMANDS if any(file in command.text for file in WRITTEN[3:])]
    environment = os.environ | quick_environment | {"PYTHONPATH": str(ROOT)}
    for name, block, one in zip(("problems", "programs"), blocks, commands, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(block)
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in (one.target, *one.arguments)]
        done = subprocess.run(
            [sys.executable, "-m", *words, "--config.steps=2", "--config.warmup.steps=100", "--config.warmup.batch=16"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        last = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["reward/mean"] > 0.3 and last["task/failed"] == 0, last


@pytest.mark.slow
def test_python_of_lora(workdir, monkeypatch):
    """After the page's run: peft loads the adapter, and this package exports it again."""
    monkeypatch.chdir(workdir)
    for block in documented.python_blocks("docs/lora.md"):
        exec(compile(block, "documented", "exec"), {})
    assert (workdir / "runs" / "merged" / "config.json").exists()
    assert (workdir / "runs" / "again" / "adapter_config.json").exists()


# ---- text -----------------------------------------------------------------------------------------------------------

TEXTS = [*documented.PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"]
GENERATED = "config_keys.md"  # a row for each key
REFERENCE_PAGES = ("glossary.md", "architecture.md", GENERATED)  # they describe; there is nothing to type


def anchors(page: pathlib.Path) -> set[str]:
    """The names under which a page's headings are linked."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            other = (page.parent / file).resolve() if file else page
            assert other.exists(), target
            assert not anchor or anchor in anchors(other), target


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in documented.PAGES[1:] if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", documented.PAGES[1:], ids=lambda p: p.name)
def test_pages_are_short_and_begin_with_what_to_type(page):
    text = page.read_text()
    assert page.name == GENERATED or len(text.replace("|", " ").split()) <= 1250
    if page.name not in REFERENCE_PAGES:
        assert text.split("\n\n")[1].startswith("```")


def test_fields_that_pages_name_exist():
    sections = {
        field.name: field.default_factory()
        for run in (config.LanguageRun, config.ToyRun)
        for field in dataclasses.fields(run)
        if field.default_factory is not dataclasses.MISSING
    }
    assert isinstance(sections["algorithm"], schema.Algorithm)
    for page in documented.PAGES:
        for section, name in re.findall(r"`(?:--config\.)?([a-z]+)\.([a-z_0-9]+)(?:=[^`]*)?`", page.read_text()):
            if section in sections and name not in ("json", "jsonl", "png", "html"):  # files
                places = (
                    [module.Config() for module in (onetwo, digits, prompts, reasoning_gym, chemistry)]
                    if section == "task"
                    else [sections[section]]
                )
                assert any(hasattr(place, name) for place in places), f"{page.name}: {section}.{name}"


def test_files_that_pages_name_exist():
    for page in documented.PAGES:
        for path in re.findall(r"`((?:mara_jax|tests|configs|benchmarks|launch)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def source_of(module: str) -> pathlib.Path | None:
    """The file of a module or package of this project."""
    path = ROOT / "mara_jax" / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def defined(name: str) -> bool:
    """Whether a dotted name is a module of this project, or a name that one defines or imports, as its source says."""
    module, _, attribute = name.rpartition(".")
    if source_of(name) or not (file := source_of(module)):
        return source_of(name) is not None
    names = set()
    for node in ast.parse(file.read_text()).body:
        names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return attribute in names


def test_functions_that_the_architecture_page_names_exist():
    """A dotted name between backticks there is MODULE.NAME of this package, but for files and fields of a run."""
    assert defined("core.kl.reverse") and defined("core.kl") and not defined("core.kl.sideways")
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", text)
    names = [name for name in names if name.split(".")[-1] not in ("py", "md", "json", "jsonl")]
    sections = {field.name for field in dataclasses.fields(config.LanguageRun)}
    assert [name for name in names if not defined(name) and name.split(".")[0] not in sections] == []
    assert len(names) >= 30
