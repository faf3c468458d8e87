"""Each experiment of the paper, made small: the same code and the same claim, in less than a minute."""

import copy
import json
import math

import pytest
import torch

import experiments.frontier.run as frontier
import experiments.hierarchy.run as hierarchy
import experiments.lasso.run as lasso
import experiments.mnist.run as mnist
import experiments.nonlocality.run as nonlocality
import experiments.unlearning.run as unlearning
from experiments import language
from experiments.parity import Parity


@pytest.mark.slow
def test_hierarchy(tmp_path):
    """A composite of eight of 24 bits is learned beside its subtasks, and not alone."""
    setting = hierarchy.Setting(4, 64, 3, 1_200_000, bits=24, each=2)
    broad = hierarchy.learn(setting, True, setting.most, 2, 50)
    alone = hierarchy.learn(setting, False, 600_000, 2, 50)
    assert all(count is not None for count in broad["samples"])
    assert alone["samples"] == [None, None]
    assert hierarchy.summary(alone) == "0 of 2, > 1 M"
    assert hierarchy.same(broad, setting)


@pytest.mark.slow
def test_nonlocality(monkeypatch, tmp_path):
    """Before a group lasso few neurons can go; after it most can, and the composite that nobody asked for has gone with them."""
    monkeypatch.setattr(nonlocality, "TASK", Parity(bits=8, subtasks=4, each=2))
    wanted, other = (0, 1), (2, 3)
    monkeypatch.setattr(nonlocality, "WANTED", wanted)
    monkeypatch.setattr(nonlocality, "OTHER", other)
    monkeypatch.setattr(nonlocality, "CODES", [(0,), (1,), (2,), (3,), wanted, other])
    monkeypatch.setattr(nonlocality, "CUTS", (0.0, 0.6, 0.8))
    monkeypatch.setattr(nonlocality, "HOLDS", 0.9)  # of 32 neurons a fifth is few
    found = nonlocality.measure(nonlocality.Study(2, 32, 100, 2500, 1000, 50), tell=lambda *_: None)
    assert min(found["as trained"]["before cutting"][str(other)]) > 0.97
    assert nonlocality.most(found["group lasso"]["curves"], "wanted") >= 0.8
    assert nonlocality.most(found["as trained"]["curves"], "wanted") == 0
    after = next(row for row in found["group lasso"]["curves"] if row["cut"] == 0.8)
    assert nonlocality.mean(after["other"]) < 0.8
    nonlocality.draw(found, tmp_path / "figure.svg")
    assert "group lasso" in nonlocality.table(found)


def test_mnist(monkeypatch):
    """With 24 hidden neurons of 400: elimination, refit and distillation take less than half of the images of attribution."""
    monkeypatch.setattr(mnist, "SCORED", 240)
    monkeypatch.setattr(mnist, "MOST", 12_000)
    monkeypatch.setattr(mnist, "WANTED", 0.93)
    data = mnist.data()
    small = data._replace(test=data.test.take(torch.arange(1500)))
    base = mnist.teach(data.broad.take(torch.arange(20_000)), width=200, epochs=3)
    reached = {}
    for method in ("ours", "attribution"):
        starts = [mnist.start(method, base, small.training, 24, 240, seed) for seed in range(3)]
        reached[method] = mnist.datapoints(method, starts, base, small.training, small.test, 1e-3, 0)
    assert max(reached["ours"]) < math.inf
    assert 2 * sum(reached["ours"]) < sum(reached["attribution"])


def test_mnist_lasso_cuts_to_what_is_asked_for():
    data = mnist.data()
    base = mnist.teach(data.broad.take(torch.arange(6000)), width=60, epochs=3)
    found = mnist.lasso(base, data.training, 10, 3200, 0)
    assert found.network.widths == (784, 10, 10, 10)
    assert found.images == mnist.SCORED + 3200
    with torch.no_grad():
        right = mnist.accuracy(found.network(data.test.pixels[None]), data.test.digits[None])
    assert right > 0.5  # five digits: chance is a fifth


@pytest.fixture
def little_text(monkeypatch):
    """C in the place of Python: a fiftieth of the text, which is all tokenized."""
    monkeypatch.setattr(language, "TRAINING", language.HELD_OUT["c"])


@pytest.mark.slow
def test_lasso(monkeypatch, little_text, tmp_path):
    """Proximal steps leave exact zeros, which can go for nothing at all; the penalty's gradient leaves none."""
    monkeypatch.setattr(lasso, "CUTS", (0.0, 0.5))
    rows = [lasso.measure(arm, 2048, 512, 512) for arm in ("penalty, λ = 0.01", "proximal, to 50%")]
    assert rows[0]["zero"] == 0
    assert rows[1]["zero"] == pytest.approx(0.5)
    whole, half = rows[1]["loss"]["size"]
    assert half == pytest.approx(whole, abs=2e-4)
    assert rows[0]["loss"]["size"][1] > rows[0]["loss"]["size"][0] + 0.1
    monkeypatch.setattr(lasso, "CUTS", (0.0, 0.5, 0.8))
    for row in rows:
        row["loss"] = {name: [*losses, losses[-1] + 1] for name, losses in row["loss"].items()}
    lasso.draw(rows, tmp_path / "figure.svg")
    assert "| proximal, to 50% |" in lasso.table(rows)


def test_penalty_is_the_sum_of_the_groups():
    model = language.base()
    penalty = lasso.Penalty(model, 2.0)
    norms = lasso.GroupLasso(lasso.models.along(model, "width"), torch.ones(6, 1024), 0.0, 1).norms()
    assert penalty.loss().item() == pytest.approx(2.0 * float(norms.sum()), rel=1e-4)


@pytest.mark.slow
def test_unlearning(monkeypatch, little_text, tmp_path):
    """The cut for one domain costs another more, and costs that domain less than a cut at random does."""
    monkeypatch.setattr(language, "HELD_OUT", {name: language.HELD_OUT[name] for name in ("c", "german")})
    texts = unlearning.Texts(512)
    rows = [unlearning.control(0.0, texts, 2048)]
    rows += [unlearning.measure(method, 0.8, texts, 2048, 2048, 2048) for method in ("attribution", "random")]
    rows.append(unlearning.control(0.8, texts, 2048))
    base, ours, random = (row["stages"]["cut"] for row in rows[:3])
    assert ours["c"] - base["c"] < ours["german"] - base["german"]
    assert ours["c"] < random["c"]
    assert rows[2]["german"][-1][1] < rows[2]["german"][0][1]
    unlearning.draw(rows, tmp_path / "figure.svg")
    assert unlearning.table(rows).count("\n") == 4


@pytest.mark.slow
def test_frontier_points_are_kept_and_told(monkeypatch, tmp_path):
    """A point is run once, and each method of the comparison is a valid job."""
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "result.json")
    monkeypatch.setattr(frontier, "OUT", tmp_path / "out")
    monkeypatch.setattr(frontier, "MEASURED", 1024)
    monkeypatch.setattr(frontier, "TEXT", {"python": language.HELD_OUT["c"]})
    monkeypatch.setitem(frontier.METHODS, "paper", {**frontier.METHODS["paper"], "calibration_tokens": 2048})
    key = {"domain": "python", "method": "paper", "keep": 0.25, "seed": 0, "tokens": 4096, "rate": None}
    rows: list[dict] = []
    frontier.run(rows, key)
    before = copy.deepcopy(rows)
    frontier.run(rows, key)
    assert rows == before == json.loads((tmp_path / "result.json").read_text())
    assert rows[0]["cut_loss"] > rows[0]["base_loss"] + 0.5
    for method in frontier.METHODS:
        assert frontier.spec(**{**key, "method": method}).target_name == "python"


def test_what_is_reported_is_what_is_drawn(tmp_path):
    """The results that are committed make their tables and figures."""
    for module in (frontier, hierarchy, mnist, lasso):
        rows = json.loads(module.RESULTS.read_text())
        module.draw(rows, tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").stat().st_size > 5000
    assert "| python | prune |" in frontier.table(json.loads(frontier.RESULTS.read_text()), frontier.TOKENS)
