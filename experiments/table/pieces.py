"""What the table of results is made of: one piece a run, each with its configuration
and the run that it builds on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlbf_jax.critics.noisy import NoiseConfig
from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.data.worlds.toy_world import FORMS
from rlbf_jax.directives import NEVER, Semantics
from rlbf_jax.methods.attacked_prompts import RolloutMix
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.plain import differences
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.sampling.request import Knobs

Rlbf = Experiment[RlbfConfig]

BIASES = (-8.0, -5.0, -2.5, 2.5, 5.0, 8.0)
"""Added to the logits of every category; 0 is the model as it is, which `main` has measured."""

ATTACKED_SHARES = (0.0, 0.3, 0.6)
FORCED = (
    "prefilling", "deep_prefilling", "middle_filling", "middle_cut", "late_filling",
    "many_violations",
)  # fmt: skip
"""Kinds of rollout that begin with a forced violation: the attacked ones. Benign twins are not."""

PLAIN_CONTEXTS = (
    "none", "direct", "prefilling", "deep_prefilling", "middle_filling", "benign_prefill",
    "benign_middle",
)  # fmt: skip
"""What rollouts started from before there were others."""
PLAIN_SHAPES = ("late_share", "late_words", "several_share", "share_strange")
"""Of BSAFE+: what its defaults have less of."""

MIDDLE = (0.1, 0.75)
"""The middle of an answer, as shares of `max_tokens`. The paper does not say what it means by it.
"""

NOISE_ACCURACY = 0.82
PRICE = 0.5
"""Of a wrong category, and of a false backtrack, where the base has none."""
MISTAKES = 0.1
"""Share of own mistakes among the rollouts where the base has none."""
GROUP = 8
WIDE_SHARE = 0.5
"""Share of SFT's violations that have forms which otherwise only reinforcement meets."""

RL = ("rlbf", "calibrate_rlbf", "evaluate_rlbf")
DATA = "bsafe_plus_data"
FROM_SFT = (DATA, "sft", "suffixes")
"""What reinforcement starts from."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run folder. Its stages start from those of `source` that it adopts."""

    group: str
    """What `--only` takes; pieces of one group differ in their seed alone."""
    seed: int
    purpose: str
    config: Rlbf
    stages: tuple[str, ...] = ()
    """Stages run here, of those that its recipe has; empty: all of the recipe."""
    source: str = ""
    """Name of another piece."""
    takes: tuple[str, ...] = ()
    """Stages that it takes over from there, of those that its recipe has."""

    @property
    def adopted(self) -> tuple[str, ...]:
        """Of `takes`, what is there to take."""
        there = {stage.name for stage in recipe(self.config)}
        return tuple(name for name in self.takes if name in there)

    @property
    def name(self) -> str:
        """Also its folder."""
        return f"{self.group}/seed{self.seed}"


def plan(base: Rlbf, seeds: Sequence[int], ablation_seeds: Sequence[int]) -> list[Piece]:
    """All pieces, each after the one that it builds on.
    Raises ValueError for an ablation seed that is no seed."""
    strange = sorted(set(ablation_seeds) - set(seeds))
    if strange:
        raise ValueError(
            f"ablation seeds {strange} are not among the seeds {list(seeds)}; ablations start "
            "from them"
        )
    pieces = []
    for seed in seeds:
        config = base.replace(seed=seed)
        pieces += [*_main(config), *_keep(config)]
    for seed in ablation_seeds:
        config = base.replace(seed=seed)
        pieces += [
            *_evaluations(config),
            *_contexts(config),
            *_rewards(config),
            *_losses(config),
            *_noises(config),
            *_shares(config),
            *_coverages(config),
        ]
    return pieces


def chosen(pieces: Sequence[Piece], only: Sequence[str]) -> list[Piece]:
    """The pieces of the named groups (or names), with those that they build on;
    all where none is named.

    Raises ValueError for an unknown name.
    """
    known = {piece.group for piece in pieces} | {piece.name for piece in pieces}
    unknown = [name for name in only if name not in known]
    if unknown:
        groups = ", ".join(dict.fromkeys(piece.group for piece in pieces))
        raise ValueError(f"--only {unknown[0]}: no such piece; expected one of {groups}")
    by_name = {piece.name: piece for piece in pieces}
    wanted = {
        piece.name for piece in pieces if not only or piece.group in only or piece.name in only
    }
    for piece in reversed(pieces):
        if piece.name in wanted and piece.source:
            wanted.add(by_name[piece.source].name)
    return [piece for piece in pieces if piece.name in wanted]


def changed(config: Rlbf, base: Rlbf) -> str:
    """How a configuration differs from another, in its own words:
    `reinforcement.policy.sft_weight 5.0 -> 0.0`."""
    found = differences(base.stored(), config.stored())
    return ", ".join(
        f"`{name}` {_short(old)} → {_short(new)}" for name, old, new in found if name != "seed"
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} names" if len(value) > 2 else "+".join(map(str, value)) or "none"
    if value is None or value == NEVER:
        return "unset" if value is None else "never"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Whole methods ----------------------------------------------------------------------------------


def _with_policy(config: Rlbf, **fields: Any) -> Rlbf:
    return config.changed({f"reinforcement.policy.{k}": v for k, v in fields.items()})


def _grouped(config: Rlbf, algorithm: str) -> Rlbf:
    """An algorithm that compares the answers of a group: `GROUP` of them at least, at as many
    rollouts a step."""
    rl = config.method.reinforcement
    group = max(rl.group_size, GROUP)
    sizes = {"group_size": group, "prompts_per_step": rl.prompts_per_step * rl.group_size // group}
    config = config.changed({f"reinforcement.{name}": size for name, size in sizes.items()})
    return _with_policy(config, algorithm=algorithm)


def _main(base: Rlbf) -> list[Piece]:
    ppo = _with_policy(base, algorithm="ppo")
    main = Piece("main", base.seed, "every stage of the quickstart, PPO", ppo)
    grpo = _grouped(base, "grpo")
    return [
        main,
        Piece("grpo", base.seed, "GRPO from the same SFT model", grpo, RL, main.name, FROM_SFT),
    ]


def _keep(base: Rlbf) -> list[Piece]:
    ppo = _with_policy(base, algorithm="ppo").replace(semantics=Semantics.KEEP)
    stages = ("sft", "sft_control", "rlbf")
    keep = Piece(
        "keep",
        base.seed,
        "SFT, control and PPO under KEEP, from the same data and base",
        ppo,
        (*stages, "suffixes", *(f"{do}_{s}" for s in stages for do in ("calibrate", "evaluate"))),
        f"main/seed{base.seed}",
        (DATA, "base"),
    )
    grpo = _grouped(ppo, "grpo")
    return [
        keep,
        Piece("keep_grpo", base.seed, "GRPO under KEEP", grpo, RL, keep.name, FROM_SFT),
    ]


# Ablations --------------------------------------------------------------------------------------


def _evaluation(base: Rlbf, group: str, purpose: str, **knobs: Any) -> Piece:
    """The finished model again, under other knobs and no bias but theirs."""
    changed = dataclasses.replace(base.evaluation.knobs, **knobs)
    suite = dataclasses.replace(base.evaluation, knobs=changed, calibrate=None)
    config = _with_policy(base, algorithm="ppo").replace(evaluation=suite)
    return Piece(
        group, base.seed, purpose, config, ("evaluate_rlbf",), f"main/seed{base.seed}", ("rlbf",)
    )


def _evaluations(base: Rlbf) -> list[Piece]:
    everywhere = Knobs().without_directives()
    first, last = (round(share * base.evaluation.knobs.max_tokens) for share in MIDDLE)
    # Where `main` is calibrated, its own bias is none of the sweep's.
    biases = BIASES if base.evaluation.calibrate is None else (0.0, *BIASES)
    return [
        _evaluation(
            base,
            "forbid_all",
            "no directive may start",
            forbid_from=everywhere.forbid_from,
            forbid_to=everywhere.forbid_to,
        ),
        _evaluation(
            base,
            "forbid_middle",
            f"no directive may start at ids {first} to {last - 1}, the middle of an answer",
            forbid_from=first,
            forbid_to=last,
        ),
        *(
            _evaluation(
                base,
                bias_group(bias),
                f"{bias:+g} on the logits of categories",
                control_bias=_on_all(bias),
            )
            for bias in biases
        ),
    ]


def bias_group(bias: float) -> str:
    return f"bias_{bias:+g}"


def _on_all(bias: float) -> Mapping[str, float]:
    return {"categories": bias}


def _reinforced(base: Rlbf, group: str, purpose: str, config: Rlbf) -> Piece:
    """Reinforcement under another configuration, from the same SFT model."""
    return Piece(group, base.seed, purpose, config, RL, f"main/seed{base.seed}", FROM_SFT)


def _with_reward(config: Rlbf, **fields: Any) -> Rlbf:
    return config.changed({f"reinforcement.reward.{k}": v for k, v in fields.items()})


def _contexts(base: Rlbf) -> list[Piece]:
    """What rollouts start from, at as many rollouts."""
    ppo = _with_policy(base, algorithm="ppo")
    method = ppo.method
    new = [name for name in method.rollouts.shares()[0] if name not in PLAIN_CONTEXTS]
    share = 0.0 if method.reinforcement.own_mistakes else MISTAKES
    mistakes = ppo.changed({"reinforcement.own_mistakes": share})
    made = [_reinforced(base, "own_mistakes", "a memory of its own violations, or none", mistakes)]
    if new:
        plain = dataclasses.replace(method.rollouts, **dict.fromkeys(new, 0.0))
        purpose = "no late, several, cut or strange ones, and none of their twins"
        made.append(_reinforced(base, "plain_contexts", purpose, ppo.replace(rollouts=plain)))
    return made


def _rewards(base: Rlbf) -> list[Piece]:
    """What the base configuration switches on is switched off here, and the other way around."""
    ppo = _with_policy(base, algorithm="ppo")
    reward = ppo.method.reinforcement.reward
    category = 0.0 if reward.price_wrong_category else PRICE
    harmless = 0.0 if reward.price_on_harmless else PRICE
    return [
        _reinforced(base, "no_guidance", "lambda_SFT = 0", _with_policy(ppo, sft_weight=0.0)),
        _reinforced(
            base,
            "category_price",
            "a price on the wrong category, or none",
            _with_reward(ppo, price_wrong_category=category),
        ),
        _reinforced(
            base,
            "harmless_price",
            "a price on taking harmless text back, or none",
            _with_reward(ppo, price_on_harmless=harmless),
        ),
        _reinforced(
            base,
            "torn",
            "torn text counts as failed, or does not",
            _with_reward(ppo, torn_is_failed=not reward.torn_is_failed),
        ),
    ]


def _losses(base: Rlbf) -> list[Piece]:
    """The other algorithms, from the same SFT model; `dapo` draws flat groups again once."""
    made = []
    for algorithm in ("dr_grpo", "dapo", "rloo"):
        config = _grouped(base, algorithm)
        if algorithm == "dapo":
            config = config.changed({"reinforcement.resample": 1})
        made.append(_reinforced(base, algorithm, f"{algorithm} in place of PPO", config))
    return made


def _noises(base: Rlbf) -> list[Piece]:
    ppo = _with_policy(base, algorithm="ppo")
    category = next(form.category for form in FORMS)
    noises = (
        (
            "noise",
            f"a critic right {NOISE_ACCURACY:.0%} of the time",
            NoiseConfig(accuracy=NOISE_ACCURACY),
        ),
        (
            "noise_category",
            f"a critic that never sees {category}",
            NoiseConfig(missed=(category,), miss_rate=1.0),
        ),
    )
    return [
        _reinforced(base, group, purpose, ppo.replace(critic_noise=noise))
        for group, purpose, noise in noises
    ]


def _shares(base: Rlbf) -> list[Piece]:
    ppo = _with_policy(base, algorithm="ppo")
    return [
        _reinforced(
            base,
            f"attacked_{round(100 * share)}",
            f"{share:.0%} of rollouts begin with a forced violation",
            ppo.replace(rollouts=with_attacked_share(base.method.rollouts, share)),
        )
        for share in ATTACKED_SHARES
    ]


def with_attacked_share(mix: RolloutMix, share: float) -> RolloutMix:
    """The mix with forced violations in `share` of the rollouts;
    within both kinds, weights keep their proportions."""
    weights = {name: getattr(mix, name) for name in mix.shares()[0]}
    attacked = sum(weight for name, weight in weights.items() if name in FORCED)
    others = sum(weights.values()) - attacked
    scaled = {
        name: round(weight * (share / attacked if name in FORCED else (1 - share) / others), 6)
        for name, weight in weights.items()
    }
    return dataclasses.replace(mix, **scaled)


def _coverages(base: Rlbf) -> list[Piece]:
    """SFT again, on fewer forms of violation, on more, and on plainer shapes of them.
    This is the one place where they are configured."""
    ppo, bsafe = _with_policy(base, algorithm="ppo"), base.method.bsafe_plus
    own = BsafePlusConfig()
    coverages = (
        (
            "plain_sft",
            "SFT without violations taken back late, several of them, and strange prompts",
            {name: getattr(own, name) for name in PLAIN_SHAPES},
        ),
        (
            "coverage_narrow",
            "SFT on half of its forms",
            dict(only_forms=half_of(bsafe.only_forms), share_rl_forms=0.0),
        ),
        (
            "coverage_wide",
            "SFT also on forms of reinforcement",
            dict(only_forms=(), share_rl_forms=WIDE_SHARE),
        ),
    )
    pieces = []
    for group, purpose, fields in coverages:
        config = ppo.replace(bsafe_plus=dataclasses.replace(bsafe, **fields))
        if config.method.bsafe_plus == bsafe:
            continue
        stages = (DATA, "sft", "suffixes", "calibrate_sft", "evaluate_sft", *RL)
        pieces.append(
            Piece(group, base.seed, purpose, config, stages, f"main/seed{base.seed}", ("base",))
        )
    return pieces


def half_of(names: Sequence[str]) -> tuple[str, ...]:
    """Half of the forms (of all forms of split `sft` where none are named), spread evenly over the
    categories, each of which keeps one at least."""
    forms = [form for form in FORMS if form.split == "sft" and (not names or form.name in names)]
    place: dict[str, int] = {}
    rank = {}
    for form in forms:
        rank[form.name] = place[form.category] = place.get(form.category, 0) + 1
    ordered = sorted(forms, key=lambda form: rank[form.name])
    return tuple(form.name for form in ordered[: max(len(place), len(ordered) // 2)])
