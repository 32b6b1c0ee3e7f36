"""Files of prompts: JSONL, CSV, Parquet, and directories that Hugging Face `datasets` writes; rows by their number.

A row has a `prompt`, a text or chat messages; where it has a `completion`, a text or a list of them, these are
demonstrations. Its other columns are the reward function's.
"""

import csv
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mara_jax.tasks.base import TaskError

Row = Mapping[str, Any]
EXPECTED = '{"prompt": "Name a prime below 10.", "solution": "7"}'
_ROLES = ("system", "user", "assistant", "tool")
_DEEPEST_READ = 1 << 16  # rows that are read from Arrow at once


class PromptFile(Sequence[Row]):
    """The rows of a file, by random access from 0 (a data source as `grain` has them).

    Attributes:
      path: of the file; columns: the names of all columns; lacking: of each column that some rows do not have, how many
        they are, and the number of the first.
    """

    def __init__(self, path: Path, rows: Sequence[Row], lines: Sequence[int] | None = None) -> None:
        """lines: where each row begins in a text file, from 1; None where a file has no lines."""
        self.path, self.rows, self.lines = path, rows, lines
        if not len(rows):
            raise TaskError(f"{path} holds no prompts; a row is {EXPECTED}")
        having: dict[str, int] = {}  # how many rows have each column
        lacking: dict[str, int] = {}  # the first row without it
        for number, row in enumerate(rows):
            self._check(number, row)
            for name in [name for name in row if name not in having]:
                having[name] = 0
                if number:
                    lacking[name] = 0
            for name in having:
                if name in row:
                    having[name] += 1
                else:
                    lacking.setdefault(name, number)
        self.columns = tuple(having)
        self.lacking = {name: (len(rows) - having[name], first) for name, first in lacking.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.rows[number]

    def where(self, number: int) -> str:
        """The place of a row, for messages."""
        return f"{self.path}, " + (f"row {number + 1}" if self.lines is None else f"line {self.lines[number]}")

    def _check(self, number: int, row: Any) -> None:
        """Refuses a row that is no prompt."""
        wrong = _wrong(row)
        if wrong:
            raise TaskError(f"{self.where(number)}: {wrong}; a row is {EXPECTED}")


def read(path: str | Path) -> PromptFile:
    """Opens a file of prompts; every row is checked, none is kept.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a kind of file that is not known, or a row that is no prompt, named by its place.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the prompt file {path} does not exist")
    if path.is_dir():
        return PromptFile(path, _Arrow(_saved_dataset(path)))
    if path.suffix == ".jsonl":
        rows = _JsonLines(path)
        return PromptFile(path, rows, rows.lines)
    if path.suffix == ".csv":
        return _csv(path)
    if path.suffix == ".parquet":
        return PromptFile(path, _Arrow(_parquet(path)))
    cure = "write one object a line, as .jsonl" if path.suffix == ".json" else "rename or convert it"
    raise TaskError(f"{path} is none of .jsonl, .csv, .parquet or a directory of Hugging Face datasets: {cure}")


def _wrong(row: Any) -> str | None:
    """What makes a row no prompt, or None."""
    if not isinstance(row, Mapping):
        return f"{row!r:.60} is no object"
    if "prompt" in row and row["prompt"] is None:
        return 'its "prompt" is null'
    if "prompt" not in row:
        return f'it has no "prompt", only {", ".join(map(repr, row)) or "nothing"}'
    if not _is_unicode(row):
        return "a text in it holds half of a surrogate pair, which no tokenizer reads"
    prompt, completion = row["prompt"], row.get("completion")
    demonstrations = completion if isinstance(completion, list) else [completion or ""]
    if not demonstrations or not all(isinstance(text, str) for text in demonstrations):
        return f'its "completion" is {completion!r:.60}, neither a text nor a list of texts'
    if isinstance(prompt, str):
        return None if prompt.strip() else 'its "prompt" is empty'
    if not isinstance(prompt, list) or not prompt:
        return f'its "prompt" is {prompt!r:.60}, neither a text nor a list of messages'
    for message in prompt:
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            return (
                f'{message!r:.60} in its "prompt" is no message such as {{"role": "user", "content": "..."}} (roles: '
                f"{', '.join(_ROLES)})"
            )
    if prompt[-1]["role"] == "assistant":
        return 'the last message of its "prompt" is the assistant\'s, which would stand before another turn of it'
    return None


def _is_unicode(value: Any) -> bool:
    """Whether all texts in a row can be written as UTF-8; JSON may spell others, as \\ud800."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return all(map(_is_unicode, parts))


class _JsonLines(Sequence[Row]):
    """The objects of a JSONL file, each parsed when it is asked for; blank lines do not count.

    Attributes:
      lines: [n] the line of each row, from 1.
    """

    def __init__(self, path: Path) -> None:
        starts, lines, at = [], [], 0
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip() and not (at == 0 and text.strip() == b"\xef\xbb\xbf"):
                    starts.append(at)
                    lines.append(line)
                at += len(text)
        self.path, self.starts = path, np.array([*starts, at], np.int64)
        self.lines: Sequence[int] = np.array(lines, np.int64)  # pyright: ignore[reportAttributeAccessIssue]
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if at else b""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= number < len(self):
            raise IndexError(number)
        text = self.bytes[self.starts[number] : self.starts[number + 1]]
        try:
            return json.loads(text.decode("utf-8-sig"))
        except ValueError as error:  # of JSON or of UTF-8
            where = f"{self.path}, line {self.lines[number]}"
            raise TaskError(f"{where}: no JSON ({error}); a row is {EXPECTED}") from None


def _csv(path: Path) -> PromptFile:
    """A CSV file whose first line names the columns; an empty cell is None."""
    rows, lines = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, begins = next(reader, []), reader.line_num + 1
            if "prompt" not in header or len(set(header)) < len(header):
                raise TaskError(f"{path}, line 1: {header} must name the columns, each once, with prompt among them")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise TaskError(
                        f"{path}, line {begins}: {len(cells)} cells, but the first line names {len(header)} columns "
                        f"({', '.join(header)}): put texts with commas between double quotes"
                    )
                if cells and "completion" in header and _is_list(cells[header.index("completion")]):
                    raise TaskError(
                        f"{path}, line {begins}: its completion is a list, and a cell of CSV is one text: write "
                        "the rows as .jsonl"
                    )
                if cells:
                    rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
                    lines.append(begins)
                begins = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise TaskError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
        except csv.Error as error:
            raise TaskError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    return PromptFile(path, rows, lines)


def _is_list(cell: str) -> bool:
    """Whether a cell holds a list of texts in JSON."""
    try:
        value = json.loads(cell) if cell.lstrip().startswith("[") else None
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


class _Arrow(Sequence[Row]):
    """The rows of an Arrow table."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), _DEEPEST_READ):
            yield from self.table.slice(first, _DEEPEST_READ).to_pylist()

    def __getitem__(self, number: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.table.slice(number, 1).to_pylist()[0]


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path, memory_map=True)
    except (ArrowException, OSError) as error:
        raise TaskError(f"{path} is no Parquet file that can be read ({_line(error)}): fetch it again") from None


def _saved_dataset(path: Path) -> Any:
    """The table of a directory that `Dataset.save_to_disk` wrote."""
    import pyarrow
    from pyarrow import ipc

    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text()).get("splits", [])
        raise TaskError(f"{path} holds the splits {', '.join(names)}: name one of them, as in {path / names[0]}")
    state = path / "state.json"
    if not state.is_file():
        raise TaskError(f"{path} has no state.json: it is no directory that Hugging Face datasets saved")
    files = [path / one["filename"] for one in json.loads(state.read_text())["_data_files"]]
    try:
        tables = [ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files]
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path} cannot be read ({_line(error)}): save the dataset again") from None
    return pyarrow.concat_tables(tables)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
