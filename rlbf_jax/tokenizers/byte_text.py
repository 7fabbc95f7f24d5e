"""From the bytes of ids to text: which characters an id covers, and text that appears id by id."""

from __future__ import annotations

import bisect
import codecs
from collections.abc import Sequence

from rlbf_jax.directives import Controls
from rlbf_jax.tokenizers.protocol import Tokenizer


def offsets(parts: Sequence[bytes]) -> list[tuple[int, int]]:
    """Character span of each part in the text of all;
    a part inside a multi-byte character covers it whole.

    The text is `b"".join(parts).decode(errors="replace")`. An empty part has an empty span.
    """
    starts = _character_starts(b"".join(parts))
    spans, position = [], 0
    for part in parts:
        # The character that holds byte p is the last one to start at or before p.
        begin = bisect.bisect_right(starts, position) - 1
        if part:
            spans.append((begin, bisect.bisect_right(starts, position + len(part) - 1)))
        else:
            spans.append((begin, begin))
        position += len(part)
    return spans


class BytePieces:
    """What a tokenizer gets from knowing the bytes of each id; it adds `vocab_size`,
    `name` and the way in."""

    _bytes: list[bytes]
    _controls: Controls

    @property
    def vocab_size(self) -> int:
        """Ids in all, control ids included."""
        raise NotImplementedError

    def name(self, token: int) -> str:
        """How an id is shown."""
        raise NotImplementedError

    @property
    def controls(self) -> Controls:
        """Where control ids stand."""
        return self._controls

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join([self.piece_bytes(i) for i in ids]).decode("utf-8", errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        return self._bytes[self._checked(token)]

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character spans; an id inside a multi-byte character covers it whole,
        a vanished id has an empty span."""
        return offsets([self.piece_bytes(i) for i in ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.name(i) for i in ids]

    def _checked(self, token: int) -> int:
        token = int(token)
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is outside this tokenizer's 0..{self.vocab_size - 1}")
        return token


class StreamDecoder:
    """The text of a response while its ids arrive, one by one.

    No code point is ever split: what may still become a character waits for its last byte.
    For any ids, `"".join(push(i) for i in ids) + flush() == tokenizer.decode(ids)`.
    When a directive retracts, `rewind` tells how much of the text to take back;
    push the ids that a reader may see, not the directives.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[tuple[tuple[bytes, int], int]] = []
        self._shown = 0
        self._flushed = False

    def push(self, token: int) -> str:
        """Characters that this id completes, often none. Raises ValueError after `flush`."""
        if self._flushed:
            raise ValueError(
                "this stream was flushed; make a new StreamDecoder for the next response"
            )
        self._before.append((self._decoder.getstate(), self._shown))
        text = self._decoder.decode(self._tokenizer.piece_bytes(token))
        self._shown += len(text)
        return text

    def rewind(self, count: int) -> int:
        """Forgets the last `count` ids (all, if there are fewer);
        returns how many shown characters to delete.

        The text that is left is always a beginning of the text that was shown, so deleting is
        enough. Raises ValueError after `flush` and for a negative count.
        """
        if self._flushed or count < 0:
            raise ValueError(
                "a flushed stream cannot be rewound"
                if self._flushed
                else f"count is {count}, below 0"
            )
        if not count or not self._before:
            return 0
        keep = max(0, len(self._before) - count)
        state, shown = self._before[keep]
        del self._before[keep:]
        self._decoder.setstate(state)
        gone, self._shown = self._shown - shown, shown
        return gone

    def flush(self) -> str:
        """Ends the stream: U+FFFD for a character that never became whole, otherwise nothing."""
        self._flushed = True
        return self._decoder.decode(b"", final=True)


def _character_starts(data: bytes) -> list[int]:
    """Byte at which each character of `data.decode(errors="replace")` starts, then len(data)."""
    starts: list[int] = []
    position = 0
    while position < len(data):
        try:
            data[position:].decode("utf-8")
            valid, broken = len(data), len(data)
        except UnicodeDecodeError as error:
            valid, broken = position + error.start, position + error.end
        starts += [i for i in range(position, valid) if data[i] & 0xC0 != 0x80]
        if valid < broken:
            starts.append(valid)
        position = broken
    return [*starts, len(data)]
