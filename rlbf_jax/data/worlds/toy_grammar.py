"""The toy world's grammar, read backwards: is a text coherent (in the grammar, on one topic) and
useful (two whole sentences on the topic)? And is it torn where something was taken out of it?
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

from rlbf_jax.data.worlds import toy_words
from rlbf_jax.data.worlds.toy_world import TOPICS


@dataclasses.dataclass(frozen=True)
class ParsedSentence:
    """One sentence of a text."""

    text: str
    kind: str
    """`topic`, `aside` (a harmless remark off the topic), `opener`, `refusal`,
    `fragment` (the grammatical beginning of a sentence), `fixed_fragment` (of an opener or refusal)
    or `unknown` (not in the grammar)."""
    topics: frozenset[str]
    """What it is about; none for asides, several or none where a fragment does not tell yet."""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A text under the world's grammar."""

    sentences: tuple[ParsedSentence, ...]
    coherent: bool
    """Not empty, every sentence in the grammar, all but asides on one topic;
    only the last one may be cut off."""
    useful: bool
    """At least two whole sentences on the topic asked about,
    or on any one topic where none was given."""


_SENTENCE = re.compile(r"[^.!?]+[.!?]*|[.!?]+")
_TOKEN = re.compile(r"[^\s,]+|,")
_BLANKLESS = re.compile(r"\S+")
SEAM_WORDS = 2
"""So many words behind a seam must go on as the grammar does. Ours: one would leave a word that the
seam runs through half read, and words further on say more of the model than of the seam."""
_ROLES: dict[str, tuple[str, str]] = {
    w: (role, t.name) for t in TOPICS for role in "NVAPT" for w in t.words(role)
}
_ROLE_WORDS: dict[str, list[tuple[str, str]]] = {
    role: [(word, topic) for word, (r, topic) in _ROLES.items() if r == role] for role in "NVAPT"
}
_REMARKS: tuple[str, ...] = toy_words.ASIDES + toy_words.LOOKALIKES
_FIXED: tuple[str, ...] = toy_words.OPENERS + toy_words.REFUSALS


def _signature(template: str) -> tuple[str, ...]:
    """Roles and fixed words of a template, its capital off. Topic words have one role each:
    this decides membership."""
    tokens = _TOKEN.findall(template[0].lower() + template[1:].removesuffix("."))
    return tuple(t[1:-1] if t[0] == "{" else t for t in tokens)


def _aside_pattern(template: str) -> str:
    """Every filling of an aside as one regular expression."""
    return re.sub(
        r"\{(\w+)\}", lambda m: f"(?:{'|'.join(toy_words.ASIDE_FILLERS[m.group(1)])})", template
    )


def _aside_begins(body: str) -> bool:
    """Whether a filling of an aside begins so; the last word may be cut."""
    *whole, last = body.split(" ")
    for template in _REMARKS:
        slots = [toy_words.ASIDE_FILLERS.get(word[1:-1], (word,)) for word in template.split()]
        if len(whole) < len(slots) and any(word.startswith(last) for word in slots[len(whole)]):
            if all(word in slot for word, slot in zip(whole, slots[: len(whole)], strict=True)):
                return True
    return False


_SIGNATURES = frozenset(_signature(template) for template in toy_words.SENTENCES)
_NEXT: dict[tuple[str, ...], set[str]] = {}
for _whole in _SIGNATURES:
    for _n in range(len(_whole)):
        _NEXT.setdefault(_whole[:_n], set()).add(_whole[_n])

_NOTHING: frozenset[str] = frozenset()
_ASIDES = re.compile("|".join(_aside_pattern(template) for template in _REMARKS))


def _without_bridge(text: str) -> str | None:
    """The sentence without bridge and capital; None if the case of its first letter is wrong."""
    for bridge in toy_words.BRIDGES:
        if text.startswith(bridge + " "):
            rest = text[len(bridge) + 1 :].lstrip()
            return rest if rest[:1].islower() else None
    return text[0].lower() + text[1:] if text[0].isupper() else None


def _read(tokens: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Signature and topic words of tokens."""
    roles = [_ROLES.get(token) for token in tokens]
    signature = tuple(role[0] if role else token for role, token in zip(roles, tokens, strict=True))
    return signature, [token for role, token in zip(roles, tokens, strict=True) if role]


@functools.lru_cache(maxsize=1 << 16)
def _parse_sentence(text: str) -> ParsedSentence:
    unknown = ParsedSentence(text, "unknown", _NOTHING)
    if text in _FIXED:
        return ParsedSentence(text, "opener" if text in toy_words.OPENERS else "refusal", _NOTHING)
    if text[-1] in ".!?":
        body = _without_bridge(text[:-1]) if text[-1] == "." and len(text) > 1 else None
        signature, words = _read(_TOKEN.findall(body or ""))
        topics = frozenset(_ROLES[word][1] for word in words)
        if signature in _SIGNATURES and len(topics) == 1:
            return ParsedSentence(text, "topic", topics)
        return ParsedSentence(text, "aside", _NOTHING) if _ASIDES.fullmatch(body or "") else unknown
    if any(bridge.startswith(text) for bridge in toy_words.BRIDGES):
        return ParsedSentence(text, "fragment", _NOTHING)
    fragment = _parse_fragment(text)
    if fragment is None and any(sentence.startswith(text) for sentence in _FIXED):
        return ParsedSentence(text, "fixed_fragment", _NOTHING)
    return fragment or unknown


def _parse_fragment(text: str) -> ParsedSentence | None:
    """The beginning of a topic sentence, perhaps cut inside its last word; None for other text."""
    body = _without_bridge(text)
    if body and _aside_begins(body):
        return ParsedSentence(text, "fragment", _NOTHING)
    tokens = _TOKEN.findall(body or "")
    if not tokens:
        return None
    signature, words = _read(tokens[:-1])
    topics = frozenset(_ROLES[word][1] for word in words)
    if len(topics) > 1:
        return None
    last, may_end, candidates = tokens[-1], False, set()
    for expected in _NEXT.get(signature, ()):
        if expected not in _ROLE_WORDS:
            may_end |= expected.startswith(last)
            continue
        candidates |= {topic for word, topic in _ROLE_WORDS[expected] if word.startswith(last)}
    if topics:
        found = topics if may_end or topics & candidates else None
    else:
        found = _NOTHING if may_end else frozenset(candidates) or None
    return None if found is None else ParsedSentence(text, "fragment", found)


def parse(text: str, topic: str = "") -> Parsed:
    """Reads a text with the world's grammar. Any string is accepted."""
    pieces = (match.group().strip() for match in _SENTENCE.finditer(text))
    sentences = tuple(_parse_sentence(piece) for piece in pieces if piece)
    counts = Counter(name for s in sentences if s.kind == "topic" for name in s.topics)
    useful = (counts[topic] if topic else max(counts.values(), default=0)) >= 2
    return Parsed(sentences, _coherent(sentences), useful)


def _coherent(sentences: tuple[ParsedSentence, ...]) -> bool:
    start = 0
    for kind in ("opener", "refusal"):
        start += start < len(sentences) and sentences[start].kind == kind
    if len(sentences) == start:
        return start > 0
    common: frozenset[str] | None = None
    for index, sentence in enumerate(sentences[start:], start):
        fragment = sentence.kind == "fragment" or (
            sentence.kind == "fixed_fragment" and index <= min(start, 1)
        )
        if sentence.kind not in ("topic", "aside") and not (
            fragment and index == len(sentences) - 1
        ):
            return False
        if sentence.topics:
            common = sentence.topics if common is None else common & sentence.topics
            if not common:
                return False
    return True


# Seams ------------------------------------------------------------------------------------------


def torn_at(text: str, at: int) -> bool:
    """Whether a text is torn at a seam, a place where something was taken out: whether the grammar
    could not have gone on there as the text does.

    Read is the sentence that the seam stands in or before, up to its `SEAM_WORDS` words behind the
    seam. Torn are: half a word ("the ro|The"), and two halves that make no word; a bridge or
    another beginning of a sentence that the text breaks off after, or that something else than its
    rest follows; an opener as the last of what was kept with nothing behind it, or another opener;
    and words behind the seam that begin no sentence (so also a violation that is said anew).
    Sentences that ended before the seam do not count, nor does what follows later, so a model that
    errs elsewhere tears nothing. Blanks do not count but where words run together.

    Args:
      at: character index in 0..len(text), of the first character behind the seam.

    Raises ValueError for an index outside the text.
    """
    if not 0 <= at <= len(text):
        raise ValueError(f"a seam at {at} of a text of {len(text)} characters")
    kept = ""
    for match in _SENTENCE.finditer(text):
        piece, start = match.group(), match.start()
        if not piece.strip():
            continue
        if match.end() <= at or not text[at : match.end()].strip():
            kept = piece.strip()
            continue
        begun = bool(text[start:at].strip())
        told = _parse_sentence(_beginning(piece, at - start))
        doubled = not begun and kept in toy_words.OPENERS and piece.strip() in toy_words.OPENERS
        return told.kind == "unknown" or doubled
    return bool(kept) and (kept[-1] not in ".!?" or kept in toy_words.OPENERS)


def _beginning(piece: str, at: int) -> str:
    """A sentence up to the words that end behind a seam, the first `SEAM_WORDS` of them, or all
    where it has no more; one blank between words."""
    ends = [word.end() for word in _BLANKLESS.finditer(piece) if word.end() > at]
    return " ".join(piece[: ends[min(SEAM_WORDS, len(ends)) - 1]].split())
