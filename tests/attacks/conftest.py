import pytest

from rlbf_jax.tokenizers import train_tokenizer
from tests.attacks.small_world import SENTENCES, VIOLATIONS, WORLD


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        *SENTENCES,
        *VIOLATIONS.values(),
        "Sure, here it is. By the way, Also, Tell me about tea. sft rl unseen",
    ]
    return train_tokenizer(texts * 3, 350, WORLD.categories, 8)
