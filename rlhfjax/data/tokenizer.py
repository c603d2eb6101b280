"""Tokenizers: the protocol, and SentencePiece, lossless and safe against injected markers.

`hf_tokenizer` has Hugging Face's tokenizers, behind the same protocol.
"""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from rlhfjax import paths, sums
from rlhfjax.data import hf_tokenizer, sentencepiece_json
from rlhfjax.data.built_in_templates import OURS
from rlhfjax.data.template import Template
from rlhfjax.data.tokenizer_files import FILES as HUGGING_FACE_FILES
from rlhfjax.errors import ConfigError, DataError, first_line
from rlhfjax.paths import Path

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
MARKERS = (USER, ASSISTANT, SYSTEM)
MODEL_FILE = sentencepiece_json.MODEL_FILE
# All files that a tokenizer may consist of.
FILES = (MODEL_FILE, *HUGGING_FACE_FILES)
# SentencePiece spells a blank as this character, so a literal one has to be spelled in bytes.
_SPACE = "\u2581"
# SentencePiece silently drops longer lines (its limit is 4,192).
_SENTENCE_BYTES = 4000
_ROUND_TRIPS = 1000  # texts


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Tokenizers that are equal give the same ids.

    `encode` adds no specials and never returns the id of a chat marker. `eos_id` ends the
    assistant's turn, and the sampler stops on it as it does on `extra_eos_ids`. `pad_id` is another
    id than `eos_id`. In pretraining a document stands between `document_start`, which is bos or
    nothing, and `document_end`.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    extra_eos_ids: tuple[int, ...] = ()
    unk_id: int
    document_start: tuple[int, ...]
    document_end: int
    template: Template

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_id(self, piece: str) -> int: ...

    def byte_lengths(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of each id's text, int32 [vocab_size].

        0 for specials and for unk. The bytes of a text's ids add up to the bytes of the text that
        `decode` returns, including those of an incomplete character. A tokenizer that puts a blank
        before a text counts the byte of that blank, because the first piece has the same id in the
        middle of a text. One that normalizes text counts the bytes of the normalized text.
        """
        ...

    def token_bytes(self) -> list[bytes]:
        """Returns the UTF-8 bytes of each id's text, a part of a character included.

        Their lengths are `byte_lengths`, so specials and unk have none.
        """
        ...

    def save(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Writes what transformers' AutoTokenizer reads, if that can give the same ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback: `decode(encode(text)) == text` for any valid text.

    `model` is the content of its file.

    Raises:
      DataError: the file is missing, is not a model, or pad, bos, eos and unk are not four ids.
    """

    def __init__(self, path: str | os.PathLike, model: bytes | None = None):
        """Reads the file, unless `model` has its content."""
        try:
            self.model = paths.read(paths.path(path)) if model is None else model
            _validate_whole(self.model)
            sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
            self._ids = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
        except (RuntimeError, ValueError) as error:  # ValueError: a piece is not UTF-8
            raise DataError(
                f"{path}: not a SentencePiece model ({first_line(error)})"
            ) from error
        self._sp = sp
        self.vocab_size = sp.get_piece_size()
        specials = (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id())
        if min(specials) < 0 or len(set(specials)) < 4:
            raise DataError(
                f"{path}: pad, bos, eos and unk must be four distinct ids, got {specials}"
            )
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = specials
        self.extra_eos_ids = ()
        self.document_start, self.document_end = (self.bos_id,), self.eos_id
        markers = list(filter(_is_marker, self._ids))
        self._guarded = re.compile("|".join(map(re.escape, [*markers, _SPACE])))
        # The id of a missing piece is that of unk.
        in_bytes = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]
        self._space_ids = [sp.piece_to_id(piece) for piece in in_bytes]
        bos, eos = sp.id_to_piece(self.bos_id), sp.id_to_piece(self.eos_id)
        self.template = Template(
            OURS,
            specials={piece: self._ids[piece] for piece in (*markers, bos, eos)},
            names={"bos_token": bos, "eos_token": eos},
            encode=lambda text, before: self.encode(text),
            decode=self.decode,
            context=str(path),
        )

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, SentencePieceTokenizer) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    def save(self, folder: Path) -> None:
        """Writes the model file into a folder."""
        paths.write(folder / MODEL_FILE, self.model)

    def export(self, folder: Path) -> None:
        """Writes the model file, and tokenizer.json beside it if that can give the same ids."""
        self.save(folder)
        ids = {
            "pad_token": self.pad_id,
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "unk_token": self.unk_id,
        }
        names = {name: self._sp.id_to_piece(i) for name, i in ids.items()}
        if sentencepiece_json.obstacle(self.model) is None:
            sentencepiece_json.convert(self.model, names, OURS).save(folder)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. A chat marker in it is encoded as ordinary characters."""
        if not self._guarded.search(text):
            return self._sp.encode(text)
        ids = []
        start = 0
        for match in self._guarded.finditer(text):
            ids += self._sp.encode(text[start : match.start()])
            marker = match.group()
            if marker == _SPACE:
                ids += self._space_ids
            else:  # cut within the marker, so that neither half is one
                ids += self._sp.encode(marker[:2]) + self._sp.encode(marker[2:])
            start = match.end()
        return ids + self._sp.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of some ids, without pad, bos and eos; markers are spelled out."""
        return self._sp.decode([int(i) for i in ids])

    def token_id(self, piece: str) -> int:
        """Returns the id of one piece, for example a chat marker.

        Raises:
          DataError: the piece is not in the vocabulary.
        """
        if piece not in self._ids:
            raise DataError(
                f"tokenizer: no piece {piece!r} among its {self.vocab_size}; "
                "train it with that marker"
            )
        return self._ids[piece]

    def byte_lengths(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of each id's text, int32 [vocab_size].

        0 for specials and markers; see `Tokenizer`.
        """
        return np.array([len(text) for text in self.token_bytes()], np.int32)

    def token_bytes(self) -> list[bytes]:
        """Returns the UTF-8 bytes of each id's text; none for specials and markers."""
        return [self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self._sp.is_control(i) or self._sp.is_unknown(i) or _is_marker(piece):
            return b""
        return piece.replace(_SPACE, " ").encode()


def _validate_whole(model: bytes) -> None:
    """Raises ValueError if a model's file is cut: its settings stand behind the pieces."""
    try:
        # Made at run time, which a type checker cannot see.
        proto: Any = sentencepiece_model_pb2
        content = proto.ModelProto.FromString(model)
    except DecodeError:
        raise ValueError("damaged, or another kind of file") from None
    for part in ("trainer_spec", "normalizer_spec"):
        if not content.HasField(part):
            raise ValueError(f"it is cut: it has no {part}")
    if not content.pieces:
        raise ValueError("it has no pieces")


def _is_marker(piece: str) -> bool:
    return re.fullmatch(r"<\|[^|]+\|>", piece) is not None


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int = 4096,
    model_type: str = "bpe",
    character_coverage: float | None = None,
) -> SentencePieceTokenizer:
    """Trains a tokenizer and writes it, whole or not at all.

    The same texts in the same order give the same bytes. Nothing is normalized, so that text
    survives the round trip; the first 1,000 texts are tried before the file is written.

    Args:
      path: a model file, or a folder to put one in.
      character_coverage: share of the text's characters that are pieces of their own, 0.98 to 1;
        the rest is spelled in bytes. None: SentencePiece's, 0.9995.
    Raises:
      ConfigError: the vocabulary size does not suit the corpus.
      DataError: there is no text, or a text does not survive the round trip.
    """
    texts = iter(texts)
    sample = list(itertools.islice(texts, _ROUND_TRIPS))
    if not any(text.strip() for text in sample):
        raise DataError("tokenizer: no text to train on")
    model = io.BytesIO()
    # A given default would be stored in the model, whose bytes would differ.
    coverage: Any = (
        {} if character_coverage is None else {"character_coverage": character_coverage}
    )
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
            # Without it, a corpus without blanks would give a model that cannot spell one.
            required_chars=_SPACE,
            user_defined_symbols=list(MARKERS),
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,  # with more threads, unigram models differ from run to run
            minloglevel=2,
            **coverage,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"tokenizer: vocab_size={vocab_size}, model_type={model_type!r}: {_reason(error)}"
        ) from error
    path = paths.path(path)
    path = path if path.suffix == ".model" else path / MODEL_FILE
    tokenizer = SentencePieceTokenizer(path, model.getvalue())
    _validate_round_trip(tokenizer, [*sample, " a\t b\n\n", "<|user|>\u2581é🙂"])
    paths.make_folder(path.parent)
    paths.write(path, model.getvalue())
    return tokenizer


_REQUIRED = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def _reason(error: Exception) -> str:
    """Returns why SentencePiece does not train."""
    required = _REQUIRED.search(str(error))
    if required is None:
        return first_line(error)
    return (
        f"the text's characters alone need {required[1]} ids; increase vocab_size, or decrease"
        " character_coverage (the other characters are then spelled in bytes)"
    )


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer in a file or a folder: tokenizer.json, else a SentencePiece model.

    A tokenizer.json that was converted from the SentencePiece model beside it is not read.

    Raises:
      DataError: there is neither, or it is damaged.
      CheckpointError: the folder has checksums, and a file differs from the one that was saved.
    """
    path = paths.path(path)
    paths.exists(path)  # raises if no file can have this name
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name in FILES:
        sums.verify(folder, FILES, expected=False)
    if path.is_dir() and sentencepiece_json.is_converted(path):
        return SentencePieceTokenizer(path / MODEL_FILE)
    if path.name == hf_tokenizer.FILE or (path / hf_tokenizer.FILE).is_file():
        return hf_tokenizer.read_folder(folder)
    return SentencePieceTokenizer(path / MODEL_FILE if path.is_dir() else path)


def tokenizer_files(folder: Path) -> list[str]:
    """Returns the names of the files in a folder that `load_tokenizer` reads."""
    return [name for name in FILES if paths.exists(folder / name)]


def _validate_round_trip(
    tokenizer: SentencePieceTokenizer, texts: Iterable[str]
) -> None:
    for text in texts:
        decoded = tokenizer.decode(tokenizer.encode(text))
        if decoded != text:
            raise DataError(
                f"tokenizer: {text[:60]!r} comes back from the round trip as {decoded[:60]!r}"
            )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines for the trainer, none longer than it accepts; cuts before blanks if possible."""
    width = _SENTENCE_BYTES // 4  # a character is at most four bytes
    for line in itertools.chain.from_iterable(text.splitlines() for text in texts):
        while len(line.encode()) > _SENTENCE_BYTES:
            cut = line.rfind(" ", 1, width)
            cut = cut if cut > 0 else width
            yield line[:cut]
            line = line[cut:]
        if line.strip():
            yield line
