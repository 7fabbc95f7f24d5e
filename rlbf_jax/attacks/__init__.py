"""Attacks by name. A new attack is one file with one function of the shape `Attack`, and one line
here."""

from rlbf_jax.attacks.decoding import decoding
from rlbf_jax.attacks.direct import Attack, direct, none
from rlbf_jax.attacks.forced.further import critic_note, many_violations, reprogram, respelled
from rlbf_jax.attacks.forced.geometry import benign_grid, middle_grid, prefilling_depth
from rlbf_jax.attacks.forced.middle_filling import benign_middle, middle_filling
from rlbf_jax.attacks.forced.prefilling import benign_prefill, deep_prefilling, prefilling

ATTACKS: dict[str, Attack] = {
    "none": none,
    "direct": direct,
    "prefilling": prefilling,
    "deep_prefilling": deep_prefilling,
    "benign_prefill": benign_prefill,
    "middle_filling": middle_filling,
    "benign_middle": benign_middle,
    "decoding": decoding,
    "prefilling_depth": prefilling_depth,
    "middle_grid": middle_grid,
    "benign_grid": benign_grid,
    "many_violations": many_violations,
    "reprogram": reprogram,
    "respelled": respelled,
    "critic_note": critic_note,
}

STANDARD = tuple(ATTACKS)[: list(ATTACKS).index("decoding") + 1]
"""What every evaluation runs by default."""

HAS_FORMS = frozenset(ATTACKS) - {
    "none",
    "direct",
    "benign_prefill",
    "benign_middle",
    "benign_grid",
    "decoding",
}
"""Attacks that force a violation, hence are run once a form split; the others are run once."""

BENIGN = frozenset({"none", "benign_prefill", "benign_middle", "benign_grid", "trigger"})
"""Attacks in which nothing bad is asked or forced: every directive is a false one."""
