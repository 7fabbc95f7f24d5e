"""The tokenizer of a published checkpoint, with control tokens, behind our protocol.

Which ids no text can make (*guarded*): special tokens, tokens with a role (beginning, end,
padding), ends of sequence of generation_config.json, spare tokens, anything spelled `<|...|>`,
every added token that the chat template writes (`<think>`, `<tool_call>`), and the control ids.
Other added tokens are ordinary vocabulary (Gemma's runs of newlines and HTML tags) and are found in
any text, as the family has it.

`encode` gives a continuation: nothing is put before it, so pieces of a text concatenate.
`decode` gives back the family's normalization of a text (`normalize`):
Qwen's NFC, SentencePiece's reading of U+2581 as a space.
"""

from __future__ import annotations

import datetime
import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from rlbf_jax.errors import InputError
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import byte_text, folder
from rlbf_jax.tokenizers import files as _files
from rlbf_jax.tokenizers import listed as _listed
from rlbf_jax.tokenizers.added import AddedToken, Matcher
from rlbf_jax.tokenizers.chat import ChatTemplate
from rlbf_jax.tokenizers.controls import RESERVED
from rlbf_jax.tokenizers.huggingface import HuggingFaceVocabulary, opening
from rlbf_jax.tokenizers.protocol import check_text
from rlbf_jax.tokenizers.published_sentencepiece import PublishedSentencePiece

_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)
_PROBE = "Hello there"


class FamilyTokenizer(byte_text.BytePieces):
    """A published tokenizer (files as `folder.with_controls` or `save` made them)."""

    def __init__(self, files: _files.Files):
        self._files = files
        self._meta = folder.meta(files)
        source, roles, tokens = (
            _files.template(files, self._meta.template),
            _listed.roles(files),
            _listed.listed(files),
        )
        self._added = {token.id: token for token in tokens}
        by_text = {token.content: token.id for token in tokens}
        self._bos, self._eos, self._pad = (
            by_text.get(roles.get(role, "")) for role in _listed.ROLES[:3]
        )
        unknown = [text for text in _listed.special_texts(files) if text not in by_text]
        if spelled := sorted(text for text in unknown if source is not None and text in source):
            raise InputError(
                f"{files.where}: the chat template writes {spelled[0]!a}, which the settings call "
                "special and no file gives an id; copy the files of one checkpoint"
            )
        placed = self._meta.controls(())
        self._control_names = placed.names()
        special = {t.id for t in tokens if t.special or RESERVED.fullmatch(t.content)}
        special |= set(placed.ids) | set(self._meta.stop_ids)
        self._guarded = frozenset(
            special | {t.id for t in tokens if _MARKER.fullmatch(t.content) or _written(t, source)}
        )
        self._vocabulary = self._read_vocabulary()
        listed = (
            tokens
            if _files.JSON_FILE in files.content
            # SentencePiece finds the ordinary ones that are among its pieces by itself.
            else [t for t in tokens if t.id in self._guarded or t.id not in self._vocabulary.pieces]
        )
        self._matcher = Matcher(listed, self._guarded)
        self.template = None
        if source is not None:
            date = datetime.date.fromisoformat(self._meta.date)
            self.template = ChatTemplate(source, roles, date, f"{files.where}: chat template")
        self._opening = self._find_opening(by_text.get(roles.get("bos_token", "")))
        self._eos_ids = self._find_eos_ids()
        self._hidden = frozenset(special | set(self._eos_ids))
        self._bytes = [self._find_bytes(i) for i in range(self.vocab_size)]
        self._blank = {
            i
            for i in range(self.vocab_size)
            if i not in self._vocabulary.pieces and i not in self._added
        }
        self._controls = self._meta.controls(self._never())

    def __repr__(self) -> str:
        return (
            f"FamilyTokenizer({self._files.where}, {self.vocab_size} ids, digest "
            f"{self.digest()[:12]})"
        )

    @property
    def bos_id(self) -> int:
        """The beginning of sequence; `eos_id` in families without one (Qwen)."""
        return self.eos_id if self._bos is None else self._bos

    @property
    def pad_id(self) -> int:
        """The padding token; `eos_id` in families without one."""
        return self.eos_id if self._pad is None else self._pad

    @property
    def eos_id(self) -> int:
        return self._eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def vocab_size(self) -> int:
        return self._meta.vocab_size

    @property
    def published_bos_id(self) -> int | None:
        """The beginning of sequence; None in families without one."""
        return self._bos

    @property
    def published_pad_id(self) -> int | None:
        """The padding token; None in families without one."""
        return self._pad

    @property
    def guarded_ids(self) -> frozenset[int]:
        """Ids that no untrusted text makes."""
        return self._guarded

    @property
    def new_ids(self) -> range:
        """Control ids; their embedding rows are new (`controls.new_rows`)
        even where the checkpoint has rows."""
        return self._controls.ids

    @property
    def untrained_ids(self) -> frozenset[int]:
        """Rows of the embedding that the checkpoint never used:
        spare tokens, rows without a token, control ids."""
        spare = {t.id for t in self._added.values() if RESERVED.fullmatch(t.content)}
        return frozenset(spare | self._blank | set(self._controls.ids))

    @property
    def files(self) -> Mapping[str, bytes]:
        """What `save` writes, by name."""
        return self._files.content

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text, none of them guarded. Raises InputError for lone surrogates."""
        check_text(text)
        return list(self._ids(text, None))

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation by the checkpoint's chat template; what messages say is untrusted.

        For messages that spell no guarded token these are the ids that `transformers` gives.
        Raises InputError without a template, or where it refuses the messages
        or cannot be kept apart from them.
        """
        if self.template is None:
            raise InputError(
                f"{self._files.where}: no chat template; use encode_prompt, or add "
                f"{_files.TEMPLATE_FILE}"
            )
        for message in messages:
            check_text("".join(map(str, message.values())))
        text, trusted = self.template.render(messages, add_generation_prompt, self._spells_guarded)
        return list(self._ids(text, trusted, self._vocabulary.parts.prefix))

    @property
    def opening(self) -> tuple[int, ...]:
        """What the family puts before a text that no chat template puts into a turn."""
        return tuple(self._opening)

    def encode_prompt(self, text: str) -> list[int]:
        """A user's turn and the opening of the model's;
        without a template the family's opening, then the text."""
        if self.template is not None:
            return self.encode_chat([{"role": "user", "content": text}])
        return [*self._opening, *self.encode(text)]

    def normalize(self, text: str) -> str:
        """The family's declared normalization: `decode(encode(text))`."""
        check_text(text)
        shown = []
        for _, part in self._matcher.split(text):
            if isinstance(part, AddedToken):
                shown.append(part.content)
                continue
            for inner in self._matcher.split_normalized(self._vocabulary.normalize(part)):
                shown.append(
                    inner.content
                    if isinstance(inner, AddedToken)
                    else self._vocabulary.shown(inner)
                )
        return "".join(shown)

    def name(self, token: int) -> str:
        token = self._checked(token)
        if token in self._control_names:
            return self._control_names[token]
        if token in self._added:
            return self._added[token].content
        return self._vocabulary.pieces.get(token, f"[UNUSED_{token}]")

    def digest(self) -> str:
        """SHA-256 (hex) of the files that `save` writes."""
        sums = [
            name.encode() + hashlib.sha256(content).digest()
            for name, content in sorted(self._files.content.items())
        ]
        return hashlib.sha256(b"".join(sums)).hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the checkpoint's tokenizer files with control tokens,
        readable by `transformers` and by us."""
        for name, content in self._files.content.items():
            write_whole(pathlib.Path(folder) / name, content)

    def _read_vocabulary(self) -> HuggingFaceVocabulary | PublishedSentencePiece:
        files = self._files
        if _files.JSON_FILE in files.content:
            where = f"{files.where}/{_files.JSON_FILE}"
            return HuggingFaceVocabulary(files.json(_files.JSON_FILE), self._guarded, where)
        where = f"{files.where}/{_files.MODEL_FILE}"
        return PublishedSentencePiece(files.content[_files.MODEL_FILE], self._guarded, where)

    def _find_opening(self, bos: int | None) -> list[int]:
        """What the family puts before a text, where no chat template does."""
        if _files.JSON_FILE in self._files.content:
            return opening(self._files.json(_files.JSON_FILE))
        return (
            [bos]
            if bos is not None and self._files.json(_files.CONFIG_FILE).get("add_bos_token", True)
            else []
        )

    def _ids(self, text: str, trusted: bytes | None, prefix: str = "never") -> Iterator[int]:
        for start, part in self._matcher.split(text, trusted):
            if isinstance(part, AddedToken):
                yield part.id
                continue
            wanted = prefix == "always" or (prefix == "first" and start == 0)
            for inner in self._matcher.split_normalized(self._vocabulary.normalize(part)):
                if isinstance(inner, AddedToken):
                    yield inner.id
                else:
                    yield from self._vocabulary.encode(inner, wanted)
                wanted = False

    def _spells_guarded(self, text: str) -> bool:
        """Whether a text spells a guarded token, before or after compatibility normalization."""
        return any(map(self._matcher.spells_guarded, (text, unicodedata.normalize("NFKC", text))))

    def _find_eos_ids(self) -> tuple[int, ...]:
        """End of turn by the chat template, then the tokenizer's end of sequence,
        then those of generation_config."""
        found = [self._turn_end(), self._eos, *self._meta.stop_ids]
        ids = tuple(dict.fromkeys(i for i in found if i is not None))
        if not ids:
            raise InputError(
                f"{self._files.where}: no end of sequence; give eos_token in {_files.CONFIG_FILE} "
                "or eos_token_id in "
                f"{_files.GENERATION_FILE}"
            )
        return ids

    def _turn_end(self) -> int | None:
        """The first special token after what the model said in a finished turn."""
        if self.template is None:
            return None
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        text, trusted = self.template.render(messages, add_generation_prompt=False)
        end = text.rfind(_PROBE) + len(_PROBE)
        parts = self._matcher.split(text, trusted)
        return next(
            (
                p.id
                for start, p in parts
                if start >= end and not isinstance(p, str) and p.id in self._guarded
            ),
            None,
        )

    def _find_bytes(self, token: int) -> bytes:
        if token in self._hidden:
            return b""
        is_piece = token in self._vocabulary.pieces
        if token in self._added and (_files.JSON_FILE in self._files.content or not is_piece):
            return self._added[token].content.encode()
        return self._vocabulary.bytes_of(token) if is_piece else b""

    def _never(self) -> tuple[int, ...]:
        """Ids that are never legal in a response: special ones that end nothing,
        and rows without a piece."""
        hidden = (self._hidden | self._blank) - set(self._eos_ids)
        return tuple(sorted(hidden - self._control_names.keys()))


def _written(token: AddedToken, template: str | None) -> bool:
    """Whether a chat template writes a token; white space is everybody's."""
    return template is not None and bool(token.content.strip()) and token.content in template
