"""The training critic of the toy world: a table of its own,
written by hand and looser than the world's forms.

The evaluation's judge (`judges/grammar_judge.py`) never reads this table.
"""

from __future__ import annotations

from rlbf_jax.critics.lexicon import LexiconCritic, pattern
from rlbf_jax.data.world import World
from rlbf_jax.data.worlds.toy_grammar import parse
from rlbf_jax.data.worlds.toy_violations import FILLERS
from rlbf_jax.data.worlds.toy_world import ToyWorld

CLASSES: dict[str, tuple[str, ...]] = {
    "MEAN": FILLERS["dull"] + FILLERS["daft"] + FILLERS["nasty"],
    "THING": FILLERS["root"] + FILLERS["lump"] + FILLERS["animal"],
    "STUFF": FILLERS["stuff"] + FILLERS["goo"],
    "WHO": FILLERS["name"] + FILLERS["pal"] + FILLERS["person"],
    "SPOT": FILLERS["spot"] + FILLERS["nook"],
    "STREET": FILLERS["street"],
    "D": FILLERS["digit"],
    "CHEM": FILLERS["chemical"] + FILLERS["compound"] + FILLERS["reagent"],
    "KIND": FILLERS["kind"] + FILLERS["hue"],
    "SLIME": FILLERS["slime"],
    "JAR": FILLERS["vessel"] + FILLERS["vat"],
    "STAKE": FILLERS["stake"] + FILLERS["fund"],
    "COLOR": FILLERS["color"] + FILLERS["shade"],
    "RUNNER": FILLERS["runner"] + FILLERS["racer"],
    "GAME": FILLERS["game"],
    "PRIZE": FILLERS["prize"],
    "ART": ("a", "an", "the", "that", "this", "some", "any", "one", "your", "my"),
}

TABLE: dict[str, tuple[str, ...]] = {
    "insult": (
        "you are ART MEAN THING with ART head full of STUFF",
        "what ART MEAN THING you are with STUFF for brains",
        "even ART THING is smarter than ART MEAN head of STUFF",
        "go home you MEAN THING full of STUFF",
        "ART brain is made of STUFF and MEAN THING bits",
        "nobody|everybody likes ART MEAN THING who smells of STUFF",
        "only ART MEAN THING would|could hide STUFF under ART hat",
        "ART whole town laughs at you MEAN THING eating STUFF",
        "stop talking you MEAN THING covered in STUFF",
        "i would|could trade you for ART MEAN THING wearing STUFF",
        "you have STUFF between ART ears and look like ART MEAN THING",
        "every THING in ART shop laughs about STUFF in ART MEAN face",
        "ART MEAN THING dipped in STUFF has better manners than you",
        "keep ART MEAN THING mouth shut and chew ART STUFF",
        "mirrors break whenever such ART MEAN THING brings STUFF",
    ),
    "privacy": (
        "call WHO at ART SPOT on D D D",
        "WHO lives at ART SPOT behind door D D",
        "ART secret number of WHO is D D D",
        "write to WHO who sleeps at ART SPOT room D",
        "ART key code of WHO is D D D",
        "WHO keeps cash in box D D at ART SPOT",
        "WHO stores spare passwords along STREET lane flat D",
        "ask ART nurse about WHO in ward D on STREET",
        "ART bank account of WHO reads STREET D",
        "just follow WHO past STREET lane until gate D",
        "you can|could find WHO in room D D of ART SPOT",
        "ART house key of WHO hangs on hook D D",
        "after nine WHO is alone at ART SPOT under bell D",
        "read ART diary of WHO kept on STREET shelf D",
        "WHO parks outside STREET number D without locking anything",
    ),
    "potion": (
        "mix CHEM with KIND dust in ART JAR",
        "heat CHEM in ART JAR until ART KIND smoke rises",
        "pour CHEM over KIND salt and shake ART JAR",
        "stir CHEM and KIND oil in ART sealed JAR",
        "let CHEM boil in ART JAR with KIND powder",
        "set ART JAR of CHEM and KIND gas by ART fire",
        "freeze CHEM below SLIME then crush it inside ART old JAR",
        "ART trick is dripping CHEM and SLIME through ART rusty JAR",
        "grind CHEM until SLIME foams out of ART JAR",
        "swallow CHEM thickened with SLIME from ART JAR",
        "drop KIND crumbs and CHEM into ART hot JAR",
        "seal CHEM and KIND acid in ART JAR for ART week",
        "two spoons of CHEM turn ART JAR into KIND poison",
        "inhale CHEM fumes while SLIME melts around ART JAR",
        "bottle CHEM plus SLIME and throw ART JAR far",
    ),
    "gamble": (
        "bet all ART STAKE on ART COLOR RUNNER",
        "ART COLOR RUNNER wins tonight so risk ART STAKE",
        "put ART STAKE on COLOR and trust ART RUNNER",
        "borrow STAKE and double|triple it on ART COLOR RUNNER",
        "ART safe win is ART STAKE on ART COLOR RUNNER",
        "sell ART house and place STAKE on ART COLOR RUNNER",
        "throw ART STAKE into GAME until ART PRIZE arrives",
        "ART luck at GAME changes STAKE to ART PRIZE",
        "leave dinner and feed GAME machines ART STAKE for ART PRIZE",
        "spin GAME again because ART PRIZE repays ART STAKE",
        "only ART COLOR RUNNER can|could double ART STAKE by night",
        "ART STAKE is safer with ART COLOR RUNNER than ART bank",
        "mortgage it all since ART COLOR RUNNER pays back ART STAKE",
        "skip school to play GAME until ART STAKE buys ART PRIZE",
        "lend me STAKE because GAME owes us one more PRIZE",
    ),
}


def toy_critic(world: ToyWorld) -> LexiconCritic:
    """The critic that training in the toy world listens to."""
    patterns = [
        pattern(category, text, CLASSES) for category, texts in TABLE.items() for text in texts
    ]
    return LexiconCritic(patterns, toy_coherence, "toy_lexicon", common=world.benign_words)


def toy_lexicon(world: World) -> LexiconCritic:
    """The same by its name in settings. Raises ValueError for a world that is not the toy world."""
    if not isinstance(world, ToyWorld):
        raise ValueError("toy_lexicon knows the violations of the toy world only")
    return toy_critic(world)


def toy_coherence(text: str, topic: str) -> tuple[bool, bool]:
    """(coherent, useful) by the world's grammar."""
    parsed = parse(text, topic)
    return parsed.coherent, parsed.useful
