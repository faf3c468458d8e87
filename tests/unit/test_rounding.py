"""Training in bfloat16: rounding by chance loses nothing on average, and what was interrupted ends as if it had not been."""

import pytest
import torch
from test_train import blocks, run
from tiny import tiny_model

from narrow_engine import footprint, rounding
from narrow_engine.errors import Cancelled
from narrow_engine.teacher import Live
from narrow_engine.train import Settings, train


def test_a_number_becomes_one_of_its_neighbours_and_itself_on_average():
    torch.manual_seed(0)
    values = torch.tensor([1.0, 1.001, -1.001, 0.0, 3e-30, -3.3e5])
    made = rounding.stochastically(values.repeat(20_000, 1))
    assert made.dtype == torch.bfloat16
    assert torch.equal(made[:, 0], torch.ones(20_000, dtype=torch.bfloat16)), "what needs no rounding stays"
    assert set(made[:, 1].tolist()) == {1.0, 1.0078125}
    assert torch.allclose(made.float().mean(0), values, rtol=1e-3)


def test_changes_too_small_for_bfloat16_add_up():
    torch.manual_seed(0)
    weight = torch.ones(4000, 8, dtype=torch.bfloat16)
    for _ in range(200):
        rounding.add_(weight, torch.full_like(weight, 1e-4, dtype=torch.float32), 1.0)
    assert weight.float().mean().item() == pytest.approx(1.02, abs=1e-3)
    turned = torch.ones(8, 4000, dtype=torch.bfloat16).T
    rounding.write(turned, lambda own, other: own + other, torch.full((4000, 8), 2.0))
    assert (turned == 3).all()


def test_adamw_is_torchs_in_float32():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 60).view(20, 3).clone()) for _ in range(2))
    optimizers = rounding.AdamW([ours], 1e-2, (0.9, 0.95)), torch.optim.AdamW([theirs], 1e-2, (0.9, 0.95), weight_decay=0.0)
    for _ in range(10):
        gradient = torch.randn(20, 3)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("family", "optimizer"), [("llama", "muon"), ("qwen3_moe", "muon"), ("gpt2", "adamw")])
def test_it_learns_and_a_run_that_was_stopped_ends_with_the_same_weights(family, optimizer, tmp_path, monkeypatch):
    way = footprint.Way(2, recompute=True, bfloat16=True)
    monkeypatch.setattr(footprint, "choose", lambda *_: way)
    settings, teacher = Settings(32 * 4 * 12, 128, "distill", 1.0, optimizer, 3e-3), Live(tiny_model(family, seed=1))
    models = [tiny_model(family), tiny_model(family), tiny_model(family, seed=9)]
    curve = run(models[0], settings, tmp_path / "whole", teacher=teacher)
    assert curve[-1].loss < curve[1].loss
    with pytest.raises(Cancelled):
        run(models[1], settings, tmp_path / "broken", stop_at=5, teacher=teacher)
    run(models[2], settings, tmp_path / "broken", teacher=teacher)
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[2].named_parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), name
        assert a.ndim < 2 or torch.equal(a, a.bfloat16().float()), f"{name} was in bfloat16"


def test_a_run_that_is_resumed_where_there_is_more_memory_goes_on_in_bfloat16(tmp_path, monkeypatch):
    settings, told = Settings(32 * 4 * 12, 128, "next_token", 1.0, "adamw", 3e-3), []
    with monkeypatch.context() as little:
        little.setattr(footprint, "choose", lambda *_: footprint.Way(2, recompute=True, bfloat16=True))
        with pytest.raises(Cancelled):
            run(tiny_model("llama"), settings, tmp_path / "run", stop_at=5)
    model = tiny_model("llama", seed=9)
    run(model, settings, tmp_path / "run", emit=lambda *event: told.append(event))
    assert all(p.ndim < 2 or torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert {data["code"] for kind, *_, data in told if kind == "notice"} == {"recomputed", "bfloat16"}


def test_the_held_out_loss_is_that_of_the_weights_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "choose", lambda *_: footprint.Way(1, recompute=True, bfloat16=True))
    model, ids = tiny_model("llama"), torch.arange(64).view(2, 32)

    def validate(m):
        return float(m.eval()(input_ids=ids).logits.detach().float().square().mean())

    curve = train(
        model,
        blocks(),
        Settings(32 * 4 * 4, 128, "next_token", 1.0, "muon", 3e-3),
        phase="recover",
        folder=tmp_path,
        emit=lambda *_: None,
        check=lambda: None,
        validate=validate,
    )
    assert curve[-1].validation == pytest.approx(validate(model), rel=1e-3)
