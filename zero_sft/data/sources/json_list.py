"""Read a JSON list item by item, since the file may be larger than memory."""

import re
from collections.abc import Iterator
from typing import Any, TextIO

from zero_sft.json_text import JsonError, parse_json_at

_CHUNK = 2**20  # characters
_KEPT = 64  # characters before the place of reading, for messages
_LONGEST_WORD = 32  # characters; an item that ends in the middle of a word, such as `fals`, is at fault at the word's beginning
_END = re.compile(r"[ \t\n\r,\]]")
_SPACE = re.compile(r"[ \t\n\r]*")


class ListReader:
    """An iterator over the items of a JSON list, with about one chunk or twice the largest item in memory.

    Iterating raises `JsonError` where the text is not a JSON list; it is not possible to go on after that.

    Args:
        chunk: the least number of characters that are read at a time.

    Attributes:
        text: the part of the file that is in memory.
        line: the line of the file, from 1, in which the fault of a raised `JsonError` is; that of the item's beginning if the
            error has no position.
        column: its column.
    """

    def __init__(self, file: TextIO, *, chunk: int = _CHUNK) -> None:
        self.text, self.line, self.column = "", 1, 1
        self._file, self._chunk, self._at = file, chunk, 0
        self._lines_before = self._columns_before = 0  # of the text that is no longer in memory

    def __iter__(self) -> Iterator[Any]:
        try:
            self._take("[")
            if self._next() == "]":
                self._at += 1
            else:
                yield from self._items()
            if self._next():
                raise JsonError("extra data", self.text, self._at)
        except JsonError as error:
            fault = JsonError("", self.text, self._at if error.position is None else error.position)
            self.line = self._lines_before + fault.line
            self.column = fault.column + (self._columns_before if fault.line == 1 else 0)
            raise

    def _items(self) -> Iterator[Any]:
        while True:
            self._next()
            yield self._item()
            if self._next() == "]":
                self._at += 1
                return
            self._take(",")

    def _item(self) -> Any:
        """Parse the next item, and read on as long as it may be incomplete."""
        while True:
            try:
                item, end = parse_json_at(self.text, self._at)
                is_cut = end >= len(self.text) - _LONGEST_WORD and not _END.match(self.text, end)  # a number may go on
                if not is_cut or not self._read_on():
                    self._at = end
                    return item
            except JsonError as error:
                position = error.position
                is_cut = position is not None and position >= len(self.text) - _LONGEST_WORD
                if not (is_cut or error.is_open_string) or not self._read_on():
                    raise

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise JsonError(f"expecting {character!r}", self.text, self._at)
        self._at += 1

    def _next(self) -> str:
        """Skip white space and return the character after it; an empty string at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self.text) or not self._read_on():
                return self.text[self._at : self._at + 1]

    def _read_on(self) -> bool:
        """Read another chunk, as large as what is not yet parsed; return whether there was one."""
        chunk = self._file.read(max(self._chunk, len(self.text) - self._at))
        if chunk:
            dropped = self.text[: max(0, self._at - _KEPT)]
            self._lines_before += dropped.count("\n")
            last_line = len(dropped) - (dropped.rfind("\n") + 1)
            self._columns_before = last_line if "\n" in dropped else self._columns_before + last_line
            self.text = self.text[len(dropped) :] + chunk
            self._at -= len(dropped)
        return bool(chunk)
