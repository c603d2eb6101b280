"""Our SentencePiece model as a tokenizer.json that gives the same ids.

SentencePiece                            tokenizer.json
--------------------------------------   --------------------------------------------------------
merges the pair whose piece has the      ranks of pairs, in the order of the scores of the pieces
best score, the leftmost first           that they are merged to
spells a blank as U+2581                 has blanks in its pieces; U+2581 in a text is spelled in
                                         bytes, as our `encode` does
spells other characters in bytes         byte_fallback
bos before a document                    a post-processor, which `add_special_tokens=False` omits

Ids differ only for a text that contains a special token, such as `</s>` or `<|user|>`. We encode it
as ordinary characters, and transformers as that token.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, processors

from rlhfjax.data.built_in_templates import MARKERS, OURS
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer_files import CONFIG_FILE, FILE, read_config
from rlhfjax.paths import Path

MODEL_FILE = "tokenizer.model"
# Our key in tokenizer_config.json: the file that tokenizer.json was converted from.
CONVERTED_FROM = "rlhfjax_converted_from"
_SPACE = "\u2581"  # how SentencePiece spells a blank
BYTE = "<0x{:02X}>"  # how it spells a byte
_BPE = 2  # of TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = (_UNKNOWN, _CONTROL, _USER_DEFINED)


def obstacle(model: bytes) -> str | None:
    """Returns why no tokenizer.json gives the ids of a SentencePiece model; None if one does.

    Models of `train_sentencepiece` are converted if they are BPE.
    """
    content = parsed(model)
    normalizer, trainer = content.normalizer_spec, content.trainer_spec
    if trainer.model_type != _BPE:
        return "it is not BPE"
    if (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        return "it changes text before it is cut into pieces"
    kinds = {piece.type for piece in content.pieces}
    if _BYTE not in kinds or _UNUSED in kinds:
        return "it has no pieces for bytes, or pieces that are not used"
    texts = {piece.piece for piece in content.pieces if piece.type in _SPECIAL}
    if not texts.issuperset(MARKERS[OURS]):
        return "it has no chat markers"
    scores = [piece.score for piece in content.pieces if piece.type == _NORMAL]
    if len(set(scores)) < len(scores):
        return "two of its pieces have the same score"
    return None


def convert(
    model: bytes, names: Mapping[str, str], template: str
) -> HuggingFaceTokenizer:
    """Returns a tokenizer of Hugging Face's library with the ids of a SentencePiece model.

    Args:
      model: content of a tokenizer.model without `obstacle`.
      names: text of bos_token, eos_token, pad_token and unk_token.
      template: source of the chat template.
    """
    pieces = parsed(model).pieces
    ids = {_spelled(piece.piece): i for i, piece in enumerate(pieces)}
    scores = {
        _spelled(piece.piece): piece.score for piece in pieces if piece.type == _NORMAL
    }
    bpe = models.BPE(
        vocab=ids,
        merges=list(merges(scores)),
        byte_fallback=True,
        unk_token=names["unk_token"],
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    specials = [piece.piece for piece in pieces if piece.type in _SPECIAL]
    backend.add_special_tokens(specials)
    bos = names["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, ids[bos])],
    )
    config = {**names, "chat_template": template, CONVERTED_FROM: MODEL_FILE}
    return HuggingFaceTokenizer(backend, config)


def is_converted(folder: Path) -> bool:
    """Returns whether a folder's tokenizer.json means the SentencePiece model beside it."""
    for name in (MODEL_FILE, FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            return False
    config = read_config(folder)
    is_ours = config.get("chat_template") == OURS
    return is_ours and config.get(CONVERTED_FROM) == MODEL_FILE


def parsed(model: bytes) -> Any:
    """Returns the content of a SentencePiece model."""
    proto: Any = sentencepiece_model_pb2  # made at run time: no type checker can see it
    return proto.ModelProto.FromString(model)


def _spelled(piece: str) -> str:
    return piece.replace(_SPACE, " ")


def merges(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of pieces that are merged, those of the best score first.

    Args:
      scores: scores of the pieces that pairs may be merged to.
    """
    for text in sorted(scores, key=scores.__getitem__, reverse=True):
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in scores and right in scores:
                yield left, right
