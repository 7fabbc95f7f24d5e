"""Ids of a conversation, by whatever template a tokenizer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.family import FamilyTokenizer
from rlbf_jax.tokenizers.protocol import Tokenizer


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[int]]:
    """Prompt ids, and ids that the answer is forced to begin with, of a conversation.

    The last message may be the assistant's: then the answer goes on from there. A checkpoint's own
    chat template knows several turns; the template of a tokenizer that was trained here knows one,
    to which a system message is prefixed.

    Raises:
      InputError: there is no message of the user, or the template has no place for a message.
    """
    history = list(messages)
    forced: list[int] = []
    if history and history[-1]["role"] == "assistant":
        forced = tokenizer.encode(history.pop()["content"])
    if not any(message["role"] == "user" for message in history):
        raise InputError("a conversation needs a message of the user before the answer")
    if isinstance(tokenizer, FamilyTokenizer) and tokenizer.template is not None:
        return tokenizer.encode_chat(history), forced
    roles = [message["role"] for message in history]
    if roles not in (["user"], ["system", "user"]):
        raise InputError(
            f"a conversation of {', '.join(roles)}: this tokenizer has a template for one turn "
            "only; put everything "
            "into one message of the user, or use a checkpoint with a chat template"
        )
    return tokenizer.encode_prompt("\n\n".join(message["content"] for message in history)), forced
