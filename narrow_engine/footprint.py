"""How much memory each stage of a job takes at its peak, and how training is done where it is little. From configs; no torch.

A step of training holds weights, optimizer states and, by its end, gradients; in the forward pass the activations that the
backward pass reads; around the loss the logits of a chunk of positions and the gradient of the head. Activations are counted by
what autograd keeps of each kind of tensor in a layer (`kept_per_token`, held against real models by
tests/unit/test_footprint.py), and all of it against measured runs by bench/memory.py (docs/explanation/memory.md).

The dry run tells what is predicted here, and training chooses by it (`choose`): the same numbers, so what was promised is done.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, family_of, present, tensor_shapes
from narrow_engine.spec import ROUNDED, Format, Options, controls, taught

ROOM = 0.9
"""Share of the memory that may be filled, by predictions that are within a tenth of what is measured."""
FIXED = 380 * 2**20
"""What a process has of libraries and code before any model."""
READING = 160 * 10**6
"""What reading and tokenizing text takes beside the base, of the text no more than that."""
SMALL_PIECE = 4096
"""Tokens of a piece of a batch, below which matrix products lose speed: recomputing comes first."""
CHUNK, GPU_LOGITS = 256, 2**27
"""Positions whose logits exist at once on a CPU (128 to 256 measured fastest at a vocabulary of 8,192); how many logits on a GPU,
where each chunk adds to the head's whole gradient, which few positions are not worth."""
LOGITS = {False: 3, True: 6}
"""Arrays of the size of a chunk's logits that the loss has at its peak, measured: the distribution and what is being made of it;
with a teacher both distributions, their ratio, and what is being made of them."""
STACK = 2**24
"""Numbers that Muon iterates on together, but for a larger matrix. The iteration holds five arrays of them."""
NEWTON_STEPS, BLOCK = 5, 512
"""Of Muon's iteration; and rows of a matrix that are orthogonalised together. FLOPs go with their number: whole matrices of a
model of 8 billion parameters would take nearly five times as many as the forward and backward pass of 2,048 tokens, taught."""
DROPPED = 3
"""Numbers of every pair of positions in every head that attention keeps where it has dropout, which is not fused on a CPU."""
PIECE = 2**22
"""Numbers that exist in float32 at a time where they are rounded by chance (`rounding`), in six arrays."""

MEASURED, REFIT_BATCH, REFIT_BATCHES = 4096, 4096, 8
"""Tokens of a batch that is measured, and of one that the refit reads, at most; and batches that the refit reads, at least."""
STREAMS, EXPERT_STREAMS = 3, 5
"""Arrays of the size of a stream that the refit holds of all its tokens."""
SCORED, VALUES = 8, 2**26
"""Blocks of a batch that is scored, and numbers that its taps hold, at most (`importance.statistics`)."""
ORDER = (
    *("load", "measure_base", "score", "sparsify", "slice", "reconstruct"),
    *("correct", "recover", "controls", "measure", "export"),
)


@dataclass(frozen=True)
class Way:
    """How a step is done. The plain way is the fastest."""

    pieces: int = 1
    """Parts of a batch that are run one after the other; their gradients are added up."""
    recompute: bool = False
    """Whether the backward pass computes each layer's activations again."""
    bfloat16: bool = False
    """Whether weights, gradients and optimizer states are bfloat16, rounded by chance."""


@dataclass(frozen=True)
class Task:
    """A training: the model, blocks in a batch and their length, the optimizer, whether products run in bfloat16, what else takes
    memory (`beside`: other models, libraries), and how many processes share the training."""

    config: dict[str, Any]
    dims: Dimensions
    rows: int
    length: int
    optimizer: str
    low: bool
    beside: int = 0
    processes: int = 1
    gpu: bool = False
    taught: bool = True
    """Whether there is a teacher."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: in one layer, outside the layers, and of both those in matrices of layers, which Muon takes."""

    layer: int
    outer: int
    layers: int
    layer_matrices: int
    largest_matrix: int
    """Of a layer; of experts, one."""
    muon_flops: float
    """That a step of Muon takes for the matrices of a layer."""

    @property
    def all(self) -> int:
        return self.outer + self.layers * self.layer


def positions(vocabulary: int, gpu: bool) -> int:
    """Of a chunk whose logits exist at once."""
    return max(CHUNK, GPU_LOGITS // vocabulary) if gpu else CHUNK


def _logits(vocabulary: int, gpu: bool, taught: bool) -> int:
    return LOGITS[taught] * 4 * positions(vocabulary, gpu) * vocabulary


def counts(config: dict[str, Any], dims: Dimensions) -> Counts:
    prefix = family_of(config).layers + "."
    one_layer = tensor_shapes(config, replace(dims, layers=1))
    sizes = {name: math.prod(shape) for name, shape in one_layer.items()}
    own = [name for name in sizes if name.startswith(prefix)]
    matrices = [name for name in own if len(one_layer[name]) > 1]
    return Counts(
        layer=sum(sizes[name] for name in own),
        outer=sum(size for name, size in sizes.items() if name not in own),
        layers=dims.layers,
        layer_matrices=sum(sizes[name] for name in matrices),
        largest_matrix=max(math.prod(one_layer[name][-2:]) for name in matrices),
        muon_flops=sum(_muon_flops(one_layer[name]) for name in matrices),
    )


def _muon_flops(shape: tuple[int, ...]) -> float:
    """X Xᵀ, its square and their product with X, of each block of rows."""
    rows, columns = sorted(shape[-2:])
    block = rows / -(-rows // BLOCK)
    return NEWTON_STEPS * math.prod(shape[:-2]) * rows * block * (4.0 * columns + 2.0 * block)


def training(task: Task, way: Way) -> int:
    """Bytes of a process at the peak of training."""
    dims = task.dims
    n = counts(task.config, dims)
    size = 2 if way.bfloat16 else 4
    tokens = math.ceil(task.rows / (way.pieces * task.processes)) * task.length
    low = task.low

    matrices = n.layers * n.layer_matrices if task.optimizer == "muon" else 0
    states = size * (matrices + 2 * (n.all - matrices))
    weights = gradients = size * n.all
    held, extra = (weights + states) // task.processes, 0
    if task.processes > 1:
        # The whole model waits on the CPU; a layer and the next, and all that is outside of layers, are gathered.
        extra = size * (n.all + 2 * n.outer + 2 * n.layer)
        gradients //= task.processes
    before = gradients if way.pieces > 1 else 0

    one, outside = kept_per_token(task.config, dims, task.length, low)
    layers = tokens * n.layers * (4 * dims.hidden if way.recompute else one)
    again = tokens * one if way.recompute else 0
    activations = layers + tokens * outside
    # Copies of the weights in the type of the products: of all layers, or of the one that runs.
    copies = 2 * n.layers * n.layer if low and not way.bfloat16 else 0
    running = 8 * n.layer if way.bfloat16 and not low else 0
    head = dims.vocab * dims.hidden
    head_copy = (2 if low else 4) * head if low != way.bfloat16 else 0
    logits = _logits(dims.vocab, task.gpu, task.taught)
    said = 2 * tokens * dims.hidden * (2 if low else 4)

    backward = 4 * tokens * (3 * dims.active * dims.width + 2 * dims.hidden)
    forward_end = (
        before
        + activations
        + max(
            copies,
            said + head_copy + 4 * head + logits,
            # What a layer keeps goes as its gradients come.
            said + size * head + max(again, again // 2 + backward) + running,
        )
    )
    backward_end = gradients + size * head + again // 2 + running
    iteration = (
        max(5 * 4 * STACK, 5 * (2 if low else 4) * n.largest_matrix + 4 * n.largest_matrix) if task.optimizer == "muon" else 0
    )
    # An orthogonalisation is over when what came of it is rounded.
    rounding = min(6 * 4 * PIECE, 24 * max(head, n.largest_matrix)) if way.bfloat16 else 0
    stepping = gradients + max(min(iteration, 4 * 4 * n.layers * n.layer_matrices), rounding)
    return task.beside + held + extra + max(forward_end, backward_end, stepping)


def kept_per_token(config: dict[str, Any], dims: Dimensions, length: int, low: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a token: in a layer, and outside the layers. With products in bfloat16 what they read and
    make has half of the size; the stream and norms do not."""
    family = family_of(config)
    tensors = present(family.layer_tensors, family, config)
    hidden, q, kv, part = dims.hidden, dims.axis("q"), dims.axis("kv"), 0.5 if low else 1.0
    axes, names = {axis for tensor in tensors for axis in tensor.axes}, {tensor.name for tensor in tensors}
    norms = [tensor for tensor in tensors if tensor.is_norm and tensor.axes == ("hidden",)]
    fused_norms = not norms or any(tensor.name.removesuffix("weight") + "bias" in names for tensor in norms)
    # What two projections read, and what norms are made of: LayerNorm is one operation, RMSNorm is two.
    floats: float = 2 * hidden + (1 if fused_norms else 2) * (len(norms) or 2) * hidden
    # Queries, keys, values, and what attention makes; of fused projections what they were cut out of as well.
    floats += part * (2 * q + 2 * kv)
    if "q_k_v" in axes:
        floats += part * (2 * q + kv)
    if "qkv" in axes:
        floats += part * (q + kv)
    if family.qk_normed:
        floats += (1 + part) * (q + kv)
    dropout = any(config.get(key) for key in ("attention_dropout", "attn_pdrop"))
    floats += (DROPPED if dropout else family.pairs) * dims.heads * length
    if family.router:
        floats += dims.active * (4 * dims.width + 2 * hidden) + 4 * dims.shared + (hidden if dims.shared else 0)
    else:
        gated = any(f"{family.mlp}.gate" in name for name in names)
        composed = 3 if config.get("activation_function") == "gelu_new" else 0
        floats += part * (4 if gated else 2 + composed) * dims.width
    return round(4 * (floats + dims.heads)), 4 * 4 * hidden


def ways(rows: int, length: int, may_round: bool) -> Iterator[Way]:
    """From the fastest to the one that takes the least memory."""
    halved = [1]
    while halved[-1] < rows:
        halved.append(min(rows, 2 * halved[-1]))
    for pieces in halved:
        if pieces == 1 or math.ceil(rows / pieces) * length >= SMALL_PIECE:
            yield Way(pieces)
    for rounded in (False, True) if may_round else (False,):
        for pieces in halved:
            yield Way(pieces, recompute=True, bfloat16=rounded)


def choose(task: Task, there: int, phase: str, may_round: bool, rounded: bool | None = None) -> Way:
    """The fastest way that fits into the memory that there is, of those whose weights are bfloat16 or not if `rounded` says.
    Raises NarrowError (too_little_memory, cannot_go_on)."""
    found = [
        way for way in ways(math.ceil(task.rows / task.processes), task.length, may_round) if rounded in (None, way.bfloat16)
    ]
    if not found:
        raise NarrowError(
            "cannot_go_on",
            f"Training in {phase} was begun in bfloat16, which takes one process: let one go on, or begin anew elsewhere.",
        )
    for way in found:
        if training(task, way) <= ROOM * there:
            return way
    least = min(training(task, way) for way in found)
    raise NarrowError(
        "too_little_memory",
        f"Training in {phase} takes {least:,} bytes of memory at least, {round(least - ROOM * there):,} more than the "
        f"{round(ROOM * there):,} that may be filled of {there:,}: lower block_tokens or the budget"
        ", or take a machine with more.",
    )


def told(task: Task, way: Way, there: int) -> list[tuple[str, str]]:
    """What is not done in the plain way, as codes and sentences."""
    plain = training(task, Way())
    found = []
    for code, chosen, sentence in (
        (
            "micro_batches",
            way.pieces > 1,
            f"each batch is taken in {way.pieces} parts whose gradients are added up, which gives the same result",
        ),
        (
            "recomputed",
            way.recompute,
            "activations are computed again in the backward pass, which gives the same result about a third later",
        ),
        (
            "bfloat16",
            way.bfloat16,
            "weights, gradients and momenta are in bfloat16 and rounded by chance, which costs a little of the loss",
        ),
    ):
        if chosen:
            found.append((code, f"Of {there / 1e9:.1f} GB of memory plain training would take {plain / 1e9:.1f}: {sentence}."))
    return found


@dataclass(frozen=True)
class Job:
    """What a job's stages have to do with: the base's config; its lengths as it was brought, with its vocabulary trimmed, and
    cut; bytes of the teacher, where it is not the base; and the kind of device."""

    config: dict[str, Any]
    options: Options
    whole: Dimensions
    base: Dimensions
    small: Dimensions
    teacher: int = 0
    low: bool = False
    gpu: bool = False
    """Whose memory is not the host's, where libraries and streams are."""
    parked: bool = False
    """Whether the weights of the base's layers stay in their file (`parked`)."""

    @property
    def fixed(self) -> int:
        return 0 if self.gpu else FIXED


def held(config: dict[str, Any], dims: Dimensions, parked: bool) -> int:
    """Bytes of a base: of all its weights, or of one layer's and of those outside of layers."""
    n = counts(config, dims)
    return 4 * (n.outer + n.layer if parked else n.all)


def trainings(job: Job) -> dict[str, Task]:
    """The stages that train, and how."""
    method, length = job.options.method, job.options.block_tokens
    rows = max(1, method.recover.batch_tokens // length)
    base = held(job.config, job.base, job.parked)

    def task(dims: Dimensions, optimizer: str, beside: int, by_teacher: bool = False) -> Task:
        return Task(job.config, dims, rows, length, optimizer, job.low, job.fixed + beside, gpu=job.gpu, taught=by_teacher)

    found = {}
    if method.regularizer:
        found["sparsify"] = task(job.base, "adamw", base)
    if taught(method) and method.recover.correction:
        found["correct"] = task(job.base, method.recover.optimizer, 2 * base)
    if method.recover.tokens:
        beside = 0 if method.recover.cache else base + (job.teacher if taught(method) else 0)
        found["recover"] = task(job.small, method.recover.optimizer, beside, taught(method))
    if "trained" in controls(job.options):
        found["controls"] = task(job.base, method.recover.optimizer, 2 * base)
    return found


def stages(job: Job) -> dict[str, int]:
    """Bytes of the process at the peak of each stage that matters, with training done in the plain way."""
    method, dims, small = job.options.method, job.base, job.small
    whole, base = (held(job.config, d, job.parked) for d in (job.whole, dims))
    cut = held(job.config, small, False)
    # Beside the base as it came, which shares its layers.
    trimmed = 4 * dims.vocab * dims.hidden if job.whole.vocab != dims.vocab else 0
    layer = 4 * counts(job.config, dims).layer
    found = {
        "load": job.fixed + whole + READING,
        "measure_base": job.fixed + whole + trimmed + _forward(job.whole, MEASURED, job.gpu),
        "score": job.fixed + base + _scoring(job),
        "slice": job.fixed + base + layer + cut,
        "reconstruct": job.fixed + base + cut + _refit(job) if method.refit else 0,
        "measure": job.fixed + base + (1 if job.gpu else 2) * cut + _forward(dims, MEASURED, job.gpu, 2 if job.gpu else 3),
        "export": job.fixed + exporting(job.options.export, base, cut, job.gpu),
    }
    for name, task in trainings(job).items():
        found[name] = training(task, Way())
    return {name: found[name] for name in ORDER if found.get(name)}


def exporting(forms: Sequence[Format], base: int, cut: int, gpu: bool = False) -> int:
    """The model, and on the host a copy to save, or in other formats the file's weights, its graph and what runs it; and the base
    where what rounding keeps is measured. `base` and `cut` are bytes of the models."""
    copies = 1 if gpu else 2 if set(forms) <= {"safetensors"} else 4
    return (base if set(forms) & set(ROUNDED) else 0) + copies * cut


def _forward(dims: Dimensions, tokens: int, gpu: bool, models: int = 1) -> int:
    """A pass without gradients: what a layer holds, each model's hidden states, and the logits of a chunk."""
    layer = tokens * (3 * dims.active * dims.width + 6 * dims.hidden)
    return 4 * (layer + models * tokens * dims.hidden) + _logits(dims.vocab, gpu, True)


def _scoring(job: Job) -> int:
    """The stream of all tokens, for gradients before every layer; a layer's activations; and second moments and what one
    elimination takes, where the criterion asks for them."""
    method, dims, length = job.options.method, job.base, job.options.block_tokens
    gradients = method.importance in ("fisher", "attribution")
    streams = 4 * method.calibration_tokens * dims.hidden * ((dims.layers + 1) if gradients else 1)
    rows = max(1, min(SCORED, VALUES // ((dims.active * dims.width + dims.axis("q") + 2 * dims.hidden) * length)))
    batch = 4 * rows * length * (4 * dims.active * dims.width + 2 * dims.axis("q") + 6 * dims.hidden)
    if gradients:
        batch += rows * length * sum(kept_per_token(job.config, dims, length, job.low)) + _logits(dims.vocab, job.gpu, False)
    squares = 0
    if method.importance == "reconstruction":
        widest = max(dims.width, dims.axis("q"))
        squares = 8 * (dims.experts * dims.width**2 + dims.axis("q") ** 2 + 4 * widest**2 + 2 * widest * dims.hidden)
    return (0 if job.gpu else streams) + max(batch, squares)


def refit_batch(tokens: int) -> int:
    """Tokens of a batch that the refit reads, of so many in all; whole blocks of it are taken."""
    return max(1, min(REFIT_BATCH, tokens // REFIT_BATCHES))


def _refit(job: Job) -> int:
    """The calibration tokens' streams in both models, a layer's second moments and their solution, and the layer's training."""
    method, dims, small = job.options.method, job.base, job.small
    tokens, n = method.calibration_tokens, counts(job.config, job.small)
    batch = refit_batch(tokens)
    kept, _ = kept_per_token(job.config, small, job.options.block_tokens, job.low)
    solving = 8 * (4 * max(small.width, small.axis("q")) ** 2 + 3 * small.width * small.hidden)
    layer = (
        4 * 5 * n.layer
        + batch * (kept + 4 * (3 * small.active * small.width + 2 * small.hidden))
        + min(5 * 4 * STACK, 24 * n.layer_matrices)
    )
    streams = 4 * (EXPERT_STREAMS if dims.experts > 1 else STREAMS) * tokens * dims.hidden
    return (0 if job.gpu else streams) + max(solving, layer)


def check(job: Job, there: int) -> None:
    """Whether each training has a way that fits into the memory that there is. Raises NarrowError (too_little_memory)."""
    for name, task in trainings(job).items():
        choose(task, there, name, name != "sparsify")


def least(job: Job) -> int:
    """Bytes of the job at its peak where training is done in whatever way takes the least, and the base is parked."""
    job = replace(job, parked=True)
    found = stages(job)
    for name, task in trainings(job).items():
        found[name] = min(training(task, way) for way in ways(task.rows, task.length, name != "sparsify"))
    return max(found.values())
