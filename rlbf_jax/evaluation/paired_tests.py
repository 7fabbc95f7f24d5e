"""What a paired comparison can tell: McNemar's test, and the smallest difference it would find.

A pair is one attempt, answered by both sides; pairs of one prompt (under several training seeds, or
several attempts) are a cluster. All numbers are two-sided, at 5 %, and of 80 % power.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

LEVEL, POWER = 0.05, 0.8
_Z_LEVEL = NormalDist().inv_cdf(1 - LEVEL / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)
STANDARD_ERRORS = _Z_LEVEL + _Z_POWER
"""How many standard errors a difference must be from 0 to be found with this power: 2.80."""
METHODS = {
    "mcnemar_midp": "McNemar's exact test, mid-p, of one pair a prompt",
    "mcnemar_midp_prompts": "the same, where a prompt's pairs of all seeds change sides together",
    "connor": "Connor's formula, from the share of pairs in which the two sides differ",
    "bootstrap_se": "2.80 standard errors of the bootstrap over prompts",
    "none": "no such number",
}
"""Every method that a `PairedTest` may name, and what it is."""


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """A p-value and the minimum detectable effect of one comparison at its size."""

    p: float
    """NaN where values are not yes/no, or seeds have other numbers of pairs."""
    p_method: str
    mde: float
    """The smallest true difference that such a comparison finds at 5 % with 80 % power. NaN where
    none would be found, or the pairs do not say."""
    mde_method: str


def mcnemar_midp(totals: Sequence[int]) -> float:
    """Two-sided mid-p of McNemar's test, exact, for pairs in clusters.

    Were the two sides alike, each cluster's difference would as likely have the other sign. With
    one pair a cluster this is McNemar's test given the discordant pairs (McNemar 1947; mid-p as in
    Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91).

    Args:
      totals: of each cluster, how many pairs have a alone less how many have b alone.
    """
    sizes = Counter(abs(int(total)) for total in totals if total)
    counts = np.ones(1)  # [1 + sum of sizes]: law of what the clusters with a plus add up to
    for size, number in sorted(sizes.items()):
        steps = np.zeros(size * number + 1)
        steps[::size] = _fair_coins(number)
        counts = np.convolve(counts, steps)
    extreme = (len(counts) - 1 + abs(sum(map(int, totals)))) // 2
    return min(1.0, float(2 * counts[extreme + 1 :].sum() + counts[extreme]))


def _fair_coins(n: int) -> np.ndarray:
    """[n + 1]: probabilities of 0 to n heads."""
    log_factorial = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    return np.exp(log_factorial[n] - log_factorial - log_factorial[::-1] - n * math.log(2))


def detectable_difference(n: float, discordant: float) -> float:
    """The difference of two paired rates that n independent pairs find at 5 % with 80 % power.

    Solves n = (z_a sqrt(d) + z_b sqrt(d - e^2))^2 / e^2 for the difference e (Connor 1987,
    Biometrics 43, 207-211, after Miettinen 1968), d being the share of discordant pairs. A
    difference cannot be larger than d; where e would be, d is taken to be e, its least possible
    share (all discordant pairs point one way). So no discordant pair at all gives about 7.8 / n.

    NaN below 4 pairs, where no difference is found.
    Raises ValueError unless n >= 1 and 0 <= discordant <= 1.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(
            f"detectable_difference needs n >= 1 and 0 <= discordant <= 1, got {n} and {discordant}"
        )
    a, b = _Z_LEVEL, _Z_POWER
    if n <= a * a:
        return math.nan
    e = a * math.sqrt(n) + b * math.sqrt(n + b * b - a * a)
    e *= math.sqrt(discordant) / (n + b * b)
    if 0 < e <= discordant:
        return e
    # With d = e: n (1 - u^2) = (a + b u)^2 for u = sqrt(1 - e).
    u = (math.sqrt((a * b) ** 2 + (n + b * b) * (n - a * a)) - a * b) / (n + b * b)
    return 1 - u * u


def paired_test(
    differences: Sequence[float],
    prompts: Sequence[Hashable],
    seeds: Sequence[int],
    se: float,
    yes_no: bool,
) -> PairedTest:
    """Test and minimum detectable effect of the mean over seeds of some pairs' differences.

    Args:
      differences: a - b, one a pair.
      prompts, seeds: of each pair.
      se: standard error of the mean, as `intervals.pooled` has it.
      yes_no: a and b are 0 or 1; otherwise (counts, shares) there is no McNemar test.

    The effect is Connor's with one pair a prompt, else 2.80 standard errors, and then never below
    Connor's of as many independent pairs as these are worth (their variance over the squared
    standard error, Kish's effective size) without a discordant one: a standard error that a few
    pairs made is no promise. Where all pairs are alike it is Connor's for as many as prompts.
    """
    n, n_prompts = len(differences), len(set(prompts))
    alike = len(set(Counter(seeds).values())) == 1
    if not yes_no:
        effect = STANDARD_ERRORS * se if se > 0 else math.nan
        return PairedTest(math.nan, "none", effect, "bootstrap_se" if se > 0 else "none")
    p, p_method = math.nan, "none"
    if alike:
        totals: Counter[Hashable] = Counter()
        for difference, prompt in zip(differences, prompts, strict=True):
            totals[prompt] += int(difference)
        p = mcnemar_midp(list(totals.values()))
        p_method = "mcnemar_midp" if n == n_prompts else "mcnemar_midp_prompts"
    discordant = sum(map(bool, differences)) / n
    if (n == n_prompts and alike) or not se > 0:
        return PairedTest(p, p_method, detectable_difference(n_prompts, discordant), "connor")
    worth = min(n, max(n_prompts, float(np.var(differences)) / se**2))
    effect = max(STANDARD_ERRORS * se, detectable_difference(worth, 0.0))
    return PairedTest(p, p_method, effect, "bootstrap_se")
