"""Tables for a terminal of any width, in which no number is ever cut."""

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

ANY_WIDTH = 10_000  # of a terminal on which every column has the width that it asks for


class NumberTable(Table):
    """A rich table of texts, aligned left, and numbers, aligned right.

    Where the terminal is narrow, texts and headers are folded between words. Where that is not enough, rich would
    shorten numbers to "0.…"; this table then prints each row as a block of lines, one for each column.
    """

    @classmethod
    def with_headers(
        cls, *headers: str, texts: int = 1, lines: bool = False, title: str | None = None
    ) -> "NumberTable":
        """An empty table.

        Args:
          headers: the names of its columns.
          texts: how many of them, from the left, hold texts; the others hold numbers.
          lines: whether a line separates headers and rows.
          title: printed above it.
        """
        table = cls(title=title, title_justify="left", pad_edge=False, show_header=any(headers))
        table.box = box.SIMPLE_HEAD if lines else None
        table.padding = (0, 1 if lines else 2, 0, 0)
        for place, header in enumerate(headers):
            table.add_column(header, justify="left" if place < texts else "right", overflow="fold")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.columns:
            return
        for column in self.columns:
            column.width = None
        wide = options.update_width(ANY_WIDTH)
        least, most = zip(*(self._range(console, wide, column) for column in self.columns), strict=True)
        borders = self.__rich_measure__(console, wide).maximum - sum(most)
        widths, room = list(least), options.max_width - borders
        if sum(widths) > room:
            yield from self._blocks()
            return
        while sum(widths) < min(room, sum(most)):  # what is left goes to the column that lacks most
            lacking = [full - width for full, width in zip(most, widths, strict=True)]
            widths[lacking.index(max(lacking))] += 1
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _range(self, console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
        """The least width of a column, at which words and numbers are whole, and the one at which nothing is folded."""
        header = Measurement.get(console, options, column.header if self.show_header else "")
        cells = [Measurement.get(console, options, cell) for cell in column.cells]
        most = max([0, *(cell.maximum for cell in cells)])
        least = most if column.justify == "right" else max([0, *(cell.minimum for cell in cells)])
        return max(1, least, header.minimum), max(1, most, header.maximum)

    def _blocks(self) -> RenderResult:
        if self.title:
            yield Text.from_markup(str(self.title), style="italic")
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield self._block(row)
        if self.caption:
            yield Text.from_markup(str(self.caption), style="dim italic")

    def _block(self, cells: Sequence) -> Table:
        """One row: its first text, then a line for each other cell, with its header if there is one."""
        block = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        block.add_column(overflow="fold")
        block.add_column(overflow="fold", no_wrap=False)
        for place, (column, cell) in enumerate(zip(self.columns, cells, strict=True)):
            if cell:
                block.add_row(*((cell,) if place == 0 else ("  " + str(column.header), cell)))
        return block
