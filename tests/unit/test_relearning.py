"""The relearning probe: what it counts, that it ends when it may, that it goes on after a kill, and what it says."""

import json

import numpy as np
import pytest
from tiny import tiny_model

from narrow_engine import relearning
from narrow_engine.corpus import Blocks
from narrow_engine.errors import Cancelled
from narrow_engine.report.model import CurvePoint, Learner
from narrow_engine.spec import Recover, Relearn

TOKENS = np.random.default_rng(0).integers(0, 320, 6000).astype(np.uint32)
ASKED = Relearn(tokens=32 * 4 * 40, within=0.5)


def learn(folder, losses, base=1.0, check=lambda: None, made=None):
    given = iter(losses)
    made = [] if made is None else made

    def make():
        made.append(1)
        return tiny_model("llama")

    recover = Recover(batch_tokens=128)
    options = {"folder": folder, "emit": lambda *_: None, "check": check, "validate": lambda model: next(given)}
    return relearning.learn(make, False, Blocks(TOKENS, 32, 5), ASKED, recover, base, **options)


def test_training_ends_where_the_skill_is_back_and_is_not_done_again(tmp_path):
    made = []
    found = learn(tmp_path / "a", [4.0, 3.0, 1.4, *[9.0] * 20], made=made)
    # Held-out losses are measured at 0, 1 and 2 batches of 128 tokens: 1.5 lies 1.5 / 1.6 of the way between the last two.
    assert [p.validation for p in found.curve if p.validation] == [4.0, 3.0, 1.4]
    assert found.tokens == 128 + round(128 * 1.5 / 1.6)
    assert learn(tmp_path / "a", [], made=made) == found
    assert made == [1]


def test_a_skill_that_was_never_gone_takes_no_training(tmp_path):
    found = learn(tmp_path / "a", [1.5])
    assert found.tokens == 0
    assert len(found.curve) == 1


def test_a_skill_that_stays_away_is_trained_on_all_tokens(tmp_path):
    found = learn(tmp_path / "a", [3.0] * 40)
    assert found.tokens is None
    assert found.curve[-1].tokens == ASKED.tokens


def test_a_probe_that_was_stopped_goes_on(tmp_path):
    steps = []

    def check():
        steps.append(1)
        if len(steps) == 11:
            raise Cancelled

    with pytest.raises(Cancelled):
        learn(tmp_path / "a", [3.0] * 40, check=check)
    assert not (tmp_path / "a" / "curve.json").exists()
    found = learn(tmp_path / "a", [3.0] * 40, check=lambda: steps.append(1))
    assert found.curve[-1].tokens == ASKED.tokens
    assert len(steps) == 41, "ten steps were there already"
    whole = learn(tmp_path / "b", [3.0] * 40)
    assert [p.loss for p in whole.curve] == [p.loss for p in found.curve]
    assert json.loads((tmp_path / "a" / "curve.json").read_text())[-1]["tokens"] == ASKED.tokens


def learner(tokens, last=3.0, of=100_000):
    return Learner(tokens=tokens, curve=[CurvePoint(phase="relearn", tokens=of, validation=last, seconds=1.0)])


@pytest.mark.parametrize(
    ("narrow", "fresh", "said"),
    [
        (learner(0), learner(None), "german is not forgotten: the model is within 0.5 nats"),
        (learner(900), learner(90_000), "was only hidden"),
        (learner(900), learner(None), "it was hidden rather than gone"),
        (learner(60_000), learner(90_000), "67% of what fresh weights"),
        (learner(None, 2.0), learner(None, 4.0), "stays 1.00 nats above the base. Fresh weights stay 3.00 above it: something"),
        (learner(None, 2.0), learner(None, 1.9), "no slower: nothing of it is left"),
        (learner(None, 2.0), learner(90_000), "nothing of it is left"),
    ],
)
def test_what_is_said_of_it(narrow, fresh, said):
    told = relearning.note("german", 1.0, ASKED, 100_000, narrow, fresh)
    assert said in told
    assert "more text" not in told
    assert "read the 20,000 tokens that there are of it 5.0 times" in relearning.note("german", 1.0, ASKED, 20_000, narrow, fresh)
