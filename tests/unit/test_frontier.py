"""The frontier of a sweep: what is beaten by what, means over seeds, and a page that says so."""

import re
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrow_engine.report.frontier import Finished, Outcome, frontier
from narrow_engine.report.frontier_page import render_frontier, verdict
from narrow_engine.spec import Budget, SweepSpec, points


def curve(*losses, phase="recover"):
    return [
        {"phase": phase, "tokens": 100 * number, "validation": loss, "seconds": 1.0, "loss": None}
        for number, loss in enumerate(losses)
    ]


def point(method="prune", share=0.5, seed=0, parameters=1000, loss=2.5, **changes):
    outcome = {
        "target": "python",
        "base_parameters": 2000,
        "base_loss": 2.0,
        "parameters": parameters,
        "cut_loss": loss + 1,
        "loss": loss,
        "retention": {"value": 0.5, "low": 0.4, "high": 0.6},
        "tokens": 300,
        "seconds": 12.5,
        "curve": curve(loss + 1, loss),
        **changes,
    }
    budget = Budget(parameters=share)
    return Finished(method=method, budget=budget, seed=seed, outcome=Outcome.model_validate(outcome))


def test_what_is_larger_and_worse_is_dominated_and_a_tie_is_not():
    found = frontier(
        [
            point("a", 0.5, parameters=1000, loss=2.5),
            point("b", 0.5, parameters=1000, loss=2.5),
            point("c", 0.5, parameters=1000, loss=2.6),
            point("a", 0.9, parameters=1800, loss=2.5),
            point("b", 0.9, parameters=1800, loss=2.4),
        ],
        of=9,
    )
    assert [(p.method, p.parameters.mean, p.dominated) for p in found.points] == [
        ("a", 1000, False),
        ("b", 1000, False),
        ("c", 1000, True),
        ("b", 1800, False),
        ("a", 1800, True),
    ]
    assert (found.target, found.finished, found.of, found.base_parameters, found.base_loss) == ("python", 5, 9, 2000, 2.0)


sizes, losses = st.integers(1, 6), st.integers(0, 6).map(lambda n: n / 2)
many = st.lists(
    st.builds(point, st.sampled_from("abc"), sizes.map(lambda n: n / 10), st.integers(0, 3), sizes, losses), max_size=20
)


@given(many, st.randoms())
def test_the_frontier_falls_and_covers_everything_in_any_order(finished, random):
    unique = list({(f.method, f.budget.parameters, f.seed): f for f in finished}.values())
    found = frontier(unique, 20)
    best = [p for p in found.points if not p.dominated]
    assert bool(best) == bool(unique)
    for one, two in pairwise(best):
        assert one.parameters.mean <= two.parameters.mean
        assert one.loss.mean > two.loss.mean or (one.parameters.mean, one.loss.mean) == (two.parameters.mean, two.loss.mean)
    for loser in (p for p in found.points if p.dominated):
        assert any(p.parameters.mean <= loser.parameters.mean and p.loss.mean <= loser.loss.mean for p in best)
    assert sum(len(p.seeds) for p in found.points) == len(unique) == found.finished
    assert all(p.loss.low <= p.loss.mean <= p.loss.high for p in found.points)
    random.shuffle(unique)
    assert frontier(unique, 20) == found


def test_a_curve_is_the_mean_where_every_seed_was_measured_and_phases_follow_each_other():
    lasso = curve(3.0, 2.9, 2.8, phase="sparsify")
    found = frontier(
        [
            point(seed=0, curve=lasso + curve(4.0, 3.0)),
            point(seed=1, curve=lasso[:2] + lasso[2:] + curve(5.0, 4.0, 3.5)),
        ],
        of=2,
    )
    seen = [(p.phase, p.tokens, p.loss.mean) for p in found.curves[0].points]
    assert seen == [
        ("sparsify", 0, 3.0),
        ("sparsify", 100, pytest.approx(2.9)),
        ("sparsify", 200, pytest.approx(2.8)),
        ("recover", 200, 4.5),
        ("recover", 300, 3.5),
    ]
    assert found.curves[0].points[-1].loss.low == 3.0
    assert frontier([point(curve=[])], 1).curves == []


def test_seeds_are_one_point_with_its_range():
    found = frontier([point(seed=seed, loss=2 + seed / 10, parameters=1000 + seed) for seed in (2, 0, 1)], of=6)
    assert len(found.points) == 1
    assert found.points[0].seeds == [0, 1, 2]
    assert (found.points[0].loss.low, found.points[0].loss.high) == (2.0, 2.2)
    assert found.points[0].loss.mean == fmean([2.0, 2.1, 2.2])
    assert found.points[0].parameters.mean == 1001


def words(page):
    return " ".join(re.sub(r"<[^>]+>", "", page[page.index("<body>") :]).split())


def test_the_page_names_what_is_on_the_frontier_and_draws_both_plots():
    seeds = [point("prune", 0.5, seed, loss=2.5 + seed / 10) for seed in (0, 1)]
    page = render_frontier(frontier([*seeds, point("_scratch", 0.5, parameters=1000, loss=4.0)], of=4))
    text = words(page)
    assert "For python, prune at 50% of parameters is beaten by none." in text
    once = frontier([point("prune", budget, parameters=1000 * budget, loss=3 - budget) for budget in (0.25, 0.5)], of=2)
    once.points.append(once.points[0].model_copy(update={"method": "scratch", "dominated": True}))
    assert verdict(once) == "At every size on the frontier, prune is the best for python."
    alone = [point for point in once.points if point.dominated or point.budget.parameters == 0.5]
    assert verdict(once.model_copy(update={"points": alone})).endswith(
        "prune at 50% of parameters is beaten by none, in one run each."
    )
    assert "3 of 4 points have finished; 1 of the 2 combinations of method and budget is beaten by none" in text
    assert page.count("<svg") == 2
    assert "2.500 – 2.600" in text
    assert "_scratch" in re.sub(r"(?s)<table.*?</table>", "", page), "in the legend too"
    assert "<script" not in page


def test_the_page_of_a_sweep_without_results_says_so():
    page = render_frontier(frontier([], of=4))
    assert "No point of this sweep has finished yet." in words(page)
    assert "<svg" not in page


def test_points_that_share_most_run_one_after_the_other():
    spec = SweepSpec.model_validate(
        {
            "base": {"model": "mdl_0000000000000000"},
            "target": {"dataset": "ds_0000000000000000"},
            "methods": {"a": {}, "b": {"kind": "scratch"}},
            "budgets": [{"parameters": 0.5}, {"parameters": 0.25}],
            "seeds": [3, 4],
        }
    )
    found = points(spec)
    assert [(p.method, p.spec.budget.parameters, p.spec.seed) for p in found] == [
        (method, share, seed) for seed in (3, 4) for method in "ab" for share in (0.5, 0.25)
    ]
    assert {p.spec.method.kind for p in found if p.method == "b"} == {"scratch"}
    assert all(p.spec.export == ["safetensors"] and p.spec.base == spec.base for p in found)
