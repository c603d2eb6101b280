"""Chat templates: a conversation to the tokens a model is trained to read, with the loss on the assistant's, and back.

A template is Jinja source as Hugging Face's tokenizers carry it; `BUILT_IN` has ours, ChatML, Llama 2 and Llama 3. It
is rendered once for each sequence of roles, with placeholders where the contents go. That cuts it into `Piece`s: the
template's own words, its special tokens, and what was said. The contents are put in afterwards, as ordinary
characters: a message that spells a special token does not get one. A template that does more with a content than trim
it, or whose assistant's turn neither starts after the generation prompt nor ends with a special token, is an error.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlhfjax.data.sandbox import compile_template
from rlhfjax.errors import DataError, first_line

Message = Mapping[str, str]
ROLES = ("user", "assistant", "system")

OURS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (  # OpenAI's chat markup, as Qwen2 and SmolLM2 have it; without a system prompt of its own
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # Touvron et al. 2023 (Llama 2), appendix A.3.3 and the release's `chat_completion`
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # the model card of Llama 3 ("Prompt format")
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BUILT_IN = {"ours": OURS, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3}
MARKERS = {  # what must be tokens of their own, else a message could write them
    OURS: ("<|user|>", "<|assistant|>", "<|system|>"),
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

# Lone surrogates stand in no valid text, so they cannot be mistaken for what a template or a message says.
_OPEN, _CLOSE, _ANSWER, _FIRST_SPECIAL = "\ud800", "\ud801", "\ud802", 0xD810
_EDGE = "\u2003"  # a blank that trimming takes away and that no template writes
_SAID = f"{_EDGE}?{_OPEN}[0-9]+{_CLOSE}{_EDGE}?"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation: the template's text, a special token (id and text), or a message's content."""

    text: str = ""
    token: int | None = None
    said: int | None = None  # index of the message
    trim: tuple[bool, bool] = (
        False,
        False,
    )  # whether its content loses blanks on the left, on the right
    answer: bool = False  # the assistant has to produce it

    def fill(self, messages: Sequence[Message]) -> str:
        """What stands here in the rendered text."""
        if self.said is None:
            return self.text
        content = messages[self.said]["content"]
        content = content.lstrip() if self.trim[0] else content
        return content.rstrip() if self.trim[1] else content


class Template:
    """A chat template bound to a tokenizer.

    Args:
      source: Jinja source; "" for none, which raises as soon as a conversation is to be rendered.
      specials: text of each special token -> id.
      names: what the source may call by name, such as bos_token and eos_token.
      encode: text to ids, never a special's, given what stands right before it: "text", "special" or "nothing".
      decode: ids to text.
      where: the tokenizer's file, for errors.

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
        where: str = "tokenizer",
    ):
        self.source, self.where = source, where
        self._specials, self._names, self._decode = dict(specials), dict(names), decode
        self._encode = functools.lru_cache(1024)(
            encode
        )  # a conversation that is cut is rendered several times
        self._jinja = compile_template(source, where)
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._splitter = re.compile(
            "|".join([f"({_ANSWER}|{_SAID}", *map(re.escape, longest_first)]) + ")"
        )
        self._known: dict[tuple[tuple[str, ...], bool], tuple[Piece, ...]] = {}

    @functools.cached_property
    def end_id(self) -> int:
        """The special token that ends the assistant's turn."""
        return next(
            p.token
            for p in reversed(self.pieces(("user", "assistant")))
            if p.answer and p.token is not None
        )

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """The special tokens that it writes."""
        return frozenset(self._joints[0])

    def text(self, messages: Sequence[Message], *, cue: bool = False) -> str:
        """What the source renders; with `cue` up to the assistant's next word. DataError where it refuses."""
        if not self.source:
            raise DataError(
                f"{self.where}: it has no chat template; accepted: {', '.join(BUILT_IN)} or Jinja source"
            )
        try:
            return self._jinja.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=cue,
                tools=None,
                documents=None,
                **self._names,
            )
        except (
            Exception
        ) as error:  # a template is a program of someone else's and may raise anything
            raise self._error(first_line(error)) from None

    def render(
        self, messages: Sequence[Message], *, cue: bool = False
    ) -> tuple[list[int], list[float]]:
        """Tokens, and the loss mask: 1 on what the assistant has to produce, its end of turn included.

        They are cut where an answer starts, so that a rendered prompt is the beginning of the rendered conversation.

        Raises:
          DataError: an unknown role, or a template that cannot be cut into turns.
        """
        for message in messages:
            if message["role"] not in ROLES:
                raise DataError(
                    f"chat: role {message['role']!r} is none of {', '.join(ROLES)}"
                )
        pieces = self.pieces(tuple(message["role"] for message in messages), cue)
        plain = (
            self.source == OURS
        )  # of which it is known, and which every conversation of our own models goes through
        if not plain and "".join(piece.fill(messages) for piece in pieces) != self.text(
            messages, cue=cue
        ):
            raise self._error("it changes what a message says, more than trimming it")
        return self._tokens(pieces, messages)

    def edges(
        self, messages: Sequence[Message], said: int, *, cue: bool = False
    ) -> tuple[int, int]:
        """How many tokens stand before the content of message `said`, and how many between it and the answer."""
        pieces = self.pieces(tuple(message["role"] for message in messages), cue)
        at = next(i for i, piece in enumerate(pieces) if piece.said == said)
        end = next(
            (i for i, piece in enumerate(pieces) if i > at and piece.answer),
            len(pieces),
        )
        before, between = (
            self._tokens(pieces[:at], messages)[0],
            self._tokens(pieces[at + 1 : end], messages)[0],
        )
        whole = self._tokens(pieces[:end], messages)[0]
        return common_prefix(whole, before), common_prefix(whole[::-1], between[::-1])

    def messages(self, ids: Iterable[int]) -> list[dict[str, str]]:
        """The turns of rendered ids, in the roles that their markers say; ids without any marker are one user turn.

        A prompt that ends where the assistant is to speak ends with an empty turn of its.
        """
        codes, joints = self._joints
        runs = itertools.groupby((int(i) for i in ids), key=codes.get)
        text = "".join(
            code * len(list(run)) if code else self._decode(list(run))
            for code, run in runs
        )
        first, *rest = (
            re.split(f"({'|'.join(map(re.escape, joints))})", text)
            if joints
            else [text]
        )
        turns = [{"role": "user", "content": first}] if first.strip() else []
        for joint, content in zip(rest[::2], rest[1::2], strict=True):
            if joints[joint] or not turns:
                turns.append({"role": joints[joint] or "user", "content": content})
            else:
                turns[-1]["content"] += content
        return [
            turn | {"content": re.sub("[\ud800-\udfff]", "", turn["content"])}
            for turn in turns
        ]

    def pieces(self, roles: tuple[str, ...], cue: bool = False) -> tuple[Piece, ...]:
        """The template for messages in these roles, cut."""
        if (roles, cue) not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[roles, cue] = self._cut(roles, cue)
        return self._known[roles, cue]

    def _cut(self, roles: tuple[str, ...], cue: bool) -> tuple[Piece, ...]:
        whole = self._with_answers_marked(roles, cue)
        pieces: list[Piece] = []
        said, ends = [], []  # messages seen; special tokens that end an answer
        answering = spoken = False
        for part in filter(None, self._splitter.split(whole)):
            if part == _ANSWER:
                answering, spoken = True, False
            elif part in self._specials:
                pieces.append(Piece(part, self._specials[part], answer=answering))
                if answering and spoken:
                    ends.append(self._specials[part])
                    answering = False
            elif _OPEN in part:
                said.append(int(part.strip(_EDGE)[1:-1]))
                trim = (not part.startswith(_EDGE), not part.endswith(_EDGE))
                pieces.append(Piece(said=said[-1], trim=trim, answer=answering))
                spoken = True
            else:
                pieces.append(Piece(part, answer=answering))
        if said != list(range(len(roles))):
            raise self._error(
                f"it does not say each message of {'/'.join(roles)} once and in order"
            )
        if len(ends) != roles.count("assistant") or len(set(ends)) > 1:
            raise self._error("no one special token ends each turn of the assistant")
        return tuple(pieces)

    def _with_answers_marked(self, roles: tuple[str, ...], cue: bool) -> str:
        missing = [
            marker
            for marker in MARKERS.get(self.source, ())
            if marker not in self._specials
        ]
        if missing:
            raise DataError(
                f"{self.where}: this chat template needs a token of its own for {missing[0]!r}"
            )
        whole = self._probe(roles, cue)
        for i in reversed([i for i, role in enumerate(roles) if role == "assistant"]):
            prompt = self._probe(roles[:i], True)
            if not whole.startswith(prompt):
                raise self._error(
                    "the assistant's turn does not start where its generation prompt ends"
                )
            whole = prompt + _ANSWER + whole[len(prompt) :]
        return whole

    def _probe(self, roles: tuple[str, ...], cue: bool) -> str:
        contents = (f"{_EDGE}{_OPEN}{i}{_CLOSE}{_EDGE}" for i in range(len(roles)))
        return self.text(
            [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)],
            cue=cue,
        )

    def _tokens(
        self, pieces: Iterable[Piece], messages: Sequence[Message]
    ) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        mask: list[float] = []
        before = "nothing"
        for (token, answer), group in itertools.groupby(
            pieces, key=lambda piece: (piece.token, piece.answer)
        ):
            run = list(group)  # text between two special tokens is encoded as one
            text = "".join(piece.fill(messages) for piece in run)
            ids = (
                [token] * len(run) if token is not None else self._encode(text, before)
            )
            before = "text" if token is None else "special"
            tokens += ids
            mask += [float(answer)] * len(ids)
        return tokens, mask

    @functools.cached_property
    def _joints(self) -> tuple[dict[int, str], dict[str, str | None]]:
        """A character for each special token that a template writes, and the text between two contents -> who speaks.

        None is the end of a turn with nobody after it.
        """
        speaks: dict[tuple[Piece, ...], str | None] = {}
        for roles, cue in itertools.product(_sequences(3), (True, False)):
            with contextlib.suppress(
                DataError
            ):  # not every template takes every sequence
                joint: tuple[Piece, ...] = ()
                for piece in (
                    dataclasses.replace(p, answer=False)
                    for p in self.pieces(roles, cue)
                ):
                    if piece.said is None:
                        joint += (piece,)
                        continue
                    speaks[joint] = speaks.get(joint) or roles[piece.said]
                    joint = ()
                speaks[joint] = speaks.get(joint) or ("assistant" if cue else None)
        used = sorted(
            {
                piece.token
                for joint in speaks
                for piece in joint
                if piece.token is not None
            }
        )
        codes = {token: chr(_FIRST_SPECIAL + i) for i, token in enumerate(used)}
        spelled = {
            "".join(codes.get(p.token, p.text) for p in joint): role
            for joint, role in speaks.items()
        }
        ends = sorted(
            (text for text, role in spelled.items() if text and role is None),
            key=len,
            reverse=True,
        )
        for text, role in list(
            spelled.items()
        ):  # a turn may open where the one before it was cut off
            opening = next(
                (text[len(end) :] for end in ends if text.startswith(end)), ""
            )
            if opening and opening[0] in codes.values():
                spelled.setdefault(opening, role)
        longest_first = sorted(filter(None, spelled), key=len, reverse=True)
        return codes, {text: spelled[text] for text in longest_first}

    def _error(self, why: str) -> DataError:
        return DataError(
            f"{self.where}: the chat template cannot be used: {why}; accepted: {', '.join(BUILT_IN)} "
            "or Jinja source that writes turns"
        )


def _sequences(longest: int) -> Iterable[tuple[str, ...]]:
    return itertools.chain.from_iterable(
        itertools.product(ROLES, repeat=n) for n in range(longest + 1)
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many ids two sequences begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
