"""The training loop: what was interrupted ends as if it had not been, and group lasso reaches exact zeros."""

import itertools
from contextlib import ExitStack
from typing import get_args

import numpy as np
import pytest
import torch
from tiny import FAMILIES, kept, multiply_in, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from narrow_engine import footprint, matching, models, muon
from narrow_engine.corpus import Blocks
from narrow_engine.errors import Cancelled
from narrow_engine.families import dimensions
from narrow_engine.models import along, config_dict
from narrow_engine.plan import whole_plan
from narrow_engine.regularize import GroupLasso
from narrow_engine.spec import Divergence, Match
from narrow_engine.teacher import Cached, Live, write
from narrow_engine.train import Settings, shape, train

TOKENS = np.random.default_rng(0).integers(0, 320, 6000).astype(np.uint32)


def blocks():
    return Blocks(TOKENS, 32, 5)


def run(model, settings, folder, stop_at=None, emit=lambda *_: None, watch=lambda model: None, **extra):
    seen = []

    def check():
        seen.append(1)
        watch(model)
        if stop_at is not None and len(seen) > stop_at:
            raise Cancelled

    folder.mkdir(exist_ok=True)
    return train(
        model,
        blocks(),
        settings,
        phase="recover",
        folder=folder,
        emit=emit,
        check=check,
        validate=lambda m: 1.0,
        **extra,
    )


@pytest.mark.parametrize(
    ("family", "objective", "optimizer", "on_policy"),
    [
        *(("llama", o, p, 0.0) for o in ("next_token", "mixed", "distill") for p in ("adamw", "muon")),
        ("qwen3_moe", "mixed", "muon", 0.0),
        ("llama", "distill", "muon", 0.5),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path, family, objective, optimizer, on_policy):
    settings = Settings(32 * 4 * 12, 128, objective, 1.0, optimizer, 3e-3, on_policy=on_policy)
    teacher = tiny_model(family, seed=1)
    whole, broken = tiny_model(family), tiny_model(family)
    curve = run(whole, settings, tmp_path / "whole", teacher=Live(teacher))
    with pytest.raises(Cancelled):
        run(broken, settings, tmp_path / "broken", stop_at=5, teacher=Live(teacher))
    resumed = tiny_model(family, seed=9)
    again = run(resumed, settings, tmp_path / "broken", teacher=Live(teacher))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [p.loss for p in curve] == [p.loss for p in again]
    assert [p.tokens for p in curve] == [p.tokens for p in again]


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_every_divergence_brings_the_student_to_the_base(tmp_path, divergence):
    model, teacher = tiny_model("llama", seed=2), tiny_model("llama", seed=1, initializer_range=0.1)
    settings = Settings(32 * 4 * 15, 128, "distill", 1.0, "muon", 1e-2, divergence=divergence)
    curve = run(model, settings, tmp_path / "a", teacher=Live(teacher))
    assert curve[-1].loss < 0.5 * curve[1].loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(tmp_path, optimizer):
    model = tiny_model("llama", initializer_range=0.05)
    repeated = Blocks(np.tile(np.array([5, 9, 7], np.uint32), 1000), 32, 0)
    curve = train(
        model,
        repeated,
        Settings(32 * 4 * 60, 128, "next_token", 1.0, optimizer, 5e-3),
        phase="recover",
        folder=tmp_path,
        emit=lambda *_: None,
        check=lambda: None,
        validate=lambda m: 0.0,
    )
    assert curve[-1].loss < 0.4 * curve[1].loss


@pytest.mark.parametrize("target", [0.5, 0.75])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_group_lasso_reaches_its_target_with_exact_zeros_in_every_layer(tmp_path, family, target):
    model = tiny_model(family)
    settings = Settings(32 * 4 * 40, 128, "next_token", 1.0, "adamw", 1e-3)
    rows = 3 * dimensions(config_dict(model)).experts
    groups = GroupLasso(
        along(model, "width"), torch.rand(rows, 48, dtype=torch.float64) + 0.1, target, shape(settings, blocks())[1]
    )
    curve = run(model, settings, tmp_path / "a", after_step=groups)
    zero = groups.norms() == 0
    assert (zero.sum(1) == round(48 * target)).all()
    assert curve[-1].sparsity == pytest.approx(target)
    steps = [p.sparsity for p in curve if p.sparsity is not None]
    assert steps == sorted(steps)
    assert max(b - a for a, b in itertools.pairwise(steps)) < 0.15, "groups go gradually, not in a cliff"


def test_group_lasso_resumes_with_its_dead(tmp_path):
    settings = Settings(32 * 4 * 20, 128, "next_token", 1.0, "adamw", 1e-3)
    scores = torch.rand(3, 48, dtype=torch.float64) + 0.1
    results = []
    for stop in (None, 11):
        model = tiny_model("llama")
        folder = tmp_path / str(stop)
        if stop:
            with pytest.raises(Cancelled):
                run(model, settings, folder, stop_at=stop, after_step=GroupLasso(along(model, "width"), scores, 0.5, 20))
            model = tiny_model("llama", seed=3)
        groups = GroupLasso(along(model, "width"), scores, 0.5, 20)
        run(model, settings, folder, after_step=groups)
        results.append((model.state_dict(), groups.dead))
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


def test_group_lasso_spares_what_the_scores_value(tmp_path):
    model = tiny_model("llama")
    scores = torch.full((3, 48), 0.01, dtype=torch.float64)
    scores[:, 10:20] = 100.0
    settings = Settings(32 * 4 * 20, 128, "next_token", 1.0, "adamw", 1e-4)
    groups = GroupLasso(along(model, "width"), scores, 0.75, 20)
    run(model, settings, tmp_path / "a", after_step=groups)
    assert not groups.dead[:, 10:20].any()


def test_blocks_cover_an_epoch_once_and_follow_the_seed():
    one = blocks()
    first = one.batch(0, one.count)
    starts = [
        int(np.flatnonzero((np.lib.stride_tricks.sliding_window_view(TOKENS, 33) == row.numpy()).all(1))[0]) for row in first
    ]
    assert len(set(starts)) == one.count
    assert all(abs(a - b) >= 32 for a, b in itertools.pairwise(sorted(starts)))
    assert torch.equal(blocks().batch(7, 3), one.batch(7, 3))
    assert not torch.equal(Blocks(TOKENS, 32, 6).batch(0, 3), first[:3])
    assert not torch.equal(one.batch(one.count, 3), first[:3]), "the next epoch has another order"


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_do_not_fit_are_computed_again_with_the_same_result(family, tmp_path, monkeypatch):
    settings, teacher = Settings(32 * 4 * 4, 128, "mixed", 1.0, "muon", 3e-3), tiny_model(family, seed=1)
    models, told = [tiny_model(family), tiny_model(family)], []
    run(models[0], settings, tmp_path / "whole", teacher=Live(teacher), emit=lambda *event: told.append(event))
    monkeypatch.setattr(footprint, "choose", lambda *_: footprint.Way(recompute=True))
    found = []
    run(
        models[1],
        settings,
        tmp_path / "again",
        teacher=Live(teacher),
        emit=lambda *event: told.append(event),
        watch=lambda model: found.append(kept(model.train(), 4, 32)),
    )
    assert found[0] < 0.5 * kept(models[1].train(), 4, 32)
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(a, b), name
    assert [data["code"] for kind, _, _, data in told if kind == "notice"] == ["recomputed"]


@pytest.mark.parametrize("pieces", [3, 5])
@pytest.mark.parametrize("case", ["next_token", "mixed", "cached", "on_policy", "match"])
def test_a_batch_in_pieces_is_the_batch(case, pieces, tmp_path, monkeypatch):
    """To the order of sums; five rows in three pieces are of two lengths."""
    multiply_in(monkeypatch, torch.float32)
    objective = "next_token" if case == "next_token" else "distill" if case == "on_policy" else "mixed"
    settings = Settings(32 * 5 * 6, 160, objective, 1.0, "adamw", 3e-3, on_policy=0.5 if case == "on_policy" else 0.0)
    base = tiny_model("llama", seed=1, initializer_range=0.1)
    models, curves, told = [tiny_model("llama"), tiny_model("llama")], [], []
    for model, parts in zip(models, (1, pieces), strict=True):
        way = footprint.Way(parts)
        monkeypatch.setattr(footprint, "choose", lambda *_, way=way: way)
        folder, extra = tmp_path / str(parts), {"emit": lambda *event: told.append(event)}
        teacher = Live(base)
        if case == "cached":
            for part in ("cache", "work"):
                (folder / part).mkdir(parents=True)
            write(folder / "cache", folder / "work", teacher, blocks(), 30, None, 1.0, lambda done, total: None)
            teacher = Cached(folder / "cache", blocks(), torch.device("cpu"))
        with ExitStack() as stack:
            if case == "match":
                weights = Match(hidden=1.0, attention=1.0)
                extra["beside"] = stack.enter_context(matching.beside(base, model, whole_plan(config_dict(model)), weights))
            curves.append(run(model, settings, folder, teacher=None if case == "next_token" else teacher, **extra))
    assert [p.loss for p in curves[0]][1:] == pytest.approx([p.loss for p in curves[1]][1:], rel=1e-4)
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    assert [data["code"] for kind, _, _, data in told if kind == "notice"] == ["micro_batches"]


@pytest.mark.parametrize(("rows", "parts"), [(40, [14, 14, 12]), (32, [16, 16]), (12, [12])])
def test_muon_orthogonalises_large_matrices_in_blocks_of_rows(monkeypatch, rows, parts):
    monkeypatch.setattr(muon, "BLOCK", 16)
    torch.manual_seed(0)
    matrices = torch.randn(2, rows, 96)
    for matrix, made in zip(matrices, muon.orthogonalize(matrices), strict=True):
        for block, done in zip(matrix.split(parts), made.split(parts), strict=True):
            values = torch.linalg.svdvals(done)
            assert (values.min() > 0.6, values.max() < 1.3) == (True, True)
            left, _, right = torch.linalg.svd(block, full_matrices=False)
            assert torch.nn.functional.cosine_similarity(done.flatten(), (left @ right).flatten(), 0) > 0.97


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_the_flops_of_muon_are_known_from_the_config(monkeypatch, family):
    monkeypatch.setattr(muon, "BLOCK", 16)
    monkeypatch.setattr(footprint, "BLOCK", 16)
    model = tiny_model(family)
    config, table = config_dict(model), models.family(model)
    matrices = [p for name, p in model.named_parameters() if name.startswith(table.layers + ".") and p.ndim >= 2]
    for parameter in matrices:
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counted:
        muon.Muon(matrices, lr=1e-3).step()
    found = footprint.counts(config, dimensions(config))
    assert counted.get_total_flops() == pytest.approx(found.layers * found.muon_flops, rel=0.02)
