"""What is predicted of memory is what is taken, and training takes the fastest way that fits."""

import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import run
from tiny import FAMILIES, kept, multiply_in, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from narrow_engine import footprint, matching, memory, pipeline, teacher, train
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.footprint import Machine, Task, Way
from narrow_engine.models import config_dict
from narrow_engine.plan import make_plan, unscored
from narrow_engine.sizing import plan_sizes
from narrow_engine.spec import CompressionSpec, Match, Options
from narrow_engine.train import Settings


@pytest.mark.parametrize("low", [False, True], ids=["float32", "products in bfloat16"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"cohere2", "gemma3_text"}))
def test_the_activations_of_every_family_are_known_from_its_config(family, low):
    """All but two with windows of eight positions, whose masks are larger than anything else in models so small."""
    model = tiny_model(family, hidden_size=64, intermediate_size=160).train()
    config = config_dict(model)
    dims = dimensions(config)

    def predicted(length):
        layer, outside = footprint.kept_per_token(config, dims, length, low)
        return length * (dims.layers * layer + outside)

    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        ratio = (predicted(96) - predicted(48)) / (kept(model, 1, 96) - kept(model, 1, 48))
    assert (0.89 if low else 0.92) < ratio < (1.17 if (family, low) == ("gpt_neox", True) else 1.12 if low else 1.08)


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, the weights of models among them, and the most of them."""

    def __init__(self, *models):
        super().__init__()
        weights = [weight.untyped_storage() for model in models for weight in model.parameters()]
        self.known = {storage.data_ptr(): storage.nbytes() for storage in weights}
        self.live = self.peak = sum(self.known.values())
        for storage in weights:
            weakref.finalize(storage, self.let_go, storage.data_ptr())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.known:
                self.known[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.let_go, storage.data_ptr())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def let_go(self, place):
        self.live -= self.known.pop(place, 0)


@pytest.fixture(params=[False, True], ids=["float32", "products in bfloat16"])
def low(request, monkeypatch):
    """Whichever this machine would choose."""
    multiply_in(monkeypatch, torch.bfloat16 if request.param else torch.float32)
    return request.param


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [("adamw", Way()), ("muon", Way(4)), ("muon", Way(recompute=True)), ("adamw", Way(4, recompute=True, bfloat16=True))],
)
def test_a_step_takes_what_is_predicted(optimizer, way, low, monkeypatch):
    model = tiny_model("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32)
    monkeypatch.setattr(footprint, "choose", lambda *_: way)
    task = Task(config_dict(model), dimensions(config_dict(model)), 32, 32, optimizer, low, taught=False)
    with tempfile.TemporaryDirectory() as folder, Allocated(model) as allocated:
        run(model, Settings(2 * 1024, 1024, "next_token", 1.0, optimizer), Path(folder))
    assert footprint.training(task, way) == pytest.approx(allocated.peak, rel=0.1)


@pytest.mark.parametrize("way", [Way(), Way(4), Way(recompute=True)])
@pytest.mark.parametrize("weights", [Match(hidden=1.0), Match(attention=1.0), Match(hidden=1.0, attention=1.0)])
def test_so_does_one_whose_insides_are_drawn_to_the_teachers(weights, way, low, monkeypatch):
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 6, "head_dim": 16, "vocab_size": 320}
    base, student = (tiny_model("llama", intermediate_size=width, **shape) for width in (384, 192))
    plan = make_plan(config_dict(base), unscored(config_dict(base)), {"neuron": 192})
    monkeypatch.setattr(footprint, "choose", lambda *_: way)
    teaches, dims = teacher.Live(base), dimensions(config_dict(student))
    task = Task(config_dict(student), dims, 32, 32, "adamw", low, teaches.bytes, match=(weights, dimensions(config_dict(base))))
    settings = Settings(2 * 1024, 1024, "mixed", 1.0, "adamw")
    with (
        tempfile.TemporaryDirectory() as folder,
        matching.beside(base, student, plan, weights) as terms,
        Allocated(base, student) as allocated,
    ):
        run(student, settings, Path(folder), teacher=teaches, beside=terms)
    assert footprint.training(task, way) == pytest.approx(allocated.peak, rel=0.1)
    without = replace(task, match=None)
    assert footprint.training(without, way) < footprint.training(task, way)


def test_slower_ways_take_less():
    config = tiny_config("llama", vocab_size=8192, hidden_size=512, intermediate_size=2048).to_dict()
    task = Task(config, dimensions(config), 64, 512, "muon", False)
    ways = list(footprint.ways(task))
    assert ways[:2] == [Way(), Way(2)]
    assert ways[-1] == Way(64, recompute=True, bfloat16=True)
    assert all(64 // way.pieces * 512 >= footprint.SMALL_PIECE for way in ways if not way.recompute)
    whole, again, rounded = (footprint.training(task, Way(1, *way)) for way in ((), (True,), (True, True)))
    assert whole > again > rounded > footprint.training(task, ways[-1])
    for way in ways:
        there = round(footprint.training(task, way) / footprint.ROOM) + 1
        chosen = footprint.choose(task, there, "recover")
        assert ways.index(chosen) <= ways.index(way)
        assert footprint.training(task, chosen) <= there


def test_what_was_begun_in_one_type_goes_on_in_it():
    config = tiny_config("llama", vocab_size=8192, hidden_size=512, intermediate_size=2048).to_dict()
    task = Task(config, dimensions(config), 64, 512, "muon", False)
    least, plenty = round(footprint.training(task, list(footprint.ways(task))[-1]) / footprint.ROOM) + 1, 2**50
    assert footprint.choose(task, plenty, "recover", True) == Way(1, recompute=True, bfloat16=True)
    assert footprint.choose(task, plenty, "recover", False) == Way()
    in_float32 = replace(task, in_float32=True)
    for asked, there, rounded, code in ((task, least, False, "too_little_memory"), (in_float32, plenty, True, "cannot_go_on")):
        with pytest.raises(NarrowError) as caught:
            footprint.choose(asked, there, "recover", rounded)
        assert caught.value.code == code


def test_what_fits_in_no_way_is_refused_with_what_is_short():
    config = tiny_config("llama").to_dict()
    task = Task(config, dimensions(config), 4, 32, "muon", False)
    least = min(footprint.training(task, way) for way in footprint.ways(task))
    with pytest.raises(NarrowError, match=f"recover takes {least:,} bytes") as caught:
        footprint.choose(task, 1000, "recover")
    assert (caught.value.code, f"{least - 900:,} more" in str(caught.value)) == ("too_little_memory", True)


METHODS = {
    "plain": {},
    "much text": {"calibration_tokens": 10_000_000},
    "by gradients": {"importance": "fisher", "calibration_tokens": 1_000_000},
    "group lasso": {"regularizer": {}},
    "corrected": {"recover": {"correction": {"tokens": 4096}}},
    "cached": {"recover": {"cache": "hidden"}},
    "in pieces": {"recover": {"tokens": 10**6, "batch_tokens": 2**16}},
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_more_memory_never_does_worse(method, gpu):
    """A job is refused, then parks the base, then does not; and it fits where it is said that there is enough."""
    config = tiny_config("llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=128_256).to_dict()
    dims = dimensions(config)
    options = Options.model_validate({"budget": {"keep": {"neuron": 0.5}}, "method": method})
    asked = footprint.Job(config, options, dims, dims, replace(dims, width=4096))
    least, found = footprint.least(replace(asked, machine=Machine(gpu=gpu, low=gpu))), []
    for power in range(600):
        there = round(1e9 * 1.01**power)
        job = replace(asked, machine=Machine(there, there, gpu, gpu))
        job = replace(job, parked=footprint.parks(job))
        try:
            footprint.check(job)
            found.append(2 - job.parked)
        except NarrowError:
            found.append(0)
            assert footprint.ROOM * there < least
    assert found == sorted(found)
    assert {0, 2} <= set(found)


def test_where_the_limit_counts_what_is_mapped_so_does_the_plan():
    config = tiny_config("llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16).to_dict()
    dims = dimensions(config)
    options = Options.model_validate({"budget": {"keep": {"neuron": 0.5}}})
    job = footprint.Job(config, options, dims, dims, replace(dims, width=4096), parked=True)
    shut_in = replace(job, machine=Machine(mapped=True))
    file = 2 * footprint.counts(config, dims).all
    assert footprint.of_base(shut_in) - footprint.of_base(job) == file
    assert footprint.stages(shut_in)["load"] - footprint.stages(job)["load"] == file
    experts = tiny_config("mixtral").to_dict()
    dims = dimensions(experts)
    job = footprint.Job(experts, options, dims, dims, dims, parked=True)
    routed = 2 * dims.layers * dims.experts * 3 * dims.hidden * dims.width
    assert footprint.of_base(job) - footprint.held(experts, dims, True) == routed, "put together in memory"


def test_for_a_budget_of_latency_the_base_is_timed_and_never_parked():
    config = tiny_config("llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16).to_dict()
    dims = dimensions(config)
    job = footprint.Job(
        config, Options.model_validate({"budget": {"latency": 0.5}}), dims, dims, dims, machine=Machine(10**9, 10**9)
    )
    assert not footprint.parks(job)
    with pytest.raises(NarrowError, match="bytes of memory at least"):
        footprint.check(job)


def test_a_base_is_parked_before_weights_are_rounded_but_on_a_gpu():
    config = tiny_config("llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=48).to_dict()
    dims = dimensions(config)
    options = Options.model_validate({"budget": {"keep": {"neuron": 0.5}}, "method": {"refit": False}})
    job = footprint.Job(config, options, dims, dims, replace(dims, width=4096))
    task = footprint.trainings(job)["recover"]
    there = round(footprint.training(task, Way(1, recompute=True)) / footprint.ROOM) - 10**6
    assert footprint.parks(replace(job, machine=Machine(there, there)))
    assert not footprint.parks(replace(job, machine=Machine(there, there, gpu=True)))


@pytest.mark.slow
def test_beside_what_is_trained_only_its_teacher_is_in_memory(monkeypatch, tmp_path, tiny_folder, python_file, german_file):
    spec = {
        "base": {"path": tiny_folder},
        "target": {"path": python_file},
        "target_name": "python",
        "skills": [{"name": "german", "path": german_file, "role": "forget"}],
        "budget": {"keep": {"neuron": 0.5}},
        "method": {
            "calibration_tokens": 1024,
            "regularizer": {"tokens": 256},
            "recover": {"tokens": 256, "batch_tokens": 256, "correction": {"tokens": 256}},
        },
        "controls": ["random", "trained"],
        "relearn": {"tokens": 256},
        "block_tokens": 64,
        "skill_tokens": 2048,
        "export": ["safetensors"],
    }
    there, trained = [], train.train

    def counted(*args, phase, **kwargs):
        there.append((phase, sum(type(thing).__name__ == "LlamaForCausalLM" for thing in gc.get_objects())))
        return trained(*args, phase=phase, **kwargs)

    gc.collect()
    before = sum(type(thing).__name__ == "LlamaForCausalLM" for thing in gc.get_objects())
    monkeypatch.setattr(train, "train", counted)
    pipeline.run(CompressionSpec.model_validate(spec), tmp_path, lambda *_: None)
    assert [(phase, count - before) for phase, count in there] == [
        ("sparsify", 1),
        ("correct", 1),
        ("recover", 2),
        ("controls", 1),
        *3 * [("relearn", 1)],
    ]


def test_a_job_that_cannot_train_here_is_refused_at_its_start(tiny_folder, python_file, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda device: 2**20)
    monkeypatch.setattr(footprint, "resting", lambda job: {})
    spec = {
        "base": {"path": tiny_folder},
        "target": {"path": python_file},
        "budget": {"parameters": 0.85},
        "target_name": "python",
    }
    told = []
    with pytest.raises(NarrowError, match="Training in recover takes"):
        pipeline.run(CompressionSpec.model_validate(spec), tmp_path, lambda kind, phase, *_: told.append((kind, phase)))
    assert told == [("started", "load")]


def test_the_dry_run_tells_memory_by_stage_and_what_the_job_can_be_done_in():
    config = tiny_config("llama", vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8).to_dict()
    asked = {"budget": {"keep": {"neuron": 0.5}}, "method": {"recover": {"batch_tokens": 65536}, "regularizer": {}}}
    sizes = plan_sizes(config, Options.model_validate(asked))
    assert sizes.memory_bytes == max(sizes.memory.values()) == sizes.memory["sparsify"]
    assert {"load", "score", "reconstruct", "recover", "export"} < sizes.memory.keys()
    assert sizes.least_memory_bytes < 0.7 * sizes.memory_bytes
    without = plan_sizes(config, Options.model_validate({**asked, "method": {"recover": {"tokens": 0}}}))
    assert not {"sparsify", "recover"} & without.memory.keys()


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="Linux tells it")
def test_the_peak_is_that_since_it_was_last_asked_for():
    cpu = torch.device("cpu")
    before = memory.begin(cpu)
    held = torch.ones(2**26)
    most = memory.peak(cpu, before)
    del held
    before = memory.begin(cpu)
    assert memory.peak(cpu, before) < most - 2**27


def test_where_the_peak_cannot_be_forgotten_only_a_new_one_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    cpu = torch.device("cpu")
    assert len(b"x" * 2**27) == 2**27  # the peak is far above what comes after
    before = memory.begin(cpu)
    assert before > 2**25
    assert memory.peak(cpu, before) is None
    assert memory.peak(cpu, before - 1) == before
