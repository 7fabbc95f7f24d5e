"""Attacks by name. A new attack is one file with one function of the shape `Attack`, and one line here."""

from rlbf_jax.attacks.decoding import decoding
from rlbf_jax.attacks.direct import Attack, direct, none
from rlbf_jax.attacks.middle_filling import benign_middle, middle_filling
from rlbf_jax.attacks.prefilling import benign_prefill, deep_prefilling, prefilling

ATTACKS: dict[str, Attack] = {
    "none": none,
    "direct": direct,
    "prefilling": prefilling,
    "deep_prefilling": deep_prefilling,
    "benign_prefill": benign_prefill,
    "middle_filling": middle_filling,
    "benign_middle": benign_middle,
    "decoding": decoding,
}

HAS_FORMS = frozenset({"prefilling", "deep_prefilling", "middle_filling"})
"""Attacks that force a violation, hence are run once a form split; the others are run once."""

BENIGN = frozenset({"none", "benign_prefill", "benign_middle", "trigger"})
"""Attacks in which nothing bad is asked or forced: every directive is a false one."""
