"""How much memory each stage of a job takes at its peak, and how training is done where it is little. From configs; no torch.

A step of training holds weights, optimizer states and, by its end, gradients; in the forward pass the activations that the
backward pass reads; around the loss the logits of a chunk of positions and the gradient of the head. Activations are counted by
what autograd keeps of each kind of tensor in a layer (`kept_per_token`, held against real models by
tests/unit/test_footprint.py), and all of it against measured runs by bench/memory.py (docs/explanation/memory.md).

The dry run tells what is predicted here, and training chooses by it (`choose`): the same numbers, so what was promised is done.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, dimensions, family_of, present, tensor_shapes
from narrow_engine.model_files import DTYPES
from narrow_engine.spec import ROUNDED, Criterion, Format, Match, Options, Role, chooses, controls, leaves_a_choice, taught

ROOM = 0.9
"""Share of the memory that may be filled, by predictions that are within a tenth of what is measured."""
FIXED = 420 * 2**20
"""What a process has of libraries and code beside any model; some of it comes as a run goes on."""
READING = 120 * 10**6
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
"""Numbers that Muon iterates on together, but for a larger matrix."""
NEWTON_STEPS, BLOCK = 5, 512
"""Of Muon's iteration; and rows of a matrix that are orthogonalised together. FLOPs go with their number: whole matrices of a
model of 8 billion parameters would take nearly five times as many as the forward and backward pass of 2,048 tokens, taught."""
DROPPED = 3
"""Numbers of every pair of positions in every head that attention keeps where it has dropout, which is not fused on a CPU."""
PIECE = 2**22
"""Numbers that exist in float32 at a time where they are rounded by chance (`rounding`), in six arrays."""

MEASURED, REFIT_BATCH, REFIT_BATCHES = 4096, 4096, 8
"""Tokens of a batch that is measured, and of one that the refit reads, at most; and batches that the refit reads, at least."""
PROBED = 128
"""Tokens that two forms of a model are compared on, by four arrays of their logits."""
STREAMS, EXPERT_STREAMS = 3, 5
"""Arrays of the size of a stream that the refit holds of all its tokens."""
LARGE, KEPT = 1 / 32, 1 / 8
"""Of the host's memory: an array of streams that is larger is in a mapped file; and what the streams before all layers may take,
where gradients go back through them, of as many tokens as go through together (`layerwise`)."""
SHARED_TOKENS = 8192
"""Of each skill, that its units are scored by to see what skills share, in two halves; half as many show what a cut costs."""
SCORED, VALUES = 8, 2**26
"""Blocks of a batch that is scored, and numbers that its taps hold, at most (`importance.statistics`)."""
ORDER = (
    *("load", "measure_base", "score", "allocate", "sparsify", "slice", "reconstruct", "correct", "teach"),
    *("recover", "controls", "measure", "locality", "relearn", "export"),
)


@dataclass(frozen=True)
class Machine:
    """What a job runs on."""

    memory: int = sys.maxsize
    """Bytes of the device's, where models are."""
    host: int = sys.maxsize
    """Bytes of main memory: the same, but on a GPU."""
    gpu: bool = False
    low: bool = False
    """Whether training multiplies in bfloat16."""
    processes: int = 1
    """That share recovery, each of which takes a GPU or its part of the main memory."""
    mapped: bool = False
    """Whether what is mapped of files counts, as it does where the limit is of a process's data (RLIMIT_DATA)."""

    @property
    def fixed(self) -> int:
        """Bytes of a process on the device beside any model."""
        return 0 if self.gpu else FIXED

    def each(self, processes: int) -> int:
        """Bytes that each of some processes may have."""
        return self.memory if self.gpu else self.memory // processes


UNKNOWN = Machine()


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
    match: tuple[Match, Dimensions] | None = None
    """What draws the model's insides to the teacher's, and the teacher's lengths."""
    in_float32: bool = False
    """Whether weights must be float32: group lasso shrinks them by less than bfloat16 holds. Several processes do not round."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: in one layer, outside the layers, and in the matrices of a layer, which Muon takes."""

    layer: int
    outer: int
    layers: int
    matrices: dict[tuple[int, int], tuple[int, int]]
    """Of a layer, by their shorter and longer side: numbers in all and in one of them; of experts, one."""
    muon_flops: float
    """That a step of Muon takes for the matrices of a layer."""

    @property
    def layer_matrices(self) -> int:
        return sum(layer for layer, _ in self.matrices.values())

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
    shapes: dict[tuple[int, int], tuple[int, int]] = {}
    for name in matrices:
        shorter, longer = sorted(one_layer[name][-2:])
        shapes[shorter, longer] = shapes.get((shorter, longer), (0, 0))[0] + sizes[name], shorter * longer
    return Counts(
        layer=sum(sizes[name] for name in own),
        outer=sum(size for name, size in sizes.items() if name not in own),
        layers=dims.layers,
        matrices=shapes,
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

    one, outside = kept_per_token(task.config, dims, task.length, low, bool(task.match and task.match[0].attention))
    drawn, heard = _drawn(task, way)
    layers = tokens * n.layers * ((4 * dims.hidden if way.recompute else one) + drawn)
    again = tokens * one if way.recompute else 0
    activations = layers + tokens * outside
    # Copies of the weights in the type of the products, of all layers, which the backward pass reads; where it computes again
    # only the forward pass has them.
    copies = 2 * n.layers * n.layer if low and not way.bfloat16 else 0
    read_again = 0 if way.recompute else copies
    running = 8 * n.layer if way.bfloat16 and not low else 0
    head = dims.vocab * dims.hidden
    head_copy = (2 if low else 4) * head if low != way.bfloat16 else 0
    logits = _logits(dims.vocab, task.gpu, task.taught)
    said = 2 * tokens * dims.hidden * (2 if low else 4)

    backward = 4 * tokens * ((1.5 if low else 3) * dims.active * dims.width + 2 * dims.hidden)
    forward_end = (
        before
        + activations
        + read_again
        + max(
            copies - read_again,
            tokens * heard,
            said + head_copy + 4 * head + logits,
            # What a layer keeps goes as its gradients come.
            said + size * head + max(again, again // 2 + backward) + running,
        )
    )
    backward_end = gradients + size * head + again // 2 + running
    iteration = _iteration(n, low) if task.optimizer == "muon" else 0
    # An orthogonalisation is over when what came of it is rounded.
    rounding = min(6 * 4 * PIECE, 24 * max(head, *(one for _, one in n.matrices.values()))) if way.bfloat16 else 0
    stepping = gradients + max(iteration, rounding)
    return round(task.beside + held + extra + max(forward_end, backward_end, stepping))


def _iteration(n: Counts, low: bool) -> int:
    """Bytes of Muon's iteration on the largest stack of matrices of one shape: matrices before and after, their products with
    themselves and what is made of those; where it is in bfloat16, float32 before and after it."""
    found = 0
    for (shorter, longer), (layer, one) in n.matrices.items():
        stack = max(one, min(STACK, n.layers * layer))
        block = shorter / -(-shorter // BLOCK)
        found = max(found, math.ceil(stack * max((2 if low else 4) * (2 + 2 * block / longer), 6 if low else 0)))
    return found


def _drawn(task: Task, way: Way) -> tuple[int, int]:
    """Bytes of a token that `matching` takes beside. In a layer, until the backward pass: the distance of streams; of maps the
    student's, above zero, and the kept ones of the teacher's. In all, until that is made: what was heard and a map's making."""
    if task.match is None:
        return 0, 0
    weights, of_teacher = task.match
    streams = [4 * dims.hidden if weights.hidden else 0 for dims in (task.dims, of_teacher)]
    maps = [dims.heads * task.length if weights.attention else 0 for dims in (task.dims, of_teacher)]
    heard = streams[1] + 4 * maps[1] + (4 * maps[0] if way.recompute else 0)
    return streams[0] + 2 * 4 * maps[0], task.dims.layers * heard + 3 * 4 * maps[0]


def kept_per_token(config: dict[str, Any], dims: Dimensions, length: int, low: bool, maps: bool = False) -> tuple[int, int]:
    """Bytes that autograd keeps of a token: in a layer, and outside the layers. With products in bfloat16 what they read and
    make has half of the size; the stream and norms do not. With `maps` attention is unfused, and has no dropout."""
    family = family_of(config)
    tensors = present(family.layer_tensors, family, config)
    hidden, q, kv, part = dims.hidden, dims.axis("q"), dims.axis("kv"), 0.5 if low else 1.0
    axes, names = {axis for tensor in tensors for axis in tensor.axes}, {tensor.name for tensor in tensors}
    norms = [tensor for tensor in tensors if tensor.is_norm and tensor.axes == ("hidden",)]
    fused_norms = not norms or any(tensor.name.removesuffix("weight") + "bias" in names for tensor in norms)
    # What two projections read, and what norms are made of: LayerNorm is one operation, RMSNorm is two.
    floats: float = 2 * hidden + (1 if fused_norms else 2) * (len(norms) or 2) * hidden
    # Queries, keys, values, and what attention makes; of fused projections what they were cut out of as well, unless rotating
    # them in float32 made something else of them.
    floats += part * (2 * q + 2 * kv)
    rotated = not any("context" in tensor.axes for tensor in family.outer_tensors)
    if not (low and rotated):
        floats += part * ((2 * q + kv if "q_k_v" in axes else 0) + (q + kv if "qkv" in axes else 0))
    if family.qk_normed:
        floats += (1 + part) * (q + kv)
    dropout = any(config.get(key) for key in ("attention_dropout", "attn_pdrop"))
    if maps:
        # A map is in float32, and what is multiplied may not be; of each head there are keys and values of its own.
        floats += (max(1, family.pairs) + (part if low else 0)) * dims.heads * length + part * 2 * (q - kv)
    else:
        floats += (DROPPED if dropout else family.pairs) * dims.heads * length
    if family.router:
        floats += dims.active * (4 * dims.width + 2 * hidden) + 4 * dims.shared + (hidden if dims.shared else 0)
    else:
        gated = any(f"{family.mlp}.gate" in name for name in names)
        composed = 3 if config.get("activation_function") == "gelu_new" else 0
        floats += part * (4 if gated else 2 + composed) * dims.width
    return round(4 * (floats + dims.heads)), 4 * 4 * hidden


def ways(task: Task) -> Iterator[Way]:
    """Of a step, from the fastest to the one that takes the least memory."""
    rows, halved = math.ceil(task.rows / task.processes), [1]
    while halved[-1] < rows:
        halved.append(min(rows, 2 * halved[-1]))
    for pieces in halved:
        if pieces == 1 or math.ceil(rows / pieces) * task.length >= SMALL_PIECE:
            yield Way(pieces)
    for rounded in (False,) if task.in_float32 or task.processes > 1 else (False, True):
        for pieces in halved:
            yield Way(pieces, recompute=True, bfloat16=rounded)


def fits(taken: int, there: int) -> bool:
    """Whether so many bytes may be taken of a memory."""
    return taken <= ROOM * there


def choose(task: Task, there: int, phase: str, rounded: bool | None = None) -> Way:
    """The fastest way that fits into the memory that there is, of those whose weights are bfloat16 or not if `rounded` says.
    Raises NarrowError (too_little_memory, cannot_go_on)."""
    found = [way for way in ways(task) if rounded in (None, way.bfloat16)]
    if not found:
        raise NarrowError(
            "cannot_go_on",
            f"Training in {phase} was begun in bfloat16, which takes one process: let one go on, or begin anew elsewhere.",
        )
    for way in found:
        if fits(training(task, way), there):
            return way
    least = min(training(task, way) for way in found)
    raise _too_little(f"Training in {phase}", least, there)


def _too_little(who: str, least: int, there: int) -> NarrowError:
    room = round(ROOM * there)
    return NarrowError(
        "too_little_memory",
        f"{who} takes {least:,} bytes of memory at least, {least - room:,} more than the {room:,} that may be filled of "
        f"{there:,}: give the job more, where it has a limit (resources.memory, NARROW_MAX_JOB_MEMORY), take a machine with "
        "more, or lower block_tokens or the budget.",
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
class Teacher:
    """Bytes of a model that is not the base: whole, parked, and of its head for a token."""

    whole: int
    parked: int
    row: int


@dataclass(frozen=True)
class Job:
    """What a job's stages have to do with: the base's config; its lengths as it was brought, with its vocabulary trimmed, and
    cut; the roles of the skills beside the target; and the machine."""

    config: dict[str, Any]
    options: Options
    whole: Dimensions
    base: Dimensions
    small: Dimensions
    stored: int = 2
    """Bytes of a parameter in the base's file."""
    roles: Sequence[Role] = ()
    teacher: Teacher | None = None
    """Who teaches, where it is not the base."""
    machine: Machine = UNKNOWN
    parked: bool = False
    """Whether the weights of the layers of the base, and of another teacher, stay in their file (`parked`)."""


def teaching(config: dict[str, Any], dtype: str, machine: Machine) -> Teacher:
    """Of a job whose teacher is not the base. It computes in bfloat16 if it is stored so."""
    size, dims = 2 if dtype == "BF16" else 4, dimensions(config)
    parked = held(config, dims, True, size) + _in_file(config, dims, DTYPES[dtype], machine)
    return Teacher(held(config, dims, False, size), parked, size * dims.hidden)


def _in_file(config: dict[str, Any], dims: Dimensions, stored: int, machine: Machine) -> int:
    """Bytes that a parked model has in its file and that count: all where the limit counts what is mapped; else the experts: of
    those that a file holds one by one, what is made of them is in memory."""
    if machine.mapped:
        return stored * counts(config, dims).all
    family = family_of(config)
    experts = [tensor for tensor in present(family.layer_tensors, family, config) if tensor.routed]
    return 0 if machine.gpu else stored * dims.layers * sum(math.prod(map(dims.axis, tensor.axes)) for tensor in experts)


def of_base(job: Job, whole: bool = False) -> int:
    """Bytes of the base, with its vocabulary trimmed or `whole`."""
    in_file = _in_file(job.config, job.whole, job.stored, job.machine) if job.parked else 0
    return held(job.config, job.whole if whole else job.base, job.parked) + in_file


def held(config: dict[str, Any], dims: Dimensions, parked: bool, size: int = 4) -> int:
    """Bytes of a model with parameters of so many: of all its weights, or of one layer's and of those outside of layers."""
    n = counts(config, dims)
    return size * (n.outer + n.layer if parked else n.all)


def batch_rows(batch_tokens: int, tokens: int, length: int) -> int:
    """Blocks of a batch: no more than there are tokens to train on in all."""
    return max(1, min(batch_tokens, tokens) // length)


def _teaching(job: Job) -> int:
    """Bytes of who teaches in recovery. The base after its correction was trained, and is whole; of another model's head there
    is a copy for the tokens that are kept."""
    if job.teacher:
        head = job.teacher.row * job.base.vocab if job.base.vocab != job.whole.vocab else 0
        return (job.teacher.parked if job.parked else job.teacher.whole) + head
    corrected = job.options.method.recover.correction is not None
    return held(job.config, job.base, False) if corrected else of_base(job)


def _at_hand(job: Job) -> int:
    """Bytes of who teaches while recovery trains: none where nobody does, or what was said is in a file."""
    method = job.options.method
    return _teaching(job) if taught(method) and not method.recover.cache else 0


def trainings(job: Job) -> dict[str, Task]:
    """The stages that train, and how. Beside what is trained there is nothing in memory but who teaches."""
    options, method = job.options, job.options.method
    recover, lasso, base = method.recover, method.regularizer.tokens if method.regularizer else 0, job.base

    def task(
        dims: Dimensions,
        tokens: int,
        together: bool,
        optimizer: str = recover.optimizer,
        teacher: int | None = None,
        match: Match | None = None,
        in_float32: bool = False,
    ) -> Task:
        return Task(
            job.config,
            dims,
            batch_rows(recover.batch_tokens, tokens, options.block_tokens),
            options.block_tokens,
            optimizer,
            job.machine.low,
            job.machine.fixed + (teacher or 0),
            job.machine.processes if together else 1,
            job.machine.gpu,
            teacher is not None,
            (match, base) if match else None,
            in_float32,
        )

    found = {}
    if leaves_a_choice(options) and recover.tokens and options.budget.latency is None:
        found["allocate"] = task(job.small, recover.tokens, False, teacher=of_base(job))
    if method.regularizer:
        found["sparsify"] = task(base, lasso, True, "adamw", in_float32=True)
    if taught(method) and recover.correction:
        found["correct"] = task(base, recover.correction.tokens, True)
    if recover.tokens:
        teacher = _at_hand(job) if taught(method) else None
        found["recover"] = task(job.small, recover.tokens, True, teacher=teacher, match=recover.match)
    if "trained" in controls(options):
        found["controls"] = task(base, recover.tokens + lasso, False)
    if options.relearn and "forget" in job.roles:
        found["relearn"] = task(job.small, options.relearn.tokens, False)
    return found


def resting(job: Job) -> dict[str, int]:
    """Bytes of the process at the peak of each stage that trains nothing, or of what such a stage does beside."""
    options, method, gpu = job.options, job.options.method, job.machine.gpu
    dims = job.base
    whole, base = of_base(job, whole=True), of_base(job)
    cut = held(job.config, job.small, False)
    # Beside the base as it came, which shares its layers.
    trimmed = 4 * (1 if dims.tied else 2) * dims.vocab * dims.hidden if job.whole.vocab != dims.vocab else 0
    # Whole weights of another type are made of the file's, which stay until all are.
    read = job.stored * counts(job.config, job.whole).all if job.machine.mapped and job.stored != 4 and not job.parked else 0
    choice, timed = leaves_a_choice(options), options.budget.latency is not None
    layer = 4 * counts(job.config, dims).layer
    copied = held(job.config, dims, False)
    refitted = base + cut + _refit(job) if method.refit else 0
    compared = 4 * 4 * PROBED * dims.vocab
    found = {
        "load": whole + max(read, READING),
        "measure_base": whole + trimmed + _forward(job.whole, MEASURED, gpu),
        "score": base + _scoring(job, method.importance, method.calibration_tokens) if chooses(method) else 0,
        # Trials that lost the first quarter of one kind of unit have nearly all of the base; three shapes are timed beside it.
        "allocate": base + (2 if timed else 1) * copied + (_refit(job) if method.refit else 0) if choice else 0,
        # Fresh weights are drawn beside those that they take the place of.
        "slice": (copied if method.regularizer else base) + cut + (cut if method.init == "fresh" else max(layer, compared)),
        "reconstruct": refitted,
        "teach": _teaching(job) + _forward(dims, MEASURED, gpu) if method.recover.cache and taught(method) else 0,
        "recover": _at_hand(job) + cut + (cut if job.machine.mapped else 0) if method.recover.tokens else 0,
        "controls": refitted if "random" in controls(options) else 0,
        "measure": _measuring(job, together(job)),
        # Models that lost the first quarter of one kind of unit.
        "locality": base + max(copied + _forward(dims, MEASURED, gpu), _scoring(job, "fisher", SHARED_TOKENS // 2))
        if options.locality and job.roles and chooses(method)
        else 0,
        # Of which the cut at random is made before the base goes.
        "relearn": refitted or base + cut if options.relearn and "forget" in job.roles else 0,
        "export": exporting(["safetensors"], 0, cut, gpu),
    }
    return {name: job.machine.fixed + taken for name, taken in found.items() if taken}


def together(job: Job) -> int:
    """Models that are measured beside the base at once: the cut and the recovered one, where there is enough memory."""
    return 2 if fits(job.machine.fixed + _measuring(job, 2), job.machine.memory) else 1


def _measuring(job: Job, models: int) -> int:
    """The base and models that are read one by one: what is in a file is read before it is measured."""
    base, cut = of_base(job), held(job.config, job.small, False)
    read = cut if job.machine.mapped else 0
    return base + models * cut + max(read, _forward(job.base, MEASURED, job.machine.gpu, models + 1))


def stages(job: Job) -> dict[str, int]:
    """Bytes of the process at the peak of each stage that matters, with training done in the plain way and all formats made."""
    found = resting(job)
    base, cut = of_base(job), held(job.config, job.small, False)
    found["export"] = job.machine.fixed + exporting(job.options.export, base, cut, job.machine.gpu)
    for name, task in trainings(job).items():
        found[name] = max(found.get(name, 0), training(task, Way()))
    return {name: found[name] for name in ORDER if name in found}


def exporting(forms: Sequence[Format], base: int, cut: int, gpu: bool = False) -> int:
    """The model, and on the host a copy to save, or in other formats the file's weights, its graph and what runs it; and the base
    where what rounding keeps is measured. `base` and `cut` are bytes of the models."""
    copies = 1 if gpu else 2 if set(forms) <= {"safetensors"} else 4
    return (base if set(forms) & set(ROUNDED) else 0) + copies * cut


def _forward(dims: Dimensions, tokens: int, gpu: bool, models: int = 1) -> int:
    """A pass without gradients: each model's hidden states, and what a layer holds or, after it, the logits of a chunk."""
    layer = 4 * tokens * (3 * dims.active * dims.width + 6 * dims.hidden)
    return 4 * models * tokens * dims.hidden + max(layer, _logits(dims.vocab, gpu, models > 1))


def _scoring(job: Job, criterion: Criterion, tokens: int) -> int:
    """The stream of all tokens, for gradients before every layer; a layer's activations; and second moments and what one
    elimination takes, where the criterion asks for them."""
    dims, length, machine = job.base, job.options.block_tokens, job.machine
    blocks = max(1, min(SCORED, VALUES // ((dims.active * dims.width + dims.axis("q") + 2 * dims.hidden) * length)))
    batch = 4 * blocks * length * (4 * dims.active * dims.width + 2 * dims.axis("q") + 6 * dims.hidden)
    each = 4 * tokens * dims.hidden
    if criterion in ("fisher", "attribution"):
        batch += blocks * length * sum(kept_per_token(job.config, dims, length, machine.gpu))  # a CPU scores in float32
        batch += _logits(dims.vocab, machine.gpu, False)
        together = max(int(KEPT * machine.host), 4 * blocks * length * dims.hidden * (dims.layers + 1))
        streams = min(each * (dims.layers + 1), together)
    else:
        streams = _streams(each, machine)
    squares = 0
    if criterion == "reconstruction":
        widest = max(dims.width, dims.axis("q"))
        squares = 8 * (dims.experts * dims.width**2 + dims.axis("q") ** 2 + 4 * widest**2 + 2 * widest * dims.hidden)
    return (0 if machine.gpu else streams) + max(batch, squares)


def _streams(size: int, machine: Machine) -> int:
    """Bytes of memory of an array of streams of so many. One in a file counts as the largest that would not be, so that more
    memory never means that less fits."""
    return 0 if machine.gpu else min(size, int(LARGE * machine.host))


def refit_batch(tokens: int) -> int:
    """Tokens of a batch that the refit reads, of so many in all; whole blocks of it are taken."""
    return max(1, min(REFIT_BATCH, tokens // REFIT_BATCHES))


def _refit(job: Job) -> int:
    """The calibration tokens' streams in both models, a layer's second moments and their solution, and the layer's training."""
    method, dims, small = job.options.method, job.base, job.small
    tokens, n = method.calibration_tokens, counts(job.config, job.small)
    batch = refit_batch(tokens)
    kept, _ = kept_per_token(job.config, small, job.options.block_tokens, job.machine.low)
    solving = 8 * (4 * max(small.width, small.axis("q")) ** 2 + 3 * small.width * small.hidden)
    layer = (
        4 * 5 * n.layer
        + batch * (kept + 4 * (3 * small.active * small.width + 2 * small.hidden))
        + min(5 * 4 * STACK, 24 * n.layer_matrices)
    )
    streams = (EXPERT_STREAMS if dims.experts > 1 else STREAMS) * _streams(4 * tokens * dims.hidden, job.machine)
    return streams + max(solving, layer)


def check(job: Job) -> None:
    """Whether each stage fits into the memory that there is. Raises NarrowError (too_little_memory)."""
    there = job.machine.memory
    for name, taken in resting(job).items():
        if not fits(taken, there):
            raise _too_little(f"The stage {name}", taken, there)
    for name, task in trainings(job).items():
        choose(task, job.machine.each(task.processes), name)


def parks(job: Job) -> bool:
    """Whether the weights of the base's layers must stay in their file: whole they would leave too little memory. On a CPU that
    costs less than training in bfloat16 (nothing of the loss, and a reading of the file for a batch); on a GPU, where the bus is
    slow, it costs more. For a budget of latency the base is timed, and whole."""
    if job.options.budget.latency is not None:
        return False
    whole, parked = replace(job, parked=False), replace(job, parked=True)
    there, less = job.machine.memory, resting(parked)
    if any(not fits(taken, there) and taken > less[name] for name, taken in resting(whole).items()):
        return True
    smaller = trainings(parked)
    return any(
        smaller[name].beside < task.beside
        and not fits(_least(task if task.gpu else replace(task, in_float32=True)), job.machine.each(task.processes))
        for name, task in trainings(whole).items()
    )


def least(job: Job) -> int:
    """Bytes of the job at its peak where all is done in the way that takes the least: training, a parked base, large streams in
    files, models measured one by one. A machine on which ROOM holds it has enough."""
    job = replace(job, parked=job.options.budget.latency is None)
    full, small = (resting(replace(job, machine=replace(job.machine, memory=0, host=host))) for host in (sys.maxsize, 0))
    # Of what may be filled, streams take so much and no more.
    share = 1 - max(EXPERT_STREAMS * LARGE, KEPT) / ROOM
    trained = map(_least, trainings(job).values())
    return max(*(min(full[name], math.ceil(small[name] / share)) for name in full), *trained)


def _least(task: Task) -> int:
    return min(training(task, way) for way in ways(task))
