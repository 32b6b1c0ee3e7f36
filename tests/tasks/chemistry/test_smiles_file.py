"""SMILES from files: what is read, and each kind of bad line in one clear line."""

import gzip

import pytest

from mara_jax.tasks.chemistry import molecules, smiles_file
from mara_jax.tasks.chemistry.smiles import tokens
from mara_jax.tasks.chemistry.smiles_file import read

GOOD = ["CCO", "c1ccccc1", "C[C@@H](N)C(=O)O"]


def refused(source, *words, **options):
    with pytest.raises((ValueError, OSError)) as error:
        read(str(source), **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("smiles", "parts"),
    [
        ("CC(Cl)Br", ["C", "C", "(", "Cl", ")", "Br"]),
        ("c1cc[nH]c1", ["c", "1", "c", "c", "[nH]", "c", "1"]),
        ("C[C@@H](O)/C=C\\F", ["C", "[C@@H]", "(", "O", ")", "/", "C", "=", "C", "\\", "F"]),
        ("C%12CC%12", ["C", "%12", "C", "C", "%12"]),
        ("[O-][N+](=O)B#I", ["[O-]", "[N+]", "(", "=", "O", ")", "B", "#", "I"]),
        ("", []),
    ],
)
def test_tokens_by_hand(smiles, parts):
    assert tokens(smiles) == parts


@pytest.mark.parametrize(("smiles", "at"), [("CCZ", "Z"), ("C C", " "), ("CC[nH", "["), ("C%1", "%")])
def test_what_is_no_token_is_named(smiles, at):
    with pytest.raises(ValueError, match="no token of one begins with") as error:
        tokens(smiles)
    assert str(error.value).endswith(repr(at))


def test_a_smi_file_with_names_and_empty_lines(tmp_path):
    path = tmp_path / "a.smi"
    path.write_text("CCO ethanol\n\nc1ccccc1\tbenzene 2\n  C[C@@H](N)C(=O)O\n")
    assert read(str(path)).smiles == GOOD
    compressed = tmp_path / "a.SMI.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(str(compressed)) == read(str(path))


def test_a_csv_file_by_the_name_of_its_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,SMILES,note\n1,CCO,"a, b"\n2,c1ccccc1,\n\n3,C[C@@H](N)C(=O)O,x\n')
    assert read(str(path)).smiles == GOOD
    path.write_text("structure\nCCO\n")
    assert read(str(path)).smiles == ["CCO"]  # the only one
    path.write_text("first,second\nCCO,CC\n")
    assert read(str(path), column="second").smiles == ["CC"]
    refused(path, "no columns that may hold SMILES", "'first', 'second' with column=NAME")
    refused(path, "no column 'third'", column="third")
    path.write_text("smiles,canonical_smiles\nCCO,CCO\n")
    refused(path, "2 columns that may hold SMILES")


BAD = {
    "smiles": ("no SMILES", "line 1", "if it is a header, delete it or call the file .csv"),
    "[Na+].[Cl-]": ("several fragments", "2 fragments (a salt, say)"),
    "CC[Xx]": ("unknown atoms", "the unknown atom [Xx]"),
    "CC*": ("unknown atoms", "the unknown atom *"),
    "CCZ": ("no SMILES", "no token of one begins with 'Z'"),
    "C1CC": ("no SMILES", "is no SMILES that RDKit can read"),
    "CC(C)(C)(C)C": ("no SMILES", "is no SMILES that RDKit can read"),  # five bonds
    "CC>>CO": ("no SMILES", "is no SMILES that RDKit can read"),
}


@pytest.mark.parametrize("line", BAD)
def test_each_bad_line_is_named_or_counted(line, tmp_path):
    kind, *words = BAD[line]
    path = tmp_path / "a.smi"
    path.write_text(f"{line}\nCCO\n")
    refused(path, *words, f"{path}, line 1:")
    assert read(str(path), bad_lines="skip") == (["CCO"], {kind: 1})
    path.write_text(f"CCO\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2.* \(bad_lines=skip\)") as error:
        read(str(path))
    assert "header" not in str(error.value)


@pytest.mark.parametrize("line", ["[13CH4]", "[nH]1cccc1", "[se]1cccc1", "[Na+]", "C[Si](C)(C)C", "[H]/N=C/C", "[2H]O"])
def test_atoms_in_brackets_that_exist(line):
    assert smiles_file.fault(line) is None


def test_files_without_a_molecule(tmp_path):
    path = tmp_path / "a.smi"
    path.write_text("\n")
    refused(path, "holds no SMILES")
    path.write_text("[Na+].[Cl-]\n")
    refused(path, "holds no SMILES (1 lines with several fragments)", bad_lines="skip")
    refused(tmp_path / "b.smi", "does not exist")
    refused(tmp_path / "a.txt", "is neither .smi nor .csv")
    for name, content, words in (
        ("a.smi.gz", b"CCO", "no whole gzip file"),
        ("b.smi.gz", gzip.compress(b"CCO\n" * 1000)[:-9], "no whole gzip file"),
        ("c.smi", gzip.compress(b"CCO"), "is not UTF-8"),
        ("d.csv", b"", "holds no SMILES"),
        ("e.csv", b"CCO\nCC\n", "begins with 'CCO', a SMILES"),
        ("f.csv", b"id,smiles\n1\n", "line 2 has 1 cells, its header 2"),
        ("g.csv", b'smiles\n"CC\n', "is no CSV"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)


@pytest.fixture
def molsets(tmp_path, monkeypatch):
    """A package as molsets installs it, which may not be imported."""
    folder = tmp_path / "moses" / "dataset" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "moses" / "__init__.py").write_text("raise ImportError('torch')")
    for name in ("train", "test", "test_scaffolds"):
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(f"SMILES\nCCO\n{'C' * len(name)}\n".encode()))
    monkeypatch.syspath_prepend(tmp_path)


def test_moses_sets_are_read_beside_a_package_that_is_not_imported(molsets):
    assert read("moses").smiles == ["CCO", "CCCCC"]
    assert read("moses-test").smiles == ["CCO", "CCCC"] and len(read("moses-scaffolds").smiles[1]) == 14


def test_moses_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("moses", "pip install --no-deps molsets")


def test_sets_have_equal_digests_where_they_are_equal():
    sets = [smiles_file.SmilesSet(list(texts), {}) for texts in (["C", "CC"], ["C", "CC"], ["CC", "C"], ["CCC"])]
    first, *others = [one.digest for one in sets]
    assert [digest == first for digest in others] == [True, False, False]


def test_randomised_smiles_are_the_same_molecule_and_a_function_of_their_seed():
    caffeine = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"
    written = molecules.randomised([caffeine] * 50, range(50))
    assert molecules.canonical_of(written) == molecules.canonical_of([caffeine]) and len({*written}) > 20
    assert molecules.randomised([caffeine, caffeine], [7, 3]) == [written[7], written[3]]  # whatever stands beside
    alanine, mirrored = "C[C@@H](N)C(=O)O", "C[C@H](N)C(=O)O"
    assert molecules.canonical_of(molecules.randomised([alanine] * 20, range(20))) == molecules.canonical_of([alanine])
    assert molecules.canonical_of([alanine]) != molecules.canonical_of([mirrored])
    with pytest.raises(ValueError, match="'C1' is no SMILES"):
        molecules.randomised(["C1"], [0])
