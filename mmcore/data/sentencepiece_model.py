"""Sentencepiece token models: read, trained, or converted from llama2.c's vocabulary files.

Models trained here reproduce any text: no normalization, no space put in front, no whitespace removed, and bytes
for characters outside the vocabulary. BPE, because it trains on 20 MB in about a second where the unigram trainer
takes thirteen (8,192 pieces, 2 cores).
"""

from __future__ import annotations

import functools
import io
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from mmcore.data.tokenizer import CHAT_TOKENS, Tokenizer
from mmcore.data.tokenizer_export import bpe_json, is_plain_bpe
from mmcore.errors import DataError

SPACE = "\u2581"  # sentencepiece writes a space as this character, so the character itself needs care
_CONTROL_NAME = re.compile(r"<\|[^|]*\|>")
_LINE_GROUP = 1000  # characters; merging a whole book in one heap is 2.5 times slower than line by line
_LONGEST_SENTENCE = 4096  # characters
_NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false; what comes last counts
_THREADS = 4  # fixed: the trainer writes the number into the model, and so into its fingerprint


class SentencePieceModel:
    """A sentencepiece model file (see TokenModel)."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, origin: str = "the tokenizer"):
        try:
            if not content:
                raise RuntimeError("an empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            first = self._processor.encode("a", out_type=str)
            self.pieces: list[str] = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError):
            raise DataError(
                f"{origin} is none that can be read: give a sentencepiece model, a Hugging Face tokenizer.json, a "
                f"tiktoken-style file or a llama2.c vocabulary"
            ) from None
        self.file_bytes = content
        processor = self._processor
        self.size = len(self.pieces)
        self.controls = {
            piece: i for i, piece in enumerate(self.pieces)
            if processor.is_control(i) or _CONTROL_NAME.fullmatch(piece)
        }
        self._bytes = {int(piece[3:5], 16): i for i, piece in enumerate(self.pieces) if processor.is_byte(i)}
        self.leading_space = bool(first) and first[0].startswith(SPACE)
        self.space_after_control = self.leading_space
        self._drops_spaces = processor.encode("  a") == processor.encode("a")
        # Where no piece holds a line break, merging never crosses one, and lines can be encoded one by one. The
        # leading space of a later line then stays a piece by itself, which encode drops again.
        self._by_lines = not any("\n" in piece for piece in self.pieces) and SPACE in self.pieces

    def encode(self, text: str) -> list[int]:
        if SPACE in text and not self.leading_space and len(self._bytes) == 256:
            # As a piece it would decode to a space: spell it in bytes instead.
            spelled = [self._bytes[byte] for byte in SPACE.encode()]
            first, *rest = text.split(SPACE)
            ids = self.encode(first)
            for part in rest:
                ids += spelled
                ids += self.encode(part)
            return ids
        if not self._by_lines or len(text) <= _LINE_GROUP:
            return self._processor.encode(text)
        ids = []
        for group in _line_groups(text):
            drop = 1 if ids and self.leading_space else 0
            ids += self._processor.encode(group)[drop:]
        return ids

    def encode_further(self, text: str) -> list[int]:
        # Where spaces in front are dropped, the one that is put there stands for them.
        if not self.leading_space or (self._drops_spaces and text[:1].isspace()):
            return self.encode(text)
        groups = _line_groups(text) if self._by_lines else [text]
        return [i for group in groups for i in self._further.encode(group)]

    @functools.cached_property
    def _further(self) -> sentencepiece.SentencePieceProcessor:
        """The model without a space in front: fields appended to a serialized message are laid over those before."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.file_bytes + _NO_SPACE_IN_FRONT)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def token_bytes(self) -> list[bytes]:
        processor = self._processor
        table = []
        for i, piece in enumerate(self.pieces):
            if processor.is_byte(i):
                table.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_unknown(i):
                table.append(processor.decode([i]).encode())
            elif piece in self.controls:
                table.append(b"")
            else:
                table.append(piece.replace(SPACE, " ").encode())
        return table

    def identity(self) -> bytes:
        return self.file_bytes

    def companion_files(self) -> dict[str, bytes]:
        """tokenizer.json, where it can say the same: for BPE with bytes for unknown characters."""
        if len(self._bytes) < 256 or not is_plain_bpe(self.file_bytes):
            return {}
        processor = self._processor
        ordinary = [
            i for i in range(self.size)
            if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
        ]
        scores = [processor.get_score(i) for i in range(self.size)]
        content = bpe_json(self.pieces, scores, ordinary, self.controls, processor.unk_id(), self.leading_space)
        return {"tokenizer.json": content}


def _line_groups(text: str) -> Iterator[str]:
    """`text` in pieces of about _LINE_GROUP characters, all but the first of which begin with a line break."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _LINE_GROUP)
        end = end if end >= 0 else len(text)
        yield text[start:end]
        start = end


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: str | Path | None = None,
                        seed: int = 0) -> Tokenizer:
    """Train a byte-fallback BPE vocabulary of exactly `vocab_size` pieces on `texts`; save it in `folder`, if given.

    Ids 0, 1, 2 are <unk>, <|begin_of_text|>, <|end_of_text|>; the chat tokens follow, then 256 bytes. The result
    depends on the texts and their order alone; `seed` is there for samplers that other trainers use.
    Raises DataError where the texts are too few for the vocabulary, or the vocabulary too small for the texts, and
    whatever `texts` raises.
    """
    output = io.BytesIO()
    raised: list[BaseException] = []
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, raised), model_writer=output, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9999,
            max_sentence_length=8 * _LONGEST_SENTENCE, num_threads=_THREADS, minloglevel=2,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, bos_piece="<|begin_of_text|>", eos_piece="<|end_of_text|>",
            control_symbols=list(CHAT_TOKENS),
        )
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        raise DataError(_explain(str(error), vocab_size)) from None
    tokenizer = Tokenizer(SentencePieceModel(output.getvalue()), origin=f"the tokenizer {folder or 'trained here'}")
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _sentences(texts: Iterable[str], raised: list[BaseException]) -> Iterator[str]:
    """Lines of at most _LONGEST_SENTENCE characters: pieces never cross a line break. What ends them early goes into
    `raised` too, an exit included: the trainer makes a RuntimeError of it."""
    try:
        for text in texts:
            for line in text.split("\n"):
                for start in range(0, len(line), _LONGEST_SENTENCE):
                    # SPACE in the text would be learned as a space; a NUL ends the trainer's sentence
                    yield line[start:start + _LONGEST_SENTENCE].replace(SPACE, "").replace("\0", "")
    except GeneratorExit:  # the trainer wants no more
        raise
    except BaseException as error:
        raised.append(error)
        raise


def _explain(message: str, vocab_size: int) -> str:
    """The user's sentence for what the trainer complains about."""
    if found := re.search(r"too high .*<= (\d+)", message):
        return (f"the text is too short for a vocabulary of {vocab_size}: give more text or a vocabulary of at most "
                f"{found[1]} (tokenizer.train_vocab_size)")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (f"a vocabulary of {vocab_size} cannot hold the bytes and characters of the text: make "
                f"tokenizer.train_vocab_size at least {int(found[1]) + 1}")
    if "sentences" in message and "empty" in message:
        return "there is no text to train a tokenizer on: check data.sources and data.validation_fraction"
    if "insert_id" in message:
        return (f"a vocabulary of {vocab_size} has no room for 256 bytes and the control tokens: make "
                f"tokenizer.train_vocab_size, or model.vocab_size, at least 300")
    return f"the tokenizer could not be trained: {message}"


# --- llama2.c: uint32 longest piece, then for each id float32 score, int32 length, bytes ---


def _read_llama2c(content: bytes) -> list[tuple[bytes, float]] | None:
    """Pieces and scores, or None where the bytes are no such file to the very end."""
    if len(content) < 12:
        return None
    (longest,) = struct.unpack_from("<I", content)
    if not 0 < longest < 4096:
        return None
    pieces, position = [], 4
    while position < len(content):
        if position + 8 > len(content):
            return None
        score, length = struct.unpack_from("<fi", content, position)
        position += 8
        if not 0 <= length <= longest or position + length > len(content):
            return None
        pieces.append((content[position:position + length], score))
        position += length
    return pieces


def is_llama2c(content: bytes) -> bool:
    """Whether the bytes are a llama2.c vocabulary (`tokenizer.bin`, `tok512.bin`)."""
    pieces = _read_llama2c(content)
    return pieces is not None and len(pieces) > 259 and pieces[3][0] == b"<0x00>"


def from_llama2c(content: bytes, origin: str = "the tokenizer") -> SentencePieceModel:
    """The sentencepiece model behind a llama2.c vocabulary.

    llama2.c merges the pair of highest score again and again, with bytes for unknown characters and a space put in
    front: sentencepiece's BPE, which therefore gives the same ids.
    """
    pieces = _read_llama2c(content)
    if pieces is None:
        raise DataError(f"{origin} is no llama2.c vocabulary")
    rows = []
    for index, (piece, score) in enumerate(pieces):
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{origin} is damaged: its piece {index} is no UTF-8; get it again") from None
        if index < 3:
            rows.append((("<unk>", "<s>", "</s>")[index], 0.0, _UNKNOWN if index == 0 else _CONTROL))
        elif index < 259:
            rows.append((text, score, _BYTE))
        else:
            rows.append((text.replace(" ", SPACE), score, _NORMAL))
    return SentencePieceModel(_model_proto(rows), origin)


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # sentencepiece_model.proto, SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


def _model_proto(rows: list[tuple[str, float, int]]) -> bytes:
    """A serialized ModelProto: pieces (text, score, type), BPE, byte fallback, leading space, no normalization.

    Written by hand because the protobuf library is no dependency of this project.
    """
    def varint(value: int) -> bytes:
        head = bytearray()
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        return bytes([*head, value])

    def number(key: int, value: int) -> bytes:
        return varint(key << 3) + varint(value)

    def block(key: int, value: bytes) -> bytes:
        return varint(key << 3 | 2) + varint(len(value)) + value

    def real(key: int, value: float) -> bytes:
        return varint(key << 3 | 5) + struct.pack("<f", value)

    pieces = b"".join(
        block(1, block(1, piece.encode()) + real(2, score) + number(3, kind)) for piece, score, kind in rows
    )
    trainer = b"".join([number(3, _BPE), number(4, len(rows)), number(35, 1), number(40, 0), number(41, 1),
                        number(42, 2)])
    normalizer = block(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1)
    return pieces + block(2, trainer) + block(3, normalizer)
