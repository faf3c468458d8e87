"""No tensor is left on the CPU where the model is on a GPU, without a GPU.

`OnGpu` stands for a tensor there. It says so, computes on the CPU what it is asked for, and refuses to meet a tensor that is not
one, as CUDA does. The device that it tells is "meta", since that is one that torch takes gradients on in every build. Kernels,
types and autocast are those of a CPU: what a GPU lacks shows on a GPU alone.
"""

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import multiply_in, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from narrow_engine import footprint, importance, muon, parked, reconstruct, rounding, shard, skills, stages, teacher, train
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.errors import NarrowError
from narrow_engine.matching import beside
from narrow_engine.models import along, config_dict, greedy
from narrow_engine.plan import make_plan, unscored
from narrow_engine.regularize import GroupLasso
from narrow_engine.slice import compare, slice_model
from narrow_engine.spec import Criterion, Match

GPU = torch.device("meta")
OPS = torch.ops.aten
MEET = {OPS.copy_.default, OPS._to_copy.default}
"""What takes tensors of both."""
INDEX = {OPS.index.Tensor, OPS._unsafe_index.Tensor, OPS.index_put.default, OPS.index_put_.default, OPS._index_put_impl_.default}
"""Whose second argument may be on the CPU."""
TENSOR = torch.tensor
TOKENS = np.random.default_rng(0).integers(0, 320, 2000).astype(np.uint32)


class OnGpu(torch.Tensor):
    is_meta, is_cuda = False, True
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **shape, dtype=held.dtype, device=GPU)
        made.held = held
        return made

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGpu(inner["held"])

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, index):
        return super().__getitem__(listed(index))

    def __setitem__(self, index, value):
        super().__setitem__(listed(index), value)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def listed(index):
    """Lists as tensors: torch makes such ones of them where the tensor is, and here that would be nowhere."""
    if isinstance(index, tuple):
        return tuple(map(listed, index))
    return TENSOR(list(index), dtype=torch.int64) if isinstance(index, list | range) else index


def compute(operation, args, kwargs):
    given = [arg for number, arg in enumerate(args) if number != 1 or operation not in INDEX]
    tensors = [leaf for leaf in tree_leaves((given, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, OnGpu) for tensor in tensors)
    left = [tuple(t.shape) for t in tensors if not isinstance(t, OnGpu) and t.dim()]
    if there and left and operation not in MEET:
        raise RuntimeError(f"{operation} on the GPU is given a tensor on the CPU, {left}")
    if "device" in kwargs:
        there = kwargs["device"] == GPU
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held = [tree_map(lambda leaf: leaf.held if isinstance(leaf, OnGpu) else leaf, part) for part in (args, kwargs)]
    made = operation(*held[0], **held[1])
    if operation is OPS.copy_.default and not isinstance(args[0], OnGpu):
        return args[0]
    if there:
        made = tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, torch.Tensor) else leaf, made)
        if any(isinstance(leaf, OnGpu) for leaf in tree_leaves(args)):
            return return_and_correct_aliasing(operation, args, kwargs, made)
    return made


class Computing(TorchDispatchMode):
    """What is made on the GPU is made by `compute` as well."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Making(TorchFunctionMode):
    """`torch.tensor(..., device=...)` makes a tensor on the CPU and moves it, which is not seen elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is TENSOR and kwargs.get("device") == GPU:
            return function(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return function(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """Within, GPU is a device like CUDA's."""
    multiply_in(monkeypatch, torch.float32)
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled=True, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with Computing(), Making():
        yield


def moved(model):
    """The model, on the GPU."""
    parked.bring(model.modules(), torch.empty(0, device=GPU))
    return model


BLOCKS = Blocks(TOKENS, 16, 0, again=True)
DOCUMENTS = Documents(TOKENS[:120], np.array([0, 30, 90, 120]), np.arange(3, dtype=np.uint64))


def base(family="llama"):
    """Two layers, whose experts, if there are any, are computed one by one."""
    made = tiny_model(family, num_hidden_layers=2, intermediate_size=16)
    if family == "mixtral":
        made.set_experts_implementation("eager")
    return moved(made)


def trained(model, folder, steps=1, **options):
    """The curve, and what of the settings is not its own is for the loop."""
    own = {name: options.pop(name) for name in ("objective", "divergence", "on_policy", "optimizer") if name in options}
    return train.train(
        model,
        BLOCKS,
        train.Settings(32 * steps, 32, **own),
        phase="recover",
        folder=folder,
        emit=lambda *_: None,
        check=lambda: None,
        validate=lambda model: skills.loss_of(model.eval(), DOCUMENTS, 16),
        **options,
    )


def test_a_tensor_that_is_left_behind_is_found(gpu):
    model = moved(tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(RuntimeError, match=r"embedding.* is given a tensor on the CPU, \[\(1, 4\)\]"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"add.* is given a tensor on the CPU"):
        model.lm_head.weight + torch.ones(32)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=GPU)).logits.device == GPU


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training(gpu, tmp_path, optimizer):
    """By next token, and on from a checkpoint."""
    model = base()
    trained(model, tmp_path, optimizer=optimizer)
    parameters = dict(model.named_parameters())
    optimizers = train._optimizers(model, train.Settings(32, 32, optimizer=optimizer))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=GPU)).logits.sum().backward()
    for each in optimizers:
        each.step()
    train._save(tmp_path / "checkpoint.safetensors", 1, parameters, optimizers, None, [])
    curve = trained(model, tmp_path, 2, optimizer=optimizer)
    assert curve[-1].tokens == 64
    assert isinstance(model.lm_head.weight, OnGpu)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"])
def test_distillation(gpu, tmp_path, divergence):
    whole = base()
    trained(slice_model(whole, cut(whole)), tmp_path, objective="mixed", divergence=divergence, teacher=teacher.Live(whole))


def test_distillation_on_its_own_text_and_layer_by_layer(gpu, tmp_path):
    whole = base()
    live, plan = teacher.Live(whole, torch.arange(320)), cut(whole)
    trained(slice_model(whole, plan), tmp_path, objective="distill", on_policy=1.0, teacher=live)
    small = slice_model(whole, plan)
    with beside(whole, small, plan, Match(hidden=1.0, attention=1.0)) as terms:
        (tmp_path / "again").mkdir()
        trained(small, tmp_path / "again", objective="distill", teacher=live, beside=terms)


@pytest.mark.parametrize("top", [None, 8])
def test_distillation_from_what_was_written_down(gpu, tmp_path, top):
    whole = base()
    for name in ("work", "cache", "run"):
        (tmp_path / name).mkdir()
    teacher.write(tmp_path / "cache", tmp_path / "work", teacher.Live(whole), BLOCKS, 2, top, 1.0, lambda *_: None)
    told = teacher.Cached(tmp_path / "cache", BLOCKS, GPU)
    trained(slice_model(whole, cut(whole)), tmp_path / "run", objective="mixed", teacher=told)


def test_training_where_memory_is_short(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "choose", lambda *_: footprint.Way(2, recompute=True))
    trained(base(), tmp_path)


@pytest.mark.parametrize("kind", [rounding.AdamW, muon.Muon])
def test_steps_in_bfloat16(gpu, kind):
    weight = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16, device=GPU))
    weight.grad = torch.ones(4, 6, dtype=torch.bfloat16, device=GPU)
    optimizer = kind([weight], lr=0.1, **({"betas": (0.9, 0.95)} if kind is rounding.AdamW else {}))
    for _ in range(2):
        optimizer.step()


def test_group_lasso(gpu, tmp_path):
    model = base()
    lasso = GroupLasso(along(model, "width"), torch.rand(2, 16).to(GPU), 0.5, 2)
    trained(model, tmp_path, 2, after_step=lasso)
    assert lasso.sparsity == 0.5
    lasso.restore({name: value.cpu() for name, value in lasso.state().items()})


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        *(("llama", criterion) for criterion in ("reconstruction", "fisher", "activation", "magnitude")),
        *(("mixtral", criterion) for criterion in ("fisher", "activation")),
    ],
)
def test_scores(gpu, family, criterion: Criterion):
    model = base(family)
    gradients = criterion in importance.NEEDS_GRADIENTS
    found = importance.collect(model, BLOCKS, 32, gradients, lambda *_: None, criterion in importance.NEEDS_GRAMS)
    scores = importance.CRITERIA[criterion](model, found, 0)
    scores["residual"] = importance.residual.score(model, BLOCKS, 32, criterion, lambda *_: None)
    assert scores["neuron"].isfinite().all()


def cut(model):
    """Of everything a little."""
    config = config_dict(model)
    keep = {"layer": 1, "residual": 24, "neuron": 8, "kv_group": 1}
    return make_plan(config, unscored(config), keep | ({"expert": 3} if model.config.model_type == "mixtral" else {}))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_cut_its_proof_and_its_refit(gpu, family):
    whole = base(family)
    plan = cut(whole)
    small = slice_model(whole, plan)
    if whole.config.model_type == "mixtral":
        small.set_experts_implementation("eager")
    assert compare(whole, small, BLOCKS.batch(0, 2).to(GPU), plan=plan).relative_error < 1e-4
    reconstruct.refit(whole, small, plan, BLOCKS, 64, lambda *_: None, passes=1)
    measured = skills.measure(whole, [small], DOCUMENTS, 16, lambda *_: None)
    assert all(np.isfinite(found.loss).all() for found in measured)
    assert len(greedy(small, BLOCKS.batch(0, 1)[:, :8].to(GPU), 2)) == 2


def test_a_gpu_that_torch_does_not_find_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(stages, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(stages, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stages._tell_unused_gpu(SimpleNamespace(emit=lambda *event: said.append(event[3]["code"])))
    assert said == []
    for name in ("nvidiactl", "nvidia0"):
        (tmp_path / name).touch()
    stages._tell_unused_gpu(SimpleNamespace(emit=lambda *event: said.append(event[3]["code"])))
    assert said == ["gpu_not_used"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stages._tell_unused_gpu(SimpleNamespace(emit=lambda *event: said.append(event[3]["code"])))
    assert said == ["gpu_not_used"], "somebody wants it so"


def test_each_process_has_a_gpu_or_says_so(monkeypatch):
    monkeypatch.setattr(shard, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(NarrowError, match="Each of 2 processes takes a GPU, and there are 1") as raised, shard.processes():
        pass
    assert raised.value.code == "too_few_gpus"
