"""Token ids to text as they come: whole characters only, and stop strings that span tokens."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that a character may be spread over before it counts as invalid text: UTF-8 has at most 4 bytes.
_MAX_HELD = 4


class Detokenizer(Protocol):
    """Turns token ids into text, one at a time."""

    def add(self, token: int) -> str:
        """The characters that ``token`` completes; may be empty."""

    def finish(self) -> str:
        """What is left over when no token follows."""


def detokenizer(tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> Detokenizer:
    """A detokenizer for the text that follows ``prompt_ids``."""
    from tokenizers.decoders import ByteLevel

    if isinstance(tokenizer.decoder, ByteLevel):
        return _ByteLevelDetokenizer(tokenizer)
    return _PrefixDetokenizer(tokenizer, prompt_ids)


class _ByteLevelDetokenizer:
    """For byte-level BPE: each token is a run of bytes, decoded as UTF-8 across token borders."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, content in added.items() if content.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        content = self._tokenizer.id_to_token(token)
        if content is None or token in self._special:
            return ""
        table = _byte_of_char()
        try:
            raw = bytes(table[char] for char in content)
        except KeyError:  # an added token holds plain text
            raw = content.encode()
        return self._decoder.decode(raw)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class _PrefixDetokenizer:
    """For all other tokenizers: decode a short window with and without the new token, and take the difference."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_MAX_HELD:])
        self._read = len(self._ids)
        self._prefix = 0

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._take(hold=len(self._ids) - self._read < _MAX_HELD)

    def finish(self) -> str:
        return self._take(hold=False)

    def _take(self, hold: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        after = self._tokenizer.decode(self._ids[self._prefix :])
        if len(after) <= len(before) or (hold and after.endswith("\ufffd")):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]


class StopFilter:
    """Passes text on until a stop string appears; holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that may be shown; sets ``stopped`` when a stop string is complete (it is not shown)."""
        if not self._stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
