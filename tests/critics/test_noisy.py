import pytest

from rlbf_jax.critics.base import Exchange, Span, Verdict
from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.noisy import NoiseConfig, NoisyCritic
from rlbf_jax.errors import UserError
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.manifest import experiment_from
from tests.runs.opened import critic_of, judge_of

CATEGORIES = ("insult", "potion")


class Words:
    """Calls every word `bad` an insult and every word `brew` a potion."""

    name = "words"

    def judge(self, exchanges):
        return [self._one(x.text) for x in exchanges]

    def _one(self, text):
        if text == "???":
            return Verdict(judged=False, reason="asked back")
        found = [
            (text.find(w), w, c) for w, c in (("bad", "insult"), ("brew", "potion")) if w in text
        ]
        spans = tuple(Span(i, i + len(w), c) for i, w, c in found)
        return Verdict(spans, coherent=True, useful=False, leaks=spans)


def judged(texts, **noise):
    critic = NoisyCritic(Words(), NoiseConfig(**noise), CATEGORIES)
    return critic.judge([Exchange("p", text) for text in texts])


BAD = [f"a bad thing number {i} there" for i in range(1000)]
GOOD = [f"a good thing number {i} there" for i in range(1000)]


def test_wrong_as_often_as_stated():
    for texts, safe in ((BAD, False), (GOOD, True)):
        wrong = sum(v.safe != safe for v in judged(texts, accuracy=0.82))
        assert 140 < wrong < 220  # 180 +- 3 standard deviations
    assert all(v.safe for v in judged(BAD, accuracy=0.0))
    assert [v.spans for v in judged(BAD)] == [
        v.spans for v in Words().judge([Exchange("p", t) for t in BAD])
    ]


def test_an_error_belongs_to_the_text_and_the_seed():
    one = judged(BAD + GOOD, accuracy=0.5, seed=1)
    assert one[::-1] == judged((BAD + GOOD)[::-1], accuracy=0.5, seed=1)
    differs = sum(
        a.safe != b.safe for a, b in zip(one, judged(BAD + GOOD, accuracy=0.5, seed=2), strict=True)
    )
    assert 800 < differs < 1200


def test_an_accused_text_has_one_whole_violation_over_some_of_its_words():
    for text, verdict in zip(GOOD, judged(GOOD, accuracy=0.0), strict=True):
        (span,) = verdict.spans
        words = text[span.start : span.end].split()
        assert span.complete and span.category in CATEGORIES and 2 <= len(words) <= 8
        assert f" {text} ".count(f" {text[span.start : span.end]} ") == 1  # cut at words
        assert verdict.coherent is True and verdict.useful is False
    assert {v.spans[0].category for v in judged(GOOD, accuracy=0.0)} == set(CATEGORIES)
    assert judged(["", " ."], accuracy=0.0) == [Verdict((), True, False)] * 2


def test_a_biased_critic_overlooks_one_category_only():
    both = [f"bad brew {i}" for i in range(1000)]
    verdicts = judged(both, missed=("insult",), miss_rate=0.3)
    seen = [tuple(s.category for s in v.spans) for v in verdicts]
    assert set(seen) == {("insult", "potion"), ("potion",)} and 250 < seen.count(("potion",)) < 350
    assert [v.leaks for v in verdicts] == [v.spans for v in verdicts]
    assert all(v.safe for v in judged(BAD, missed=("insult",)))
    assert judged(GOOD, missed=("insult",)) == Words().judge([Exchange("p", t) for t in GOOD])


def test_what_could_not_be_judged_stays_so():
    (verdict,) = judged(["???"], accuracy=0.0, missed=("insult",))
    assert not verdict.judged and verdict.reason == "asked back"


def test_names_and_refusals():
    assert (
        NoisyCritic(Words(), NoiseConfig(accuracy=0.82), CATEGORIES).name == "words_accuracy_0.82"
    )
    biased = NoiseConfig(missed=("insult",), miss_rate=0.5)
    assert NoisyCritic(Words(), biased, CATEGORIES).name == "words_missing_insult_0.5"
    assert (
        not NoiseConfig().active
        and not NoiseConfig(missed=("insult",), miss_rate=0).active
        and biased.active
    )
    with pytest.raises(UserError, match="no category insults; expected some of insult, potion"):
        NoisyCritic(Words(), NoiseConfig(missed=("insults",)), CATEGORIES)
    with pytest.raises(ValueError, match="accuracy is 82, expected 0..1"):
        NoiseConfig(accuracy=82)


def test_a_run_s_critic_is_noisy_and_its_judge_is_not(tmp_path):
    plain = Experiment(RlbfConfig())
    noisy = plain.replace(critic_noise=NoiseConfig(missed=("insult",)))
    assert critic_of(noisy, tmp_path).name == "toy_lexicon_missing_insult_1"
    assert type(judge_of(noisy, tmp_path)) is GrammarJudge
    assert type(critic_of(plain, tmp_path)) is not NoisyCritic
    assert experiment_from(noisy.stored(), RlbfConfig) == noisy
