"""Blocks of two texts: as many of each as the curriculum says, each text in its own order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from narrow_engine.corpus import Blocks, Mixture

NARROW, BROAD = (np.arange(first, first + 5000, dtype=np.uint32) for first in (0, 10_000))
SHARES = st.floats(0, 1)


@given(start=SHARES, end=SHARES, until=SHARES, count=st.integers(1, 400))
def test_the_broad_share_is_that_of_the_curriculum(start, end, until, count):
    mixture = Mixture(Blocks(NARROW, 8, 3), Blocks(BROAD, 8, 3), start, end, until * count)
    blocks = mixture.batch(0, count)
    broad = blocks[:, 0].numpy() >= 10_000
    shares = [start + (end - start) * min(1.0, (i + 0.5) / (until * count)) if until else end for i in range(count)]
    assert abs(broad.sum() - sum(shares)) <= 1.5
    # Up to any point, too, and in the order of each text's own.
    assert np.abs(np.cumsum(broad) - np.cumsum(shares)).max() <= 1.5
    for text, found in ((NARROW, blocks[~broad]), (BROAD, blocks[broad])):
        if len(found):
            assert (found == Blocks(text, 8, 3).batch(0, len(found))).all()
    half = count // 2
    assert (mixture.batch(half, count - half) == blocks[half:]).all()


def test_narrow_only_and_broad_only_are_the_ends():
    for share, text in ((0.0, NARROW), (1.0, BROAD)):
        mixture = Mixture(Blocks(NARROW, 8, 3), Blocks(BROAD, 8, 3), share, share, 50)
        assert (mixture.batch(0, 100) == Blocks(text, 8, 3).batch(0, 100)).all()
