"""The forms of rows: how datasets spell conversations, preferences and labels.

`FORMS` is the one table that names a form. A form is recognized by its columns, once per source: by
the first row that has the columns of one. `docs/data.md` shows a row of each.

A new form is a function in `form_readers`, an entry in this table and in that of `docs/data.md`,
and a row in `tests/data/row_forms.py`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from rlhfjax import json_text
from rlhfjax.arguments import did_you_mean
from rlhfjax.data import chat, rows
from rlhfjax.data import form_readers as readers
from rlhfjax.data.columns import BadRow, plain
from rlhfjax.data.rows import Row
from rlhfjax.data.tools import DEFINITIONS
from rlhfjax.errors import ConfigError
from rlhfjax.renamed import row_with_present_names


class Form(NamedTuple):
    """A form of rows."""

    columns: tuple[str, ...]  # it is recognized by them
    kind: str  # of the rows that it gives; see `rows`
    read: Callable[[Row], Row] | None = None  # None: the columns are those of the kind
    optional: tuple[str, ...] = ()  # columns that are read where a row has them


_SCORES = ("margin", "score_chosen", "score_rejected")
FORMS: dict[str, Form] = {
    **{name: Form(rows.COLUMNS[name], name) for name in rows.COLUMNS},
    "sharegpt": Form(("conversations",), "messages", readers.sharegpt, ("system",)),
    "alpaca": Form(
        ("instruction", "output"), "messages", readers.alpaca, ("input", "system")
    ),
    "prompt_completion": Form(
        ("prompt", "completion"), "messages", readers.prompt_completion
    ),
    "pair": Form(
        ("prompt", "chosen", "rejected"), "preferences", readers.pair, _SCORES
    ),
    "implicit_pair": Form(
        ("chosen", "rejected"), "preferences", readers.implicit_pair, _SCORES
    ),
    "ranks": Form(
        ("prompt", "completions", "ranks"), "preferences", readers.ranks, ("labeler",)
    ),
    "ranking": Form(
        ("prompt", "completions", "ranking"),
        "preferences",
        readers.ranking,
        ("labeler",),
    ),
    "nectar": Form(("prompt", "answers"), "preferences", readers.nectar),
    "ultrafeedback": Form(
        ("instruction", "completions"), "preferences", readers.ultrafeedback
    ),
    "shp": Form(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "preferences",
        readers.shp,
        ("score_A", "score_B"),
    ),
    "kto": Form(("prompt", "completion", "label"), "unpaired", readers.kto),
    "stepwise": Form(("prompt", "completions", "labels"), "steps", readers.stepwise),
    "prm800k": Form(("question", "label"), "steps", readers.prm800k),
    "math_shepherd": Form(("input", "label"), "steps", readers.math_shepherd),
}


VALUES = (
    *(
        "completions",
        "desirable",
        "label",
        "labels",
        "margin",
        "ranking",
        "ranks",
        "scores",
    ),
    *("score_A", "score_B", "score_chosen", "score_rejected", "steps"),
)
"""Columns that are no texts. In formats of texts alone, such as CSV, they hold JSON."""


_NO_FORM = "; no form of rows has these columns; columns= maps ours to them"


class Reader:
    """Reads the raw rows of one source as rows of one kind.

    Args:
      kind: kind of the rows; None: that of the form.
      columns: our column names to the source's; a form is recognized by our names.
      form: name of the form; None: recognized by the columns.
      context: the source, for errors.
      has_only_text: the source's format has no other values, see VALUES.

    Raises:
      ConfigError: the kind, a column or the form is invalid, or they do not fit together.
    """

    def __init__(
        self,
        kind: str | None,
        columns: Mapping[str, str],
        form: str | None = None,
        context: str = "source",
        has_only_text: bool = False,
    ):
        rows.validate_kind(kind or "text", columns)
        self._has_only_text = has_only_text
        self._kind = kind
        self._columns = dict(columns)
        self._context = context
        self.form: str | None = None
        """Name of the form; None until the first row that has one."""
        self._read: Form | None = None  # None: the kind's own columns
        self._required: list[str] = []  # columns of a form that is not the kind's own
        self._hint = ""
        if form is not None:
            self._validate_form(form)
            self._set(form)

    @property
    def kind(self) -> str:
        """The kind of the rows; without one that is given, `text` until the form is known."""
        return self._kind or "text"

    def __call__(self, raw: Mapping[str, Any]) -> Row:
        """Returns a row of the kind. Raises BadRow, and ConfigError for columns of two forms."""
        if self._has_only_text:
            raw = self._with_values(raw)
        if self.form is None and isinstance(raw, Mapping):
            self.recognize(row_with_present_names(raw))
        if self._read is not None:
            return self._foreign(raw, self._read)
        try:
            return rows.normalize(self.kind, raw, self._columns)
        except BadRow as reason:
            hint = self._hint if self._kind else _NO_FORM
            if self.form is None and hint:
                raise BadRow(f"{reason}{hint}") from None
            raise

    def recognize(self, names: Collection[str]) -> list[str]:
        """Sets the form by the source's columns, unless none fits.

        Returns:
          the columns that every row must have, by the source's names.
        """
        if self.form is None:
            form = self._choose(self._our_names(names))
            if form is not None:
                self._set(form)
        if self._read is None:
            return rows.required_columns(self.kind, self._columns)
        return self._required

    def _with_values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row of texts with the values of columns that hold JSON."""
        row = dict(raw)
        for name in VALUES:
            column = self._columns.get(name, name)
            if column in row:
                row[column] = _value_of(row[column])
        return row

    def _set(self, name: str) -> None:
        form = FORMS[name]
        self._kind = self._kind or form.kind
        self.form = name
        if form.read is None and form.kind == self._kind:
            return
        self._read = form
        extra = [column for column in self._columns if column not in form.columns]
        names = [*form.columns, *extra]
        self._required = [self._columns.get(column, column) for column in names]

    def _our_names(self, names: Collection[str]) -> set[str]:
        """Returns the columns of a source by our names."""
        renamed = {ours for ours, column in self._columns.items() if column in names}
        others = set(names) - set(self._columns.values())
        return renamed | others

    def _choose(self, names: set[str]) -> str | None:
        """Returns the form that columns fit, None if none does. Raises ConfigError for several."""
        own = self._kind or "text"
        is_pair = own == "preferences" and "chosen" in self._columns
        if set(rows.COLUMNS[own]) <= names and not is_pair:
            return own
        fitting = [form for form in FORMS if set(FORMS[form].columns) <= names]
        fitting = [form for form in fitting if not _is_part(form, fitting)]
        useful = [form for form in fitting if self._gives(form)]
        if len(useful) > 1:
            raise ConfigError(
                f"{self._context}: columns of the forms {' and '.join(useful)};"
                f" form={useful[0]!r} or form={useful[1]!r} chooses one"
            )
        if fitting and not useful:
            kind = FORMS[fitting[0]].kind
            self._hint = f"; these are columns of form {fitting[0]!r}, of kind {kind}"
        return useful[0] if useful else None

    def _gives(self, form: str) -> bool:
        """Returns whether a form gives rows of the kind."""
        return gives(form, self._kind) if self._kind else True

    def _validate_form(self, form: str) -> None:
        if form not in FORMS:
            raise ConfigError(
                f"{self._context}: form {form!r} is none of {', '.join(FORMS)}"
                f"{did_you_mean(form, FORMS)}"
            )
        if not self._gives(form):
            raise ConfigError(
                f"{self._context}: form={form!r} gives rows of kind {FORMS[form].kind},"
                f" not {self._kind}"
            )

    def _foreign(self, raw: Mapping[str, Any], form: Form) -> Row:
        """Returns a row of another form than the kind's own."""
        if not isinstance(raw, Mapping):
            raise BadRow(f"expected columns by name, got {type(raw).__name__}")
        raw = row_with_present_names(raw)
        for name in self._required:
            if name not in raw:
                raise BadRow(
                    f"no column {name!r}, found {rows.names_of(raw)};"
                    f" rows are read as form {self.form!r}"
                )
        given = {name: plain(raw[column]) for name, column in self._columns.items()}
        for name in self._read_by_name(form):
            if name not in given and name in raw:
                given[name] = plain(raw[name])
        read_here = (*form.columns, *form.optional, DEFINITIONS)
        extra = {name: value for name, value in given.items() if name not in read_here}
        definitions = given.pop(DEFINITIONS, None)
        row = given if form.read is None else form.read(given)
        row = rows.finish(form.kind, row | {DEFINITIONS: definitions})
        if form.kind != self.kind:
            row = {"messages": prompt_in(row)}
        return extra | row

    def _read_by_name(self, form: Form) -> tuple[str, ...]:
        """Returns the columns that are read under the form's own names.

        Where `columns` names chosen and rejected, it has to name scores and margins too.
        """
        if "chosen" in self._columns:
            return (*form.columns, DEFINITIONS)
        return (*form.columns, *form.optional, DEFINITIONS)


def _value_of(text: str) -> Any:
    """Returns the value of a JSON text; other text as it is, which is refused where it is read."""
    if text in ("True", "False"):  # as pandas writes them
        return text == "True"
    try:
        return json_text.parse(text)
    except json_text.NotJson:
        return text


def gives(form: str, kind: str) -> bool:
    """Returns whether rows of a form can be read as a kind: its own, or the prompt in them."""
    own = FORMS[form].kind
    return own == kind or (kind == "prompt" and own != "text")


def _is_part(form: str, fitting: Collection[str]) -> bool:
    """Returns whether another fitting form has all columns of this one, and more."""
    columns = set(FORMS[form].columns)
    return any(columns < set(FORMS[other].columns) for other in fitting)


def prompt_in(row: Row) -> chat.Turns:
    """Returns the prompt of a row of any kind but text: its turns up to the last of the user."""
    if "messages" not in row:
        return chat.Turns([{"role": "user", "content": row["prompt"]}])
    turns = row["messages"]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise BadRow("there is no user turn, which a prompt ends with")
    return turns
