"""Prompt files: the same rows from every format, and each wrong row named by its place."""

import json

import pyarrow
import pytest
from pyarrow import ipc, parquet

from mara_jax.tasks import prompt_file

ROWS = [
    {"prompt": "Name a prime, any prime.", "solution": "7", "weight": 2},
    {"prompt": 'Say "hé", please\nnow', "solution": "hé", "weight": None},
    {"prompt": "Last", "solution": "", "weight": 3},
]


def written(path, kind):
    """The rows in a file of this kind."""
    table = pyarrow.Table.from_pylist(ROWS)
    where = path / f"rows.{kind}"
    if kind == "jsonl":
        where.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", "utf-8")
    elif kind == "parquet":
        parquet.write_table(table, where)
    else:  # as Dataset.save_to_disk of Hugging Face datasets leaves it
        where.mkdir()
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
            with ipc.new_stream(where / name, table.schema) as stream:
                stream.write_table(part)
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
        (where / "state.json").write_text(json.dumps(state))
        (where / "dataset_info.json").write_text("{}")
    return where


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    file = prompt_file.read(written(tmp_path, kind))
    assert [dict(row) for row in file] == ROWS and len(file) == 3 and file.columns == ("prompt", "solution", "weight")
    assert [dict(file[number]) for number in (2, 0)] == [ROWS[2], ROWS[0]]
    with pytest.raises(IndexError):
        file[3]
    assert file.where(1).endswith("rows.jsonl, line 3" if kind == "jsonl" else f"rows.{kind}, row 2")


def test_csv_has_texts_and_empty_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('prompt,solution\r\n"Name a prime, any.",7\r\n\r\n"two\nlines",\r\nlast,x\r\n'.encode("utf-8-sig"))
    file = prompt_file.read(path)
    assert list(file) == [
        {"prompt": "Name a prime, any.", "solution": "7"},
        {"prompt": "two\nlines", "solution": None},
        {"prompt": "last", "solution": "x"},
    ]
    assert [file.where(number) for number in (1, 2)] == [f"{path}, line 4", f"{path}, line 6"]


def test_chat_messages_are_prompts(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = tmp_path / "chat.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": messages}]), path)
    assert prompt_file.read(path)[0]["prompt"] == messages


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": [{"role": "assistant", "content": "1+"}]}', 'the last message of its "prompt" is the assistant'),
        ('{"prompt": null, "x": 1}', 'line 1: its "prompt" is null'),
        ('{"prompt": "a \\ud800"}', "line 1: a text in it holds half of a surrogate pair"),
        ('{"prompt": "a", "x": [{"y": "\\udc00"}]}', "half of a surrogate pair"),
        (GOOD + '{"prompt": "b"\n', ", line 2: no JSON (Expecting ',' delimiter"),
        (GOOD + "\n[1]\n", ", line 3: [1] is no object"),
        (GOOD + '{"question": "b", "n": 1}\n', ", line 2: it has no \"prompt\", only 'question', 'n'"),
        (GOOD + "{}\n", ', line 2: it has no "prompt", only nothing'),
        (GOOD + '{"prompt": null}\n', ', line 2: its "prompt" is null'),
        (GOOD + '{"prompt": "  "}\n', ', line 2: its "prompt" is empty'),
        (GOOD + '{"prompt": 7}\n', ', line 2: its "prompt" is 7, neither a text nor a list of messages'),
        (GOOD + '{"prompt": []}\n', "is [], neither"),
        (GOOD + '{"prompt": [{"role": "me", "content": "x"}]}\n', "is no message such as"),
        (GOOD + '{"prompt": "b", "completion": 7}\n', ', line 2: its "completion" is 7, neither a text nor a list'),
        (GOOD.encode() + b'{"prompt": "\xff"}\n', ", line 2: no JSON ('utf-8' codec can't decode"),
        ("", "holds no prompts; a row is {"),
        ("\n \n", "holds no prompts; a row is {"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, text, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        prompt_file.read(path)
    message = str(caught.value)
    assert words in message and message.startswith(str(path)) and '"solution": "7"' in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"question,answer\n1,2\n", "line 1: ['question', 'answer'] must name the columns"),
        ("rows.csv", b"prompt,solution\na,b\nc\n", "line 3: 1 cells, but the first line names 2 columns"),
        ("rows.csv", b"prompt,solution\na,b,c\n", "line 2: 3 cells"),
        ("rows.csv", b'prompt\n"open\n', "no CSV (unexpected end of data)"),
        ("rows.csv", b"prompt\n\xff\n", "is not UTF-8"),
        ("rows.csv", b"", "line 1: [] must name the columns"),
        ("rows.json", b"[]", "write one object a line, as .jsonl"),
        ("rows.txt", b"hello", "rename or convert it"),
        ("rows.parquet", b"PAR1 no", "is no Parquet file that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prompt_file.read(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_directories_that_hold_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r"has no state.json"):
        prompt_file.read(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"holds the splits train, test: name one of them, as in .*/train"):
        prompt_file.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prompt_file.read(tmp_path / "nothing.jsonl")


def test_columns_that_some_rows_lack_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": null}\n\n{"prompt": "c", "x": 2, "y": 3}\n')
    file = prompt_file.read(path)
    assert file.columns == ("prompt", "x", "y") and file.lacking == {"x": (1, 1), "y": (1, 0)}


def test_a_list_in_a_cell_of_csv_is_no_demonstration(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a","[1] is odd"\n"b","[""x"",""y""]"\n')
    with pytest.raises(ValueError, match=r"line 3: its completion is a list, and a cell of CSV is one text"):
        prompt_file.read(path)
