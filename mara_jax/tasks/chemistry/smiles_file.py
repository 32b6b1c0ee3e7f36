"""SMILES from files, compressed or not, and the sets of the benchmark MOSES from the package molsets."""

import collections
import csv
import gzip
import hashlib
import importlib.util
import io
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules
from mara_jax.tasks.chemistry.smiles import tokens

# MOSES' three sets by name: files of the package molsets (1,584,663, 176,074 and 176,225 SMILES).
MOSES = {"moses": "train", "moses-test": "test", "moses-scaffolds": "test_scaffolds"}
BAD_LINES = ("refuse", "skip")
_COLUMNS = ("smiles", "canonical_smiles", "isomeric_smiles", "smi")  # that a .csv may have, in any case
_SYMBOL = re.compile(r"\[\d*([A-Z][a-z]?|[a-z][a-z]?)")  # of an atom in brackets, behind its isotope
_AROMATIC = {"b", "c", "n", "o", "p", "s", "se", "as", "te", "si"}
_FILE = re.compile(r".*\.(smi|csv)(\.gz)?", re.IGNORECASE)


class SmilesSet(NamedTuple):
    """SMILES in the order of their file, and how many lines were left out, by what is wrong with them."""

    smiles: list[str]
    left_out: dict[str, int]

    @property
    def digest(self) -> str:
        """Equal for equal SMILES in equal order."""
        return hashlib.sha256("\n".join(self.smiles).encode()).hexdigest()[:16]


def read(source: str, column: str = "", bad_lines: str = "refuse") -> SmilesSet:
    """The SMILES of a file, each one molecule that RDKit reads; RDKit looks at a quarter of a million in a minute.

    A .smi file has no header: a line begins with a SMILES, behind which may stand white space and a name. A .csv file
    begins with the names of its columns. Either may be compressed with gzip (.gz). Empty lines are passed over.

    Args:
      source: a file, or one of MOSES, which is taken as it is.
      column: of a .csv, that holds the SMILES; "": one called smiles, or the only one.
      bad_lines: "refuse" the first line that is not one molecule; or "skip" those, which are counted.

    Raises:
      ValueError, OSError: one line; there is no such file, it holds no SMILES, or a line is bad.
    """
    if source in MOSES:
        rows = _csv_rows(moses_file(source), "SMILES")
        return SmilesSet([smiles for _, smiles in rows], {})
    path = pathlib.Path(source)
    rows = _csv_rows(path, column) if _kind(path) == "csv" else _smi_rows(path)
    kept, left_out = [], collections.Counter()
    for number, smiles in rows:
        wrong = fault(smiles)
        if wrong is None:
            kept.append(smiles)
        elif bad_lines == "skip":
            left_out[wrong[0]] += 1
        else:
            header = (
                "; if it is a header, delete it or call the file .csv" if (number, _kind(path)) == (1, "smi") else ""
            )
            raise TaskError(
                f"{path}, line {number}: {wrong[1]}: correct it, or leave such lines out (bad_lines=skip){header}"
            )
    if not kept:
        counts = ", ".join(f"{count} lines with {kind}" for kind, count in left_out.items())
        raise TaskError(f"{path} holds no SMILES{f' ({counts})' if counts else ''}: give a file with one a line")
    return SmilesSet(kept, dict(left_out))


def fault(smiles: str) -> tuple[str, str] | None:
    """What is wrong with a SMILES as the text of one molecule: a kind, and a clause that tells it; None: nothing is.

    Kinds: "no SMILES", "unknown atoms", "several fragments".
    """
    try:
        parts = tokens(smiles)
    except ValueError as error:
        return "no SMILES", str(error)
    unknown = next((part for part in parts if not _is_known(part)), None)
    if unknown is not None:
        return "unknown atoms", f"{smiles!r:.80} has the unknown atom {unknown}"
    if "." in parts:
        words = f"{smiles!r:.80} has {parts.count('.') + 1} fragments (a salt, say), not one molecule"
        return "several fragments", words
    with molecules.silence():
        read = molecules.parse(smiles)
    return None if read is not None else ("no SMILES", f"{smiles!r:.80} is no SMILES that RDKit can read")


def _is_known(token: str) -> bool:
    """Whether a token that is an atom is that of an element; other tokens are."""
    if not token.startswith("["):
        return token != "*"
    symbol = _SYMBOL.match(token)
    return symbol is not None and (symbol[1] in molecules.ELEMENTS or symbol[1] in _AROMATIC)


def moses_file(name: str) -> pathlib.Path:
    """The file of one of MOSES' sets; the package is looked up but not imported, as it needs packages of its own.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    return moses_folder() / "dataset" / "data" / f"{MOSES[name]}.csv.gz"


def moses_folder() -> pathlib.Path:
    """The folder of the package molsets; errors as of `moses_file`."""
    spec = importlib.util.find_spec("moses")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("MOSES' sets come with the package molsets: pip install --no-deps molsets==0.3.1")
    return pathlib.Path(spec.origin).parent


def _kind(path: pathlib.Path) -> str:
    named = _FILE.fullmatch(path.name)
    if named is None:
        raise TaskError(
            f"{path} is neither .smi nor .csv, nor one of these with .gz, nor {', '.join(MOSES)}: rename it, or "
            "convert it"
        )
    return named[1].lower()


def _text(path: pathlib.Path) -> str:
    """A file's text, decompressed where its name ends in .gz."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a file of SMILES, .smi or .csv, or one of {', '.join(MOSES)}"
        )
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path} is no whole gzip file ({error}): fetch it again, or drop .gz from its name") from None
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path} is not UTF-8 (byte {error.start}): is it compressed, without .gz in its name?"
        ) from None


def _smi_rows(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The number and the SMILES of each line of a .smi file."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if words := line.split(maxsplit=1):
            yield number, words[0]


def _csv_rows(path: pathlib.Path, column: str) -> Iterator[tuple[int, str]]:
    """The number of its (last) line, and the SMILES, of each row of a .csv file."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        place = _column(path, [name.strip() for name in names], column)
        for row in reader:
            if not any(row):
                continue
            if len(row) <= place:
                raise TaskError(
                    f"{path}, line {reader.line_num} has {len(row)} cells, its header {len(names)}: correct it"
                )
            yield reader.line_num, row[place].strip()
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num} is no CSV ({error}): correct it") from None


def _column(path: pathlib.Path, names: list[str], column: str) -> int:
    """Which column holds the SMILES."""
    wanted = [column] if column else [name for name in names if name.lower() in _COLUMNS]
    if not column and len(names) == 1:
        wanted = names
    if len(wanted) != 1 or wanted[0] not in names:
        which = f"no column {column!r}" if column else f"{len(wanted) or 'no'} columns that may hold SMILES"
        raise TaskError(f"{path} has {which}: choose one of {', '.join(map(repr, names))} with column=NAME")
    if fault(wanted[0]) is None:
        raise TaskError(
            f"{path} begins with {wanted[0]!r:.80}, a SMILES: the first line of a .csv names its columns; add one"
        )
    return names.index(wanted[0])
