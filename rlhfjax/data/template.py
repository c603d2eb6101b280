"""Chat templates: from a conversation to tokens and their loss mask, and back.

A template is Jinja source, as Hugging Face's tokenizers carry it; `built_in_templates` has some. It
is rendered once per sequence of roles, with placeholders for the contents. That cuts it into
`Piece`s: text of the template, special tokens, and contents. Contents are inserted afterwards, as
ordinary characters, so a message that spells a special token does not get one.

Two kinds of template are errors: one that changes a content by more than trimming it, and one whose
assistant's turn does not start after the generation prompt or does not end with a special token. A
template may write a thought (`thoughts`) in the last response and leave it out of earlier ones;
`keeps_responses` says whether it does.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlhfjax import json_text
from rlhfjax.data import thoughts, tools
from rlhfjax.data.built_in_templates import BUILT_IN, MARKERS, OURS
from rlhfjax.data.pieces import (
    BLANKS,
    PLACEHOLDER,
    RESPONSE,
    SURROGATE,
    Piece,
    common_prefix,
    content_piece,
    placeholder,
    responses,
    sequences,
)
from rlhfjax.data.read_back import Reader, Separator
from rlhfjax.data.sandbox import Program, explain
from rlhfjax.data.template_cost import LIMIT, too_much
from rlhfjax.data.thoughts import Shape, Turn
from rlhfjax.errors import DataError

Message = Mapping[str, str]
ROLES = ("user", "assistant", "system")
KNOWN_ROLES = (*ROLES, tools.TOOL)


class Template:
    """A chat template with a tokenizer.

    Args:
      source: Jinja source. With "" the methods that render raise DataError.
      specials: text of each special token -> id.
      names: variables of the source, such as bos_token and eos_token.
      encode: encode(text, before) returns ids, never of specials. `before` is what stands right
        before the text: "text", "special" or "nothing".
      decode: returns the text of some ids.
      swallows: ids of specials that swallow the blanks after them, as Phi-3's do.
      context: the tokenizer's file, for errors.

    Raises:
      DataError: the source is not Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        specials: Mapping[str, int],
        names: Mapping[str, str],
        encode: Callable[[str, str], list[int]],
        decode: Callable[[list[int]], str],
        swallows: Iterable[int] = (),
        context: str = "tokenizer",
    ):
        self.source = source
        self.context = context
        self._specials = dict(specials)
        self._names = dict(names)
        # What decides how messages are rendered.
        self.identity = source, self._specials, self._names
        self._decode = decode
        self._swallows = frozenset(swallows)
        # A conversation that is cut to length is rendered several times.
        self._encode = functools.lru_cache(1024)(encode)
        self._pieces = functools.lru_cache(4096)(self._cut)
        self._jinja = Program(source, context)
        knows_thoughts = thoughts.MARKS[1] in source
        self._split = thoughts.split if knows_thoughts else thoughts.whole
        longest_first = sorted(self._specials, key=len, reverse=True)
        parts = [RESPONSE, PLACEHOLDER, *map(re.escape, longest_first)]
        self._splitter = re.compile(f"({'|'.join(parts)})")

    @functools.cached_property
    def end_id(self) -> int:
        """The special token that ends the assistant's turn."""
        pieces = reversed(self._pieces((Shape("user"), Shape("assistant")), False))
        return next(p.token for p in pieces if p.learned and p.token is not None)

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens: text -> id."""
        return self._specials

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """The special tokens that the template writes."""
        return self._reader.tokens

    @property
    def plain_markers(self) -> list[str]:
        """The markers of turns that a message can spell, such as Llama 2's `[/INST]`."""
        return self._reader.plain_markers if self.source else []

    def text(self, messages: Sequence[Message], *, cue: bool = False) -> str:
        """Returns the rendered conversation.

        Args:
          cue: end with the generation prompt.
        Raises:
          DataError: the template does not take these messages.
        """
        if not self.source:
            raise DataError(
                f"{self.context}: it has no chat template; "
                f"accepted: {', '.join(BUILT_IN)} or Jinja source"
            )
        given, definitions = tools.split_definitions(self._adapted(messages))
        try:
            text = self._jinja.render(
                messages=[tools.as_object(one) for one in given],
                add_generation_prompt=cue,
                tools=definitions,
                documents=None,
                **self._names,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise self._error(explain(error)) from None
        if not tools.are_written(definitions, text):
            raise self._error("it does not write the definitions of tools")
        return text

    def render(
        self, messages: Sequence[Message], *, cue: bool = False
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens of a conversation, and the loss mask.

        The mask is 1 on what the assistant has to produce, including the end of its turn. Text is
        encoded separately before and after the start of each response, so a rendered prompt is a
        prefix of the rendered conversation.

        Args:
          cue: end with the generation prompt.
        Raises:
          DataError: a role is unknown, or the template cannot be cut into turns.
        """
        return self._tokens(self.validate(messages, cue=cue), self._turns(messages))

    def keeps_responses(self, messages: Sequence[Message]) -> bool:
        """Returns whether all responses stand in the conversation as the assistant produced them.

        A template that leaves thoughts out of earlier responses does not keep those.

        Raises:
          DataError: the template does not take these messages.
        """
        if self.source == OURS:
            return True
        shapes = _shapes(self._turns(messages))
        kept = responses(self._pieces(shapes, False))
        for i, shape in enumerate(shapes):
            if shape.role == "assistant":
                produced = responses(self._pieces(shapes[: i + 1], False))
                if kept.get(i) != produced[i]:
                    return False
        return True

    def validate(
        self, messages: Sequence[Message], *, cue: bool = False
    ) -> tuple[Piece, ...]:
        """Returns the pieces of a conversation. Raises as `render` does, and encodes nothing."""
        for message in messages:
            if message["role"] not in KNOWN_ROLES:
                raise DataError(
                    f"chat: role {message['role']!r} is none of {', '.join(KNOWN_ROLES)}"
                )
        turns = self._turns(messages)
        pieces = self._pieces(_shapes(turns), cue)
        # Our own template is known to write contents as they are, and is the most used.
        if self.source != OURS:
            filled = "".join([piece.fill(turns) for piece in pieces])
            if filled != self.text(messages, cue=cue):
                raise self._error("it changes a message by more than trimming it")
        return pieces

    def edges(
        self, messages: Sequence[Message], message: int, *, cue: bool = False
    ) -> tuple[int, int]:
        """Returns the number of tokens around one content.

        First the tokens before it, then those between it and the next response.
        """
        turns = self._turns(messages)
        pieces = self._pieces(_shapes(turns), cue)
        at = next(i for i, piece in enumerate(pieces) if piece.message == message)
        end = at + 1
        while end < len(pieces) and not pieces[end].learned:
            end += 1
        whole, before, between = (
            self._tokens(part, turns)[0]
            for part in (pieces[:end], pieces[:at], pieces[at + 1 : end])
        )
        return common_prefix(whole, before), common_prefix(whole[::-1], between[::-1])

    def messages(self, ids: Iterable[int]) -> list[dict[str, str]]:
        """Returns the turns of rendered ids, with the roles that their markers name.

        Ids without any marker are one user turn. A prompt that ends with the generation prompt ends
        with an empty turn of the assistant.
        """
        return self._reader.messages(ids)

    def _adapted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Returns the messages in the way that the template takes calls of tools."""
        if all(map(tools.is_plain, messages)):
            return messages
        return [tools.adapted(message, self.source) for message in messages]

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        adapted = self._adapted(messages)
        turns = [self._split(message) for message in adapted]
        if adapted is messages:
            return turns
        return [self._with_extra(*pair) for pair in zip(turns, adapted, strict=True)]

    def _with_extra(self, turn: Turn, message: Message) -> Turn:
        """Returns a turn with its calls, which are no special tokens whatever they spell."""
        extra = tools.extra_of(message)
        tools.validate_without(self._specials, message)
        empty = bool(extra) and message["role"] != tools.TOOL and not turn.answer
        return turn._replace(shape=turn.shape._replace(extra=extra, empty=empty))

    def _cut(self, shapes: tuple[Shape, ...], cue: bool) -> tuple[Piece, ...]:
        """Returns the pieces of a conversation whose turns have these shapes."""
        pieces: list[Piece] = []
        ends: list[int] = []  # special tokens that end a response
        response: int | None = None
        spoken = False
        calls = any(shape.extra and shape.role != "system" for shape in shapes)
        marked, marks = self._marked(shapes, cue)
        for part in filter(None, self._splitter.split(marked)):
            if part == RESPONSE:
                response, spoken = marks.pop(0), False
            elif part in self._specials:
                token = self._specials[part]
                pieces.append(Piece(part, token, response=response))
                if response is not None and spoken:
                    ends.append(token)
                    response = None
            elif content := content_piece(part, response):
                pieces.append(content)
                spoken = spoken or not content.thought
            elif SURROGATE.search(part):
                raise self._error("it writes a lone surrogate")
            else:
                pieces.append(Piece(part, response=response))
                spoken = spoken or (calls and bool(part.strip()))
        self._validate_contents(pieces, shapes)
        if len(ends) != marked.count(RESPONSE) or len(set(ends)) > 1:
            raise self._error("no one special token ends each turn of the assistant")
        return tuple(pieces)

    def _validate_contents(
        self, pieces: Sequence[Piece], shapes: Sequence[Shape]
    ) -> None:
        """Raises DataError if a message is missing or misplaced, or the last thought is missing."""
        contents = [piece for piece in pieces if piece.message is not None]
        thinking = {piece.message for piece in contents if piece.thought}
        answers = [piece.message for piece in contents if not piece.thought]
        if answers != [i for i, shape in enumerate(shapes) if not shape.empty]:
            roles = "/".join(shape.role for shape in shapes)
            raise self._error(
                f"it does not write each message of {roles} once and in order"
            )
        thoughtful = {i for i, shape in enumerate(shapes) if shape.thinks}
        if not thinking <= thoughtful:
            raise self._error("it writes a lone surrogate")
        if len(shapes) - 1 in thoughtful - thinking:
            raise self._error(
                "it leaves the thought out of the last response, so that none can be learned"
            )

    def _marked(self, shapes: tuple[Shape, ...], cue: bool) -> tuple[str, list[int]]:
        """Returns the rendered placeholders, with a mark where each response starts.

        An earlier response that the template does not write as it was produced has no mark.

        Returns:
          the text, and the indices of the messages that have a mark.
        """
        marks: list[int] = []
        for marker in MARKERS.get(self.source, ()):
            if marker not in self._specials:
                raise DataError(
                    f"{self.context}: this chat template needs a token of its own for {marker!r}"
                )
        whole = self._placeholders(shapes, cue)
        for i in reversed(range(len(shapes))):
            if shapes[i].role != "assistant":
                continue
            prompt = self._placeholders(shapes[:i], True)
            if whole.startswith(prompt):
                whole = prompt + RESPONSE + whole[len(prompt) :]
                marks.insert(0, i)
            elif i == len(shapes) - 1:
                raise self._error(
                    "the assistant's turn does not start where its generation prompt ends"
                )
        return whole, marks

    def _placeholders(self, shapes: tuple[Shape, ...], cue: bool) -> str:
        messages = []
        for i, shape in enumerate(shapes):
            thought = placeholder(i, thought=True) if shape.thinks else ""
            answer = "" if shape.empty else placeholder(i)
            content = shape.opening + thought + shape.ending + answer
            extra = json_text.parse(shape.extra) if shape.extra else {}
            messages.append({"role": shape.role, "content": content, **extra})
        text = self.text(messages, cue=cue)
        if RESPONSE in text:
            raise self._error("it writes a lone surrogate")
        return text

    def _tokens(
        self, pieces: Iterable[Piece], turns: Sequence[Turn]
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens and the loss mask of some pieces."""
        tokens: list[int] = []
        mask: list[float] = []
        before = "nothing"
        swallows = False
        runs = itertools.groupby(pieces, key=lambda piece: (piece.token, piece.learned))
        for (token, learned), run in runs:
            if token is None:
                # Text between two special tokens is encoded as one.
                text = "".join(piece.fill(turns) for piece in run)
                text = text.lstrip(BLANKS) if swallows else text
                if swallows and not text:
                    continue
                swallows = False
                ids = self._encode(text, before)
                before = "text"
            else:
                ids = [token for _ in run]
                before = "special"
                swallows = token in self._swallows
            tokens += ids
            mask += [float(learned)] * len(ids)
        return tokens, mask

    @functools.cached_property
    def _reader(self) -> Reader:
        speakers: dict[Separator, str | None] = {}
        before = self._jinja.spent
        for shapes, cue in itertools.product(sequences(ROLES, 3), (True, False)):
            if self._jinja.spent - before > LIMIT:  # renderings just below it add up
                raise self._error(too_much(LIMIT))
            try:
                pieces = self._pieces(shapes, cue)
            except DataError:  # not every template takes every sequence
                continue
            separator: Separator = ()
            for piece in pieces:
                if piece.message is None:
                    separator += (dataclasses.replace(piece, response=None),)
                    continue
                role = shapes[piece.message].role
                speakers[separator] = speakers.get(separator) or role
                separator = ()
            last = "assistant" if cue else None
            speakers[separator] = speakers.get(separator) or last
        return Reader(
            speakers,
            specials=self._specials,
            swallows=self._swallows,
            decode=self._decode,
        )

    def _error(self, why: str) -> DataError:
        return DataError(
            f"{self.context}: the chat template cannot be used: {why}; "
            f"accepted: {', '.join(BUILT_IN)} or Jinja source that writes turns"
        )


def _shapes(turns: Sequence[Turn]) -> tuple[Shape, ...]:
    return tuple(turn.shape for turn in turns)
