"""Chat templates: from a conversation to tokens and their loss mask, and back.

A template is Jinja source, as Hugging Face's tokenizers carry it. `BUILT_IN` has ours, ChatML,
Llama 2 and Llama 3. A template is rendered once per sequence of roles, with placeholders for the
contents. That cuts it into `Piece`s: text of the template, special tokens, and contents. Contents
are inserted afterwards, as ordinary characters, so a message that spells a special token does not
get one.

Two kinds of template are errors: one that changes a content by more than trimming it, and one whose
assistant's turn does not start after the generation prompt or does not end with a special token.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlhfjax import json_text, paths
from rlhfjax.data.sandbox import Program, explain
from rlhfjax.data.template_cost import LIMIT, too_much
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

Message = Mapping[str, str]
ROLES = ("user", "assistant", "system")

OURS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# OpenAI's chat markup as in Qwen2 and SmolLM2, without their default system prompts.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Touvron et al. 2023 (Llama 2), appendix A.3.3 and the release's `chat_completion`.
LLAMA2 = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate user/assistant/user/assistant') }}"
    "{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The model card of Llama 3 ("Prompt format").
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BUILT_IN = {"ours": OURS, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3}
# Texts that must be special tokens; as ordinary text, a message could write them.
MARKERS = {
    OURS: ("<|user|>", "<|assistant|>", "<|system|>"),
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

# Valid text has no lone surrogates, so templates and messages cannot contain these marks.
_OPEN, _CLOSE, _RESPONSE = "\ud800", "\ud801", "\ud802"
_FIRST_SPECIAL = 0xD810
_EDGE = "\u2003"  # a blank that trimming removes and that no template writes
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTENT = f"{_EDGE}?{_OPEN}[0-9]+{_CLOSE}{_EDGE}?"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a rendered conversation: template text, a special token, or a message's content."""

    text: str = ""
    token: int | None = None
    message: int | None = None
    """Index of the message whose content stands here."""
    trim: tuple[bool, bool] = (False, False)
    """Whether the content loses blanks on the left, and on the right."""
    learned: bool = False
    """Whether the assistant has to produce it."""

    def fill(self, messages: Sequence[Message]) -> str:
        """Returns the text of this piece."""
        if self.message is None:
            return self.text
        content = messages[self.message]["content"]
        content = content.lstrip() if self.trim[0] else content
        return content.rstrip() if self.trim[1] else content


def read_template(path: Path) -> str:
    """Returns the source in a file, such as chat_template.jinja.

    Raises:
      DataError: there is no such file, or it is not UTF-8 text, or empty.
    """
    content = paths.read(path)
    if other := json_text.other_format(content):
        raise DataError(f"{path}: it is {other}; expected Jinja source in UTF-8")
    try:
        source = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte {error.start}; expected Jinja source"
        ) from None
    if not source.strip():
        raise DataError(f"{path}: it is empty; expected Jinja source")
    return source


class Template:
    """A chat template with a tokenizer.

    Args:
      source: Jinja source. With "" the methods that render raise DataError.
      specials: text of each special token -> id.
      names: variables of the source, such as bos_token and eos_token.
      encode: encode(text, before) returns ids, never of specials. `before` is what stands right
        before the text: "text", "special" or "nothing".
      decode: returns the text of some ids.
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
        context: str = "tokenizer",
    ):
        self.source = source
        self.context = context
        self._specials = dict(specials)
        self._names = dict(names)
        self._decode = decode
        # A conversation that is cut to length is rendered several times.
        self._encode = functools.lru_cache(1024)(encode)
        self._pieces = functools.lru_cache(4096)(self._cut)
        self._jinja = Program(source, context)
        longest_first = sorted(self._specials, key=len, reverse=True)
        parts = [_RESPONSE, _CONTENT, *map(re.escape, longest_first)]
        self._splitter = re.compile(f"({'|'.join(parts)})")

    @functools.cached_property
    def end_id(self) -> int:
        """The special token that ends the assistant's turn."""
        pieces = reversed(self._pieces(("user", "assistant"), False))
        return next(p.token for p in pieces if p.learned and p.token is not None)

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens: text -> id."""
        return self._specials

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """The special tokens that the template writes."""
        return frozenset(self._separators[0])

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
        try:
            return self._jinja.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=cue,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise self._error(explain(error)) from None

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
        return self._tokens(self.validate(messages, cue=cue), messages)

    def validate(
        self, messages: Sequence[Message], *, cue: bool = False
    ) -> tuple[Piece, ...]:
        """Returns the pieces of a conversation. Raises as `render` does, and encodes nothing."""
        for message in messages:
            if message["role"] not in ROLES:
                raise DataError(
                    f"chat: role {message['role']!r} is none of {', '.join(ROLES)}"
                )
        pieces = self._pieces(_roles(messages), cue)
        # Our own template is known to write contents as they are, and is the most used.
        if self.source != OURS:
            filled = "".join([piece.fill(messages) for piece in pieces])
            if filled != self.text(messages, cue=cue):
                raise self._error("it changes a message by more than trimming it")
        return pieces

    def edges(
        self, messages: Sequence[Message], message: int, *, cue: bool = False
    ) -> tuple[int, int]:
        """Returns the number of tokens around one content.

        First the tokens before it, then those between it and the next response.
        """
        pieces = self._pieces(_roles(messages), cue)
        at = next(i for i, piece in enumerate(pieces) if piece.message == message)
        end = at + 1
        while end < len(pieces) and not pieces[end].learned:
            end += 1
        whole, before, between = (
            self._tokens(part, messages)[0]
            for part in (pieces[:end], pieces[:at], pieces[at + 1 : end])
        )
        return common_prefix(whole, before), common_prefix(whole[::-1], between[::-1])

    def messages(self, ids: Iterable[int]) -> list[dict[str, str]]:
        """Returns the turns of rendered ids, with the roles that their markers name.

        Ids without any marker are one user turn. A prompt that ends with the generation prompt ends
        with an empty turn of the assistant.
        """
        codes, speakers = self._separators
        text = ""
        for code, run in itertools.groupby((int(i) for i in ids), key=codes.get):
            tokens = list(run)
            text += code * len(tokens) if code else self._decode(tokens)
        pattern = "|".join(map(re.escape, speakers)) or "(?!)"
        first, *rest = re.split(f"({pattern})", text)
        turns = [{"role": "user", "content": first}] if first.strip() else []
        for separator, content in zip(rest[::2], rest[1::2], strict=True):
            role = speakers[separator]
            if role or not turns:
                turns.append({"role": role or "user", "content": content})
            else:
                turns[-1]["content"] += content
        for turn in turns:
            turn["content"] = _SURROGATE.sub("", turn["content"])
        return turns

    def _cut(self, roles: tuple[str, ...], cue: bool) -> tuple[Piece, ...]:
        """Returns the pieces of a conversation in these roles."""
        pieces: list[Piece] = []
        contents: list[int] = []  # messages in order of appearance
        ends: list[int] = []  # special tokens that end a response
        learned = spoken = False
        for part in filter(None, self._splitter.split(self._marked(roles, cue))):
            if part == _RESPONSE:
                learned, spoken = True, False
            elif part in self._specials:
                token = self._specials[part]
                pieces.append(Piece(part, token, learned=learned))
                if learned and spoken:
                    ends.append(token)
                    learned = False
            elif _OPEN in part:
                contents.append(int(part.strip(_EDGE)[1:-1]))
                trim = (not part.startswith(_EDGE), not part.endswith(_EDGE))
                pieces.append(Piece(message=contents[-1], trim=trim, learned=learned))
                spoken = True
            elif _SURROGATE.search(part):
                raise self._error("it writes a lone surrogate")
            else:
                pieces.append(Piece(part, learned=learned))
        if contents != list(range(len(roles))):
            raise self._error(
                f"it does not write each message of {'/'.join(roles)} once and in order"
            )
        if len(ends) != roles.count("assistant") or len(set(ends)) > 1:
            raise self._error("no one special token ends each turn of the assistant")
        return tuple(pieces)

    def _marked(self, roles: tuple[str, ...], cue: bool) -> str:
        """Returns the rendered placeholders, with a mark where each response starts."""
        for marker in MARKERS.get(self.source, ()):
            if marker not in self._specials:
                raise DataError(
                    f"{self.context}: this chat template needs a token of its own for {marker!r}"
                )
        whole = self._placeholders(roles, cue)
        for i in reversed(range(len(roles))):
            if roles[i] != "assistant":
                continue
            prompt = self._placeholders(roles[:i], True)
            if not whole.startswith(prompt):
                raise self._error(
                    "the assistant's turn does not start where its generation prompt ends"
                )
            whole = prompt + _RESPONSE + whole[len(prompt) :]
        return whole

    def _placeholders(self, roles: tuple[str, ...], cue: bool) -> str:
        messages = [
            {"role": role, "content": f"{_EDGE}{_OPEN}{i}{_CLOSE}{_EDGE}"}
            for i, role in enumerate(roles)
        ]
        return self.text(messages, cue=cue)

    def _tokens(
        self, pieces: Iterable[Piece], messages: Sequence[Message]
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens and the loss mask of some pieces."""
        tokens: list[int] = []
        mask: list[float] = []
        before = "nothing"
        runs = itertools.groupby(pieces, key=lambda piece: (piece.token, piece.learned))
        for (token, learned), run in runs:
            if token is None:
                # Text between two special tokens is encoded as one.
                text = "".join(piece.fill(messages) for piece in run)
                ids = self._encode(text, before)
                before = "text"
            else:
                ids = [token for _ in run]
                before = "special"
            tokens += ids
            mask += [float(learned)] * len(ids)
        return tokens, mask

    @functools.cached_property
    def _separators(self) -> tuple[dict[int, str], dict[str, str | None]]:
        """Returns a character per special token, and the role that speaks after each separator.

        A separator is what the template writes between two contents, with those characters for
        special tokens. The role is None after the end of a turn that nobody follows. Separators are
        ordered longest first.
        """
        speakers: dict[tuple[Piece, ...], str | None] = {}
        before = self._jinja.spent
        for roles, cue in itertools.product(_sequences(3), (True, False)):
            if self._jinja.spent - before > LIMIT:  # renderings just below it add up
                raise self._error(too_much(LIMIT))
            try:
                pieces = self._pieces(roles, cue)
            except DataError:  # not every template takes every sequence
                continue
            separator: tuple[Piece, ...] = ()
            for piece in pieces:
                if piece.message is None:
                    separator += (dataclasses.replace(piece, learned=False),)
                    continue
                speakers[separator] = speakers.get(separator) or roles[piece.message]
                separator = ()
            last = "assistant" if cue else None
            speakers[separator] = speakers.get(separator) or last
        pieces = itertools.chain.from_iterable(speakers)
        used = {piece.token for piece in pieces if piece.token is not None}
        codes = {token: chr(_FIRST_SPECIAL + i) for i, token in enumerate(sorted(used))}
        spelled = {
            _spell(separator, codes): role for separator, role in speakers.items()
        }
        # A response that was cut off has no end: the next turn's opening follows at once.
        ends = [text for text, role in spelled.items() if text and role is None]
        ends.sort(key=len, reverse=True)
        for text, role in list(spelled.items()):
            for end in ends:
                if text.startswith(end):
                    opening = text.removeprefix(end)
                    if opening and opening[0] in codes.values():
                        spelled.setdefault(opening, role)
                    break
        longest_first = sorted(filter(None, spelled), key=len, reverse=True)
        return codes, {text: spelled[text] for text in longest_first}

    def _error(self, why: str) -> DataError:
        return DataError(
            f"{self.context}: the chat template cannot be used: {why}; "
            f"accepted: {', '.join(BUILT_IN)} or Jinja source that writes turns"
        )


def _spell(pieces: Iterable[Piece], codes: Mapping[int, str]) -> str:
    """Returns the text of pieces without contents, with a character for each special token."""
    return "".join(
        piece.text if piece.token is None else codes[piece.token] for piece in pieces
    )


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _sequences(longest: int) -> Iterable[tuple[str, ...]]:
    """Returns all sequences of roles up to a length."""
    return itertools.chain.from_iterable(
        itertools.product(ROLES, repeat=n) for n in range(longest + 1)
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
