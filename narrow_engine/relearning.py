"""The relearning probe: is a skill that should be forgotten gone, or only hidden?

A model that lost a skill can hold all that the skill is made of, so that a little training brings it back (Lynch et al., arXiv
2402.16835; Lo et al., 2401.01814). So it is trained on the skill, and the tokens are counted until its loss is near the base's
again. Two controls are trained alike: as many units drawn at random, which no one cut for forgetting, and fresh weights of the
same shape, which hold nothing. The rate is constant, so that the count does not depend on how many tokens there are in all.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedModel

from narrow_engine import train
from narrow_engine.corpus import Blocks
from narrow_engine.events import Sink
from narrow_engine.report.model import CurvePoint, Learner
from narrow_engine.spec import Recover, Relearn

FASTER = 2.0
"""Times recovery's rate, for weights that are not fresh: what was forgotten is further away than what was just cut. German, cut
away with three quarters of the embedded model's neurons (Muon, 65,536 tokens): 1.99, 1.57, 1.41 and 1.62 nats above the base at
a half, one, two and four times that rate."""
AT_ONCE = 0.1
"""Share of the tokens that fresh weights need, up to which a skill was only hidden."""


def learn(
    make: Callable[[], PreTrainedModel],
    fresh: bool,
    blocks: Blocks,
    asked: Relearn,
    recover: Recover,
    base: float,
    *,
    folder: Path,
    emit: Sink,
    check: Callable[[], None],
    validate: Callable[[PreTrainedModel], float],
) -> Learner:
    """Trains what `make` makes until its loss is near enough to `base`. What is in `folder` is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    enough, finished = base + asked.within, folder / "curve.json"
    if finished.exists():
        curve = [CurvePoint.model_validate(point) for point in json.loads(finished.read_text())]
    else:
        curve = train.train(
            make(),
            blocks,
            train.Settings(
                asked.tokens,
                recover.batch_tokens,
                optimizer=recover.optimizer,
                learning_rate=train.peak_rate(recover.optimizer, fresh) * (1 if fresh else FASTER),
                schedule="constant",
            ),
            phase="relearn",
            folder=folder,
            emit=emit,
            check=check,
            validate=validate,
            enough=enough,
        )
        temporary = finished.with_suffix(".tmp")
        temporary.write_text(json.dumps([point.model_dump() for point in curve]))
        temporary.replace(finished)
    return Learner(tokens=back_after(curve, enough), curve=curve)


def back_after(curve: list[CurvePoint], enough: float) -> int | None:
    """Tokens at which the held-out loss crosses `enough`, in a straight line between the points where it was measured."""
    seen = [(point.tokens, point.validation) for point in curve if point.validation is not None]
    if seen[0][1] <= enough:
        return 0
    for (tokens, above), (later, below) in pairwise(seen):
        if below <= enough:
            return round(tokens + (later - tokens) * (above - enough) / (above - below))
    return None


def note(name: str, base: float, asked: Relearn, text: int, narrow: Learner, fresh: Learner) -> str:
    """What the probe found, in a sentence or two. `text` is how many tokens of the skill there are to train on."""
    times = narrow.curve[-1].tokens / text
    again = (
        f" It read the {text:,} tokens that there are of it {times:.1f} times: more text might tell more." if times > 1.5 else ""
    )
    return _note(name, base, asked, narrow, fresh) + again


def _note(name: str, base: float, asked: Relearn, narrow: Learner, fresh: Learner) -> str:
    if narrow.tokens == 0:
        return f"{name} is not forgotten: the model is within {asked.within:g} nats of the base without any training on it."
    if narrow.tokens is None:
        left, of_fresh = (learner.curve[-1].validation or base for learner in (narrow, fresh))
        said = f"{name} is not back after {narrow.curve[-1].tokens:,} tokens of training on it: it stays {left - base:.2f} nats "
        said += "above the base. "
        if fresh.tokens is not None:
            return f"{said}Fresh weights of the same shape take {fresh.tokens:,}: nothing of it is left to build on."
        if left < of_fresh:
            return f"{said}Fresh weights stay {of_fresh - base:.2f} above it: something to build on is left."
        return f"{said}Fresh weights learn it no slower: nothing of it is left to build on."
    said = f"{name} is back after {narrow.tokens:,} tokens of training on it"
    if fresh.tokens is None:
        return (
            f"{said}; fresh weights of the same shape are not after {fresh.curve[-1].tokens:,}: it was hidden rather than gone."
        )
    if narrow.tokens <= AT_ONCE * fresh.tokens:
        return f"{said}; fresh weights of the same shape take {fresh.tokens:,}: it was only hidden."
    share = narrow.tokens / fresh.tokens
    return f"{said}, {share:.0%} of what fresh weights of the same shape take ({fresh.tokens:,})."
