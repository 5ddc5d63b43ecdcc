"""Tokens as text while they come: bytes of each token, whole characters, and stop strings wherever tokens end.

In: token ids one by one. Out: text that will not change any more. The bytes of half a character wait for the other
half; text that may be the beginning of a stop string waits until it is clear. Refuses to know engines and requests.
"""

from __future__ import annotations

import codecs
import functools
import json
from typing import Any

from tokenizers import Tokenizer

from lorica.core.errors import DataError
from lorica.data.render import Renderer
from lorica.server.tokenizer import FileTokenizer


class Pieces:
    """The bytes that each token of a tokenizer writes.

    Attributes: `opening` is how many blanks the tokenizer puts in front of a text and takes away again.
    Raises DataError for a decoder that writes a token differently for what follows it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
        self._steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        self.opening = sum(map(_opening, self._steps))
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._write(self._tokenizer.id_to_token(token) or "")
        return found

    def spell(self, token: int) -> str:
        """A token as one text: its characters, or `bytes:\\xf0\\x9f` where it writes only a part of one."""
        piece = self[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _write(self, token: str) -> bytes:
        for step in self._steps:
            kind = step["type"]
            if kind == "ByteLevel":
                table = _bytes_of_characters()
                return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
            if kind == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            if kind == "Metaspace":
                token = token.replace(step["replacement"], " ")
            if kind == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()


def _opening(step: dict[str, Any]) -> int:
    """Blanks that a decoder's step takes from the beginning. Raises DataError for a step that is not known here."""
    kind = step["type"]
    if kind == "Metaspace":
        return int(step.get("prepend_scheme", "always") != "never")
    if kind == "Strip" and step["content"] == " " and not step["stop"]:
        return int(step["start"])
    if kind in ("ByteLevel", "ByteFallback", "Fuse") or (kind == "Replace" and "String" in step["pattern"]):
        return 0
    raise DataError(
        f"The server cannot write text with this model's tokenizer: its decoder {kind!r} is not known here."
    )


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level vocabularies write bytes that are no printable Latin-1 character as characters from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Reader:
    """Turns tokens into text. `opens` says that they begin a text, rather than go on with one."""

    def __init__(self, pieces: Pieces, *, opens: bool = False) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._blanks = pieces.opening if opens else 0
        self.length = 0
        """Characters written so far: where the next token begins."""

    def feed(self, token: int) -> str:
        """The characters that a token completes."""
        piece = self._pieces[token]
        while self._blanks and piece.startswith(b" "):
            piece, self._blanks = piece[1:], self._blanks - 1
        if piece:
            self._blanks = 0
        return self._count(self._decoder.decode(piece))

    def finish(self) -> str:
        """What stands for a character that was never completed."""
        return self._count(self._decoder.decode(b"", final=True))

    def _count(self, text: str) -> str:
        self.length += len(text)
        return text


class StopFinder:
    """Cuts text before the first stop string that is completed, however the text is divided.

    Where one character completes several, the longest decides, for it began first.
    """

    def __init__(self, strings: list[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that is now certain to stand before any stop string."""
        if self.found or not text:
            return ""
        if not self._strings:
            return text
        self._held += text
        first = len(self._held) - len(text)
        for end in range(first + 1, len(self._held) + 1):
            for string in self._strings:
                if self._held.endswith(string, 0, end):
                    self.found = True
                    shown, self._held = self._held[: end - len(string)], ""
                    return shown
        cut = len(self._held) - overlap(self._held, self._strings)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, strings: list[str]) -> int:
    """Characters at the end of a text that may be the beginning of one of the strings, or the whole of it."""
    return max((n for s in strings for n in range(1, min(len(s), len(text)) + 1) if text.endswith(s[:n])), default=0)


class Text:
    """All that the server needs to know of a model's text: how prompts become tokens, and tokens text."""

    def __init__(self, directory: str) -> None:
        self.tokenizer = FileTokenizer(directory)
        self.pieces = Pieces(self.tokenizer.fast)
        self.renderer = Renderer(self.tokenizer)

    def read(self, tokens: list[int]) -> tuple[str, list[int]]:
        """A whole text, and where each token begins in it. A token that only opens texts writes nothing."""
        reader = Reader(self.pieces, opens=True)
        said, offsets = [], []
        for index, token in enumerate(tokens):
            offsets.append(reader.length)
            if index or token != self.tokenizer.bos_token_id:
                said.append(reader.feed(token))
        return "".join([*said, reader.finish()]), offsets


@functools.lru_cache(maxsize=16)
def text_of(directory: str) -> Text:
    """The text of the model in a directory, read once. Raises MissingError, FormatError, DataError."""
    return Text(directory)
