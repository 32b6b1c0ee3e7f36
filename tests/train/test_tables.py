"""Tables: on narrow terminals texts fold and rows become blocks, and every number stays whole."""

import io
import pathlib

import pytest
from rich.console import Console

import mara_jax
from mara_jax.train import metrics
from mara_jax.train.tables import NumberTable

NUMBERS = ("0.123456", "98.7654", "1,234,567", "-1e-12", "0.250 - 0.375", "100.00")


def printed(renderable, width: int, **options) -> list[str]:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(renderable)
    return console.file.getvalue().splitlines()


def table(**style) -> NumberTable:
    headers = ("", "reward", "KL (nats)", "tokens generated", "gap", "interval", "share of good ones")
    made = NumberTable.with_headers(*headers, title="where completions end", **style)
    made.add_row("the reference policy", *NUMBERS)
    made.add_row("what was reached", "[bold]0.5[/bold]", "", "7\n[dim]6-8[/dim]", "", "", "0.75")
    made.caption = "a caption"
    return made


@pytest.mark.parametrize("soft_wrap", [False, True])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("width", [200, 100, 80, 60, 30])
def test_every_number_is_whole_at_every_width(width, lines, soft_wrap):
    rows = printed(table(lines=lines), width, soft_wrap=soft_wrap)
    text = "\n".join(rows)
    assert all(number in text for number in (*NUMBERS, "0.5", "0.75", "6-8"))
    assert "…" not in text and max(map(len, rows)) <= width
    words = text.split()
    assert all(word in words for word in ("reference", "policy", "reward", "generated", "reached", "caption"))


def test_a_wide_terminal_has_a_line_a_row_and_a_narrow_one_a_line_a_number():
    (line,) = [line for line in printed(table(), 200) if "reference" in line]
    assert line.split() == ["the", "reference", "policy", *" ".join(NUMBERS).split()]
    lines = [line.split() for line in printed(table(), 40)]
    assert ["KL", "(nats)", "98.7654"] in lines and ["gap", "-1e-12"] in lines
    assert ["the", "reference", "policy"] in lines


@pytest.mark.parametrize("width", [80, 60, 40])
def test_the_panel_of_a_run_shows_whole_numbers(width):
    row = {key: 0.12345 * 10**place for place, key in enumerate(metrics.SHOWN)}
    with metrics.Display(10, io.StringIO()) as display:
        display.latest = row
        display.console.width = width
        text = "\n".join(printed(display._panel(), width))
    for key, value in row.items():
        assert metrics._shown(key, value) in text


def test_every_table_of_the_package_is_one():
    root = pathlib.Path(mara_jax.__file__).parent
    others = [path.relative_to(root) for path in root.rglob("*.py") if "rich.table" in path.read_text()]
    assert [str(path) for path in others] == ["train/tables.py"]


def test_a_steps_line_shows_counts_as_whole_numbers():
    written = io.StringIO()
    row = {"step": 3, "reward/mean": 1.0, "task/oracle_calls": 1059.0, "task/hits": 2.0, "kl/reverse": 0.25}
    metrics.Display(9, written).step(row, [("CCO", True)])
    line = "step 3/9  reward 1.000  oracle calls 1,059  hits 2  KL (nats) 0.250\n    + 'CCO'\n"
    assert written.getvalue() == line
