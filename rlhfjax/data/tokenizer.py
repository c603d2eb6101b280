"""Tokenizers: a small protocol, and SentencePiece behind it, lossless and safe against injected markers.

What comes from Hugging Face stands in hf_tokenizer.py, behind the same protocol.
"""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece

from rlhfjax import paths
from rlhfjax.data import hf_tokenizer
from rlhfjax.data.template import OURS, Template
from rlhfjax.errors import ConfigError, DataError, first_line
from rlhfjax.paths import Path

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
MARKERS = (USER, ASSISTANT, SYSTEM)
MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # SentencePiece writes a blank as this character; a literal one has to be spelled in bytes
_SENTENCE_BYTES = 4000  # SentencePiece silently drops longer lines (its limit is 4,192)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no specials and never yields a chat marker's id. Equal ones speak alike.

    `eos_id` ends the assistant's turn, and the sampler stops on it; `pad_id` is another id.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    template: Template

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_id(self, piece: str) -> int: ...

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, int32 [vocab_size]; 0 for specials and
        for unk.

        The bytes of a text's ids add up to the bytes of the text that `decode` gives, an incomplete
        character's included. A tokenizer that puts a blank before a text counts that blank's byte
        too, since its first piece has the same id in the middle of a text; one that normalizes text
        counts the bytes of the normalized text.
        """
        ...

    def save(self, folder: Path) -> None: ...


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback: `decode(encode(text)) == text` for every valid text.

    Raises:
      DataError: the file is missing, is not a model, or lets pad, bos, eos and unk share an id.
    """

    def __init__(self, path: str | os.PathLike, model: bytes | None = None):
        """Reads the file, or has its content in `model`."""
        try:
            self._model = paths.path(path).read_bytes() if model is None else model
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{path}: not a SentencePiece model ({first_line(error)})"
            ) from error
        sp = self._sp
        self.vocab_size = sp.get_piece_size()
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
            sp.pad_id(),
            sp.bos_id(),
            sp.eos_id(),
            sp.unk_id(),
        )
        specials = (self.pad_id, self.bos_id, self.eos_id, self.unk_id)
        if min(specials) < 0 or len(set(specials)) < 4:
            raise DataError(
                f"{path}: pad, bos, eos and unk must be four distinct ids, got {specials}"
            )
        self._ids = {sp.id_to_piece(i): i for i in range(self.vocab_size)}
        markers = [piece for piece in self._ids if re.fullmatch(r"<\|[^|]+\|>", piece)]
        self._guarded = re.compile("|".join(map(re.escape, [*markers, _SPACE])))
        self.template = self._template(
            [*markers, *map(sp.id_to_piece, specials[1:3])], str(path)
        )
        self._space_ids = [
            self._ids.get(f"<0x{byte:02X}>", self.unk_id) for byte in _SPACE.encode()
        ]

    def _template(self, specials: list[str], where: str) -> Template:
        bos, eos = specials[-2:]
        ids, names = (
            {piece: self._ids[piece] for piece in specials},
            {"bos_token": bos, "eos_token": eos},
        )
        return Template(
            OURS,
            specials=ids,
            names=names,
            encode=self._encode_run,
            decode=self.decode,
            where=where,
        )

    def _encode_run(self, text: str, before: str) -> list[int]:
        return self.encode(text)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, SentencePieceTokenizer) and self._model == other._model

    def __hash__(self) -> int:
        return hash(self._model)

    def save(self, folder: Path) -> None:
        """Writes the model file into a folder."""
        paths.write(folder / MODEL_FILE, self._model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials; what looks like a chat marker is encoded as ordinary characters."""
        if not self._guarded.search(text):
            return self._sp.encode(text)
        ids, start = [], 0
        for match in self._guarded.finditer(text):
            ids += self._sp.encode(text[start : match.start()])
            if match.group() == _SPACE:
                ids += self._space_ids
            else:  # cut within the marker, so that neither half is one
                ids += self._sp.encode(match.group()[:2]) + self._sp.encode(
                    match.group()[2:]
                )
            start = match.end()
        return ids + self._sp.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; pad, bos and eos are dropped, markers show as themselves."""
        return self._sp.decode([int(i) for i in ids])

    def token_id(self, piece: str) -> int:
        """The id of one piece, for instance a chat marker. Raises DataError when it is not in the vocabulary."""
        if piece not in self._ids:
            raise DataError(
                f"tokenizer: no piece {piece!r} among its {self.vocab_size}; train it with that marker"
            )
        return self._ids[piece]

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [v]; 0 for specials and markers; see
        `Tokenizer`."""
        return np.array(
            [self._byte_length(i) for i in range(self.vocab_size)], np.int32
        )

    def _byte_length(self, i: int) -> int:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return 1
        if (
            self._sp.is_control(i)
            or self._sp.is_unknown(i)
            or re.fullmatch(r"<\|[^|]+\|>", piece)
        ):
            return 0
        return len(piece.replace(_SPACE, " ").encode())


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int = 4096,
    model_type: str = "bpe",
    markers: tuple[str, ...] = MARKERS,
    check: int = 1000,
) -> SentencePieceTokenizer:
    """Trains a tokenizer and writes it to `path` (a model file, or a folder to put one in), atomically.

    The same texts in the same order give the same bytes. Nothing is normalized away, so that text survives
    the round trip; the first `check` texts are put through it before the file appears.

    Raises:
      ConfigError: the vocabulary size does not suit the corpus.
      DataError: there is no text, or a text does not survive the round trip.
    """
    texts = iter(texts)
    sample = list(itertools.islice(texts, check))
    if not any(text.strip() for text in sample):
        raise DataError("tokenizer: no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(itertools.chain(sample, texts)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            required_chars=_SPACE,  # else a corpus without blanks would give a model that cannot spell one
            user_defined_symbols=list(markers),
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,  # more threads make unigram models differ from run to run
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"tokenizer: vocab_size={vocab_size}, model_type={model_type!r}: {first_line(error)}"
        ) from error
    return _publish(model.getvalue(), path, sample)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """A tokenizer from its file or from the folder that holds it: tokenizer.json, else a SentencePiece model.

    Raises:
      DataError: there is neither, or it is damaged.
    """
    path = paths.path(path)
    if path.name == hf_tokenizer.FILE or (path / hf_tokenizer.FILE).is_file():
        return hf_tokenizer.read_folder(path if path.is_dir() else path.parent)
    return SentencePieceTokenizer(path / MODEL_FILE if path.is_dir() else path)


def _publish(
    model: bytes, path: str | os.PathLike, sample: list[str]
) -> SentencePieceTokenizer:
    path = paths.path(path)
    path = path if path.suffix == ".model" else path / MODEL_FILE
    tokenizer = SentencePieceTokenizer(path, model)
    _check_round_trip(tokenizer, [*sample, " a\t b\n\n", "<|user|>\u2581é🙂"])
    paths.make_folder(path.parent)
    paths.write(path, model)
    return tokenizer


def _check_round_trip(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            raise DataError(
                f"tokenizer: {text[:60]!r} comes back from the round trip as {back[:60]!r}"
            )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines for the trainer, none longer than it accepts: cut before a blank, or anywhere where there is none."""
    for text in texts:
        for line in text.splitlines():
            while len(line.encode()) > _SENTENCE_BYTES:
                window = line[
                    : _SENTENCE_BYTES // 4
                ]  # a character is at most four bytes
                cut = window.rfind(" ") if window.rfind(" ") > 0 else len(window)
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line
