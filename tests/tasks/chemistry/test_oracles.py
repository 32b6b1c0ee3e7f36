"""The twenty oracles against a table of values, in any order of calls and in a process of their own."""

import csv
import json
import pathlib
import random
import subprocess
import sys

import pytest

from mara_jax.tasks.chemistry import oracles

# Values of TDC's oracles for 21 molecules, each computed in a process that had computed nothing before.
TABLE = pathlib.Path(__file__).with_name("pmo_oracles.tsv")
ROWS = list(csv.DictReader(TABLE.open(), delimiter="\t"))
SMILES = [row["smiles"] for row in ROWS]
NAMES = [name for name in ROWS[0] if name not in ("name", "smiles")]


def values(name: str, rows=ROWS):
    # The table has eight digits, of values as small as 1e-80.
    return pytest.approx([float(row[name]) for row in rows], rel=1e-7, abs=1e-90)


def test_the_names_are_those_of_the_table():
    assert list(oracles.ORACLES) == NAMES and len(NAMES) == 20 and len(ROWS) == 21


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_the_table(name):
    assert oracles.score(name, SMILES) == values(name)


@pytest.mark.parametrize("order", ["backwards", "shuffled", "hops in turn, one molecule a call"])
def test_values_do_not_depend_on_the_order_of_calls(order):
    """TDC's two hops share a variable: whichever is called first decides what the other gives."""
    names, rows = NAMES[::-1], ROWS[::-1]
    if order == "shuffled":
        names, rows = random.Random(1).sample(NAMES, 20), random.Random(2).sample(ROWS, 21)
    if order.startswith("hops"):
        for row in ROWS:
            for name in ("scaffold_hop", "deco_hop", "scaffold_hop"):
                assert oracles.score(name, [row["smiles"]]) == values(name, [row])
        return
    for name in names:
        assert oracles.score(name, [row["smiles"] for row in rows]) == values(name, rows)


def test_values_of_a_fresh_process_whose_first_call_is_the_second_hop():
    program = (
        "import json, sys; from mara_jax.tasks.chemistry import oracles; "
        "smiles = json.load(sys.stdin); print(json.dumps({n: oracles.score(n, smiles) for n in sys.argv[1:]}))"
    )
    names = ["scaffold_hop", "deco_hop", "valsartan_smarts", "sitagliptin_mpo"]
    done = subprocess.run(
        [sys.executable, "-c", program, *names], input=json.dumps(SMILES), capture_output=True, text=True, check=True
    )
    scores = json.loads(done.stdout)
    assert all(scores[name] == values(name) for name in names)


@pytest.mark.parametrize("name", ["qed", "deco_hop", "isomers_c7h8n2o2", "sitagliptin_mpo"])
def test_what_does_not_parse_scores_0_and_the_rest_is_scored(name, capfd):
    invalid = ["", " ", "not a molecule", "c1ccc", "C(C)(C)(C)(C)C", "CC("]
    mixed = [text for pair in zip(invalid, SMILES, strict=False) for text in pair]
    scores = oracles.score(name, mixed)
    assert scores[::2] == [0.0] * 6
    assert scores[1::2] == values(name, ROWS[:6])
    assert capfd.readouterr().err == ""  # RDKit says nothing about what does not parse


def test_no_molecules_no_scores():
    assert oracles.score("qed", []) == []


def test_a_name_that_is_none_and_a_text_for_a_list_are_refused():
    with pytest.raises(ValueError, match=r"no oracle 'qde'; there are albuterol_similarity, .*scaffold_hop$"):
        oracles.score("qde", SMILES)
    with pytest.raises(ValueError, match=r"write \['CCO'\]"):
        oracles.score("qed", "CCO")


@pytest.mark.parametrize("smiles", ["*", "[H][H]", "[He]", "[Na+].[Cl-]", "[2H]O[2H]", "[U]", "CC name"])
def test_odd_molecules_have_a_score(smiles):
    assert all(0 <= oracles.score(name, [smiles])[0] <= 1 for name in NAMES)


def test_without_rdkit_one_line_says_what_to_install():
    program = "import sys; sys.modules['rdkit'] = None; from mara_jax.tasks.chemistry import oracles"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith('pip install "mara_jax[chem]"')
    modifiers = program.replace("oracles", "modifiers")
    assert subprocess.run([sys.executable, "-c", modifiers], capture_output=True).returncode == 0
