"""What a teacher said, kept on disk, teaches as the teacher does; a term beside the loss compares what it says it does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

from narrow_engine import matching, train
from narrow_engine.corpus import Blocks, Mixture
from narrow_engine.errors import Cancelled
from narrow_engine.models import config_dict, sampled
from narrow_engine.muon import training_dtype
from narrow_engine.plan import make_plan, unscored, whole_plan
from narrow_engine.slice import slice_model
from narrow_engine.spec import Match
from narrow_engine.teacher import Cached, Live, write

LENGTH = 32
TOKENS = np.random.default_rng(0).integers(0, 320, 40 * LENGTH).astype(np.uint32)
EXACT = training_dtype(torch.device("cpu")) == torch.bfloat16
"""Then a cache in bfloat16 holds just what training computes."""


def blocks(again=True, tokens=TOKENS):
    return Blocks(tokens, LENGTH, 5, again)


def mixture():
    return Mixture(blocks(), blocks(tokens=TOKENS[::-1].copy()), 0.8, 0.2, 40.0)


def fill(folder, teacher, read, count, top=None, temperature=1.0, progress=lambda *_: None):
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    size = write(folder / "out", folder / "work", teacher, read, count, top, temperature, progress)
    return Cached(folder / "out", read, torch.device("cpu")), size


def trained(folder, teacher, read, settings, model=None, beside=None):
    model = model or tiny_model("llama", seed=2)
    folder.mkdir(parents=True)
    curve = train.train(
        model,
        read,
        settings,
        phase="recover",
        folder=folder,
        emit=lambda *_: None,
        check=lambda: None,
        validate=lambda _: 0.0,
        teacher=teacher,
        beside=beside,
    )
    return model, curve


def settings(tokens, **changes):
    return train.Settings(tokens, 4 * LENGTH, **{"objective": "mixed", "optimizer": "muon", "learning_rate": 3e-3, **changes})


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "mixtral"])
@pytest.mark.parametrize("read", [blocks, mixture])
def test_hidden_states_of_some_epochs_teach_as_the_teacher_does(tmp_path, family, read):
    teacher, tokens = Live(tiny_model(family, seed=1)), 100 * LENGTH
    cached, size = fill(tmp_path / "cache", teacher, read(), 100)
    entries = len({read().place(index) for index in range(100)})
    assert entries < 80, "epochs share what they have in common"
    hidden = teacher.model.config.hidden_size
    head = teacher.head.weight.numel() * 4
    assert 2 * hidden * LENGTH * entries <= size - head <= 2 * hidden * LENGTH * entries + 3000
    live, curve = trained(tmp_path / "live", teacher, read(), settings(tokens))
    told, other = trained(tmp_path / "told", cached, read(), settings(tokens))
    assert [p.loss for p in other[1:]] == pytest.approx([p.loss for p in curve[1:]], rel=0.02)
    for (name, a), (_, b) in zip(live.named_parameters(), told.named_parameters(), strict=True):
        assert torch.equal(a, b) or not EXACT, name


def test_blocks_that_come_again_are_the_same_and_others_are_not():
    count = blocks().count
    one, two = blocks(), blocks(again=False)
    assert torch.equal(one.batch(0, count), two.batch(0, count)), "the first epoch is as ever"
    for read, same in ((one, True), (two, False)):
        seen = {read.place(i): read.batch(i, 1) for i in range(count)}
        again = [torch.equal(seen[read.place(i)], read.batch(i, 1)) for i in range(count, 2 * count)]
        assert all(again) if same else not any(again)
    assert [one.place(i) for i in range(count)] != [one.place(i) for i in range(count, 2 * count)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_tokens_tell_more_the_more_they_are(tmp_path, temperature):
    teacher = Live(tiny_model("llama", seed=1, initializer_range=0.7))
    options = settings(120 * LENGTH, objective="distill", temperature=temperature)
    ids = blocks().batch(0, 8)[:, :-1]

    def apart(student):
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits.div(temperature).log_softmax(-1) for model in (teacher.model, student))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    live = apart(trained(tmp_path / "live", teacher, blocks(), options)[0])
    found = []
    for top in (1, 16, 319, 5000):
        cached, size = fill(tmp_path / f"cache{top}", teacher, blocks(), 120, top, temperature)
        assert size == pytest.approx(len(cached.entry) * LENGTH * (6 * min(top, 320) + 2), abs=2000)
        found.append(apart(trained(tmp_path / f"told{top}", cached, blocks(), options)[0]))
    assert found[0] > found[1] + 0.02
    assert found[2] == pytest.approx(live, abs=0.02)
    assert found[3] == pytest.approx(live, abs=0.02)


@pytest.mark.parametrize("top", [None, 8])
def test_a_cache_that_was_stopped_goes_on(tmp_path, monkeypatch, top):
    monkeypatch.setattr("narrow_engine.teacher.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("narrow_engine.teacher.PASS_TOKENS", 2 * LENGTH)
    teacher, seen = Live(tiny_model("llama", seed=1)), []

    def stop(done, _):
        seen.extend([done] if done else [])
        if done and len(seen) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        fill(tmp_path / "broken", teacher, blocks(), 20, top, progress=stop)
    fill(tmp_path / "broken", teacher, blocks(), 20, top, progress=stop)
    assert seen[3] == seen[2] == 6
    fill(tmp_path / "whole", teacher, blocks(), 20, top)
    # Killed while it is handed over, it begins anew: what is noted as written would be zeros.
    arrays = ["states"] if top is None else ["tokens", "log_probability"]
    (tmp_path / "torn" / "work").mkdir(parents=True)
    (tmp_path / "torn" / "work" / "done.json").write_text("20")
    calls = iter((False, True))

    def stop_at_once(*_):
        if next(calls):
            raise Cancelled

    with pytest.raises(Cancelled):
        fill(tmp_path / "torn", teacher, blocks(), 20, top, progress=stop_at_once)
    fill(tmp_path / "torn", teacher, blocks(), 20, top)
    for name in arrays:
        whole, torn = ((tmp_path / kind / "out" / f"{name}.npy").read_bytes() for kind in ("whole", "torn"))
        assert whole == torn
    for path in (tmp_path / "whole" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / "out" / path.name).read_bytes(), path.name


def test_a_cache_of_endless_epochs_is_one_epoch_and_stops_when_asked(tmp_path):
    teacher, seen = Live(tiny_model("llama", seed=1)), []
    cached, _ = fill(tmp_path / "endless", teacher, blocks(), 10**12)
    assert len(cached.entry) == blocks().count

    def stop(*_):
        seen.append(1)
        if len(seen) > 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        fill(tmp_path / "stopped", teacher, Mixture(blocks(), blocks(tokens=TOKENS[::-1].copy()), 0, 0, 0), 10**12, progress=stop)


def test_a_teacher_with_more_tokens_tells_of_those_that_the_student_has(tmp_path):
    numbers = torch.tensor([7, 3, 200, *range(50, 100)])
    whole, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2, vocab_size=len(numbers))
    ids = torch.arange(10)[None]
    states, head = Live(whole, numbers)(0, ids)
    wanted = whole(input_ids=numbers[ids]).logits[0][:, numbers]
    assert torch.allclose(head.logits(states), wanted, atol=0.05 * wanted.abs().max().item())
    read = Blocks((TOKENS % len(numbers)).astype(np.uint32), LENGTH, 5, True)
    _, curve = trained(tmp_path / "a", Live(whole, numbers), read, settings(60 * LENGTH, objective="distill"), student)
    assert curve[-1].loss < 0.8 * curve[1].loss


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_the_same_inside_costs_nothing_and_what_is_not_does(family):
    teacher, same, other = (tiny_model(family, seed=seed) for seed in (1, 1, 2))
    ids = torch.from_numpy(TOKENS[:64].astype(np.int64)).view(2, 32)
    with torch.no_grad():
        before = same(input_ids=ids).logits
    for weights in (Match(hidden=1.0), Match(attention=1.0), Match(hidden=2.0, attention=0.5)):
        found = []
        for student in (same, other):
            with matching.beside(teacher, student, whole_plan(config_dict(teacher)), weights) as beside:
                beside.begin()
                teacher(input_ids=ids)
                student(input_ids=ids)
                found.append(beside.loss().item())
                student(input_ids=ids)
                assert not any(part for pair in beside.heard for part in pair), "outside of it nothing is kept"
        assert abs(found[0]) < 1e-5
        assert found[1] > 0.01
    with torch.no_grad():
        assert torch.equal(before, same(input_ids=ids).logits), "it is as it was"


def test_dropout_is_no_difference_of_attention():
    teacher, student = (tiny_model("llama", seed=1, attention_dropout=0.5) for _ in range(2))
    ids = blocks().batch(0, 2)[:, :-1]
    with matching.beside(teacher, student, whole_plan(config_dict(teacher)), Match(attention=1.0)) as beside:
        student.train()
        beside.begin()
        teacher(input_ids=ids)
        student(input_ids=ids)
        assert abs(beside.loss().item()) < 1e-5


def test_of_a_teachers_head_there_is_a_copy_only_where_it_lacks_tokens():
    model = tiny_model("llama")
    whole, padded, trimmed = (Live(model, tokens) for tokens in (None, torch.arange(300), torch.arange(20, 320)))
    for teacher in (whole, padded):
        assert teacher.head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        assert teacher.bytes == 4 * model.num_parameters()
    assert trimmed.bytes == whole.bytes + 4 * 300 * model.config.hidden_size
    for teacher, tokens in ((padded, range(300)), (trimmed, range(20, 320))):
        assert torch.equal(teacher.head.weight, model.lm_head.weight[list(tokens)])


def test_a_cut_model_is_compared_in_what_it_kept(tmp_path):
    teacher = tiny_model("llama", seed=1)
    config = config_dict(teacher)
    scores = unscored(config)
    keep = {"layer": 2, "residual": 24, "head": 2, "neuron": 24}
    plan = make_plan(config, {**scores, "head": torch.tensor([[1.0, 0, 0, 1]] * 3)}, keep)
    small = slice_model(teacher, plan)
    apart = []
    for weights in (None, Match(hidden=20.0, attention=20.0)):
        student = slice_model(small, whole_plan(config_dict(small)))
        if weights is None:
            trained(tmp_path / "without", Live(teacher), blocks(), settings(120 * LENGTH), student)
        else:
            with matching.beside(teacher, student, plan, weights) as beside:
                trained(tmp_path / "with", Live(teacher), blocks(), settings(120 * LENGTH), student, beside)
        with matching.beside(teacher, student, plan, Match(hidden=1.0, attention=1.0)) as beside, torch.no_grad():
            ids = blocks().batch(0, 4)[:, :-1]
            beside.begin()
            teacher(input_ids=ids)
            student(input_ids=ids)
            apart.append(beside.loss().item())
    assert apart[1] < 0.9 * apart[0]


def test_what_is_sampled_is_what_the_model_says():
    model = tiny_model("llama", seed=1, initializer_range=0.5)
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 9, 7]]).expand(400, 3)
    made = sampled(model, prompt, 2)
    assert made.shape == (400, 5)
    assert torch.equal(made[:, :3], prompt)
    with torch.no_grad():
        said = model(input_ids=made).logits.softmax(-1)
    for place in (3, 4):
        drawn = said[range(400), place - 1, made[:, place]]
        # Drawn from p, a token's probability is Σ p² on average; uniformly drawn it would be 1 ÷ vocabulary.
        expected = said[:, place - 1].square().sum(-1).mean().item()
        assert drawn.mean().item() == pytest.approx(expected, rel=0.25)
        assert expected > 3 / 320


def test_a_student_learns_from_what_the_teacher_says_to_its_own_text(tmp_path):
    teacher = tiny_model("llama", seed=1, initializer_range=0.1)
    _, curve = trained(
        tmp_path / "a", Live(teacher), blocks(), settings(120 * LENGTH, objective="distill", on_policy=1.0, learning_rate=1e-2)
    )
    assert curve[-1].loss < 0.6 * curve[1].loss


TEACHING = """
import sys, torch
from pathlib import Path
import numpy as np
from narrow_engine.corpus import Blocks
from narrow_engine.models import load_model
from narrow_engine.teacher import Live, write
def own():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
base = Path(sys.argv[1])
blocks = Blocks(np.random.default_rng(0).integers(0, 320, 4000).astype(np.uint32), 32, 0, True)
with torch.no_grad():
    torch.zeros(4, 64, 64).bmm(torch.zeros(4, 64, 64))
before = own()
teacher = Live(load_model(base, torch.bfloat16))
(base / "out").mkdir(), (base / "work").mkdir()
write(base / "out", base / "work", teacher, blocks, 64, None, 1.0, lambda *_: None)
print(teacher.bytes, own() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
@pytest.mark.slow
def test_a_teacher_stays_in_its_file(tmp_path):
    model = tiny_model("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8)
    model.bfloat16().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", TEACHING, tmp_path], capture_output=True, text=True, check=True)
    weights, taken = map(int, done.stdout.split())
    assert weights > 150e6
    assert taken < weights / 3, "of which the system can let go"
