"""The arrows between rooms, read off the imports: what stands left never imports what stands right."""

import ast
import pathlib

import pytest

import mara_jax

ROOT = pathlib.Path(mara_jax.__file__).parent
LAYERS = [("core",), ("policies", "tasks"), ("sampling",), ("train",), ("main",)]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
# Rooms beside the line, and all that each may see of ours besides itself.
ASIDE = {
    "parallel": set(),
    "hf": {"policies", "parallel"},
    "eval": {"core", "tasks"},
    "config": {"core"},
}


def imported_rooms(path: pathlib.Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("mara_jax.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    seen = imported_rooms(path) - {room}
    if room in ASIDE:
        assert seen <= ASIDE[room]
    elif room in RANK:
        backwards = {other for other in seen if other in RANK and RANK[other] >= RANK[room]}
        assert not backwards
        if room == "core":
            assert not seen
