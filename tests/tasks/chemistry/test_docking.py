"""A real docking program as oracle: AutoDock Vina, small guests in a ring of sugars (a cyclodextrin)."""

import re
import shutil
import subprocess
import sys

import pytest

from mara_jax.tasks import checked
from mara_jax.tasks.chemistry import task

ETHANOL, ADAMANTANE = "CCO", "C1C2CC3CC1CC(C2)C3"
BOX = "0,0,0,20"


def cyclodextrin(units: int) -> str:
    """A ring of glucose units, each joined to the next from its atom 1 to the other's atom 4."""
    ring = "OC[C@H]1O[C@@H]2O[C@H]3[C@H](O)[C@@H](O)[C@@H]("
    ring += "".join(f"O[C@H]{n}[C@H](O)[C@@H](O)[C@@H](" for n in range(4, units + 2))
    ring += "O[C@H]1[C@H](O)[C@H]2O)"
    return ring + "".join(f"O[C@@H]{n}CO" + (")" if n > 3 else "") for n in range(units + 1, 2, -1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("vina") is None, reason="needs AutoDock Vina (Debian: autodock-vina)")
def test_vina_docks_small_molecules(tmp_path):
    """The scores are Vina's own of the poses; a molecule that fills the ring binds better than ethanol; each is one
    call, what is no molecule none."""
    docking = pytest.importorskip("docking", reason="needs meeko and gemmi")
    host = tmp_path / "host.pdbqt"
    host.write_text(docking.receptor(docking.shaped(cyclodextrin(7))))
    command = f"program:{sys.executable} {docking.__file__} {host} {BOX}"
    made = task.make(task.Config(oracle=command, budget=10, seconds=300))
    smiles = [ETHANOL, ADAMANTANE, "C1CC", "OCC"]
    reward = checked(made).score([0] * 4, smiles, [True] * 4).reward.tolist()
    assert 0.1 < reward[0] < reward[1] and reward[2] == 0 and reward[3] == reward[0] and made.calls.calls == 2

    pose = tmp_path / "pose.pdbqt"
    assert -docking.affinity(docking.pdbqt(docking.shaped(ADAMANTANE)), str(host), BOX, pose) / 10 == pytest.approx(
        reward[1]
    )
    pose.write_text("".join(line for line in pose.open() if not line.startswith(("MODEL", "ENDMDL"))))
    again = [f"--receptor={host}", f"--ligand={pose}", "--score_only", *docking.box(BOX)]
    said = subprocess.run(["vina", *again], check=True, capture_output=True, text=True).stdout
    found = re.search(r"Estimated Free Energy of Binding *: *(\S+)", said)
    assert found and float(found[1]) == pytest.approx(-10 * reward[1], abs=0.02)
