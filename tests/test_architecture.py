"""Who may import whom, read off the imports of every folder: what stands left never imports what stands right."""

import ast
import pathlib
import re

import pytest

import mara_jax

ROOT = pathlib.Path(mara_jax.__file__).parent
COMMANDS = (
    "audit",
    "predict",
    "plan",
    "bench",
    "figures",
    "evaluate",
    "generate",
    "export",
    "reward_model",
    "prior",
    "replay",
)
LAYERS = [
    ("core", "config", "parallel"),
    ("policies", "tasks", "measures"),
    ("sampling", "hf"),
    ("train", "toy"),
    ("cli",),
    ("main", "__main__", *COMMANDS),
]
RANK = {folder: rank for rank, layer in enumerate(LAYERS) for folder in layer}
# Imports within a layer, and the one between commands: `bench` counts the work that `plan` counts.
BESIDE = {("config", "core"), ("toy", "train"), ("bench", "plan")}
EVERYWHERE = {"cpu", "plot_style", "precision"}


def imported_folders(path: pathlib.Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("mara_jax.")}


def test_every_folder_has_a_place():
    folders = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert folders - {"__init__"} - EVERYWHERE == set(RANK)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    folder = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if folder in RANK:
        for other in imported_folders(path) - {folder} - EVERYWHERE:
            assert RANK[other] < RANK[folder] or (folder, other) in BESIDE, f"{folder} imports {other}"


# Who may ask which platform programs are for: the operations, the LM head, the draw and `parallel/`; and beside the
# model, what measures or plans devices and what writes checkpoints.
ASKING = re.compile(r"\b(platform|on_one_cpu|default_backend)\(")
MAY_ASK = (
    "policies/ops/",
    "sampling/head.py",
    "sampling/draw.py",
    "parallel/",
    "bench/",
    "plan/",
    "train/checkpoint.py",
)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_operations_ask_for_the_platform(path):
    name = path.relative_to(ROOT).as_posix()
    if not name.startswith(MAY_ASK):
        assert not ASKING.search(path.read_text()), f"{name} asks for the platform: let ops/select.py choose"


HOOKS = re.compile(r"\b(unraisablehook|excepthook)\b\s*=")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_error_handler_of_the_whole_process_is_replaced(path):
    assert not HOOKS.search(path.read_text())


def test_flax_linen_is_in_the_transformer_alone():
    users = {
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if re.search(r"\blinen\b", path.read_text())
    }
    assert users == {"policies/transformer.py"}
