"""A reader that ends its process, for the test of what happens then."""

import os

from tests.fuzz.readers.table import Table, text_reader

TABLE: Table = {}


def _die(text: str) -> None:
    if "die" in text:
        os._exit(7)


text_reader(TABLE, "planted_crash", ["live"], ("die",), _die, examples=100)
