"""What to compress, into what, and how: the one vocabulary of spec files, API, database and client.

A `CompressionSpec` names its inputs by path and is what the engine runs; a `JobSpec` names the same inputs by id and
is what `POST /jobs` takes; a `SweepSpec` is many such jobs and what `POST /sweeps` takes. Everything between them is shared.
Only the inputs and the budget are required: each default here is one that was measured (docs/decisions, bench/) and that a
person who knows nothing would be glad of.

This module imports no torch: the API process and the client's generated models stand on it.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Unit = Literal["neuron", "head", "kv_group", "layer", "expert", "residual", "token"]
Criterion = Literal["reconstruction", "fisher", "attribution", "activation", "magnitude", "random"]
Objective = Literal["next_token", "distill", "mixed"]
Divergence = Literal["kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]
Cache = Literal["hidden", "top"]
Role = Literal["keep", "forget", "watch"]
BadRows = Literal["stop", "skip"]
"""What a bad row of a dataset does: refuse all of it, or be left out and counted."""
Format = Literal["safetensors", "onnx", "onnx-int8", "onnx-int4", "gguf-f16", "gguf-q8_0"]
"""What a result is given back as. `safetensors` is there in any case, since the others are made of it."""
ROUNDED: tuple[Format, ...] = ("onnx-int8", "onnx-int4", "gguf-q8_0")
"""Formats whose weights are rounded further than the result's."""
DType = Literal["float32", "bfloat16", "float16"]
BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Quantity = Literal["parameters", "bytes", "flops"]

UNITS: tuple[Unit, ...] = get_args(Unit)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
PLURAL: dict[Unit, str] = {
    "neuron": "neurons",
    "head": "query heads",
    "kv_group": "KV groups",
    "layer": "layers",
    "expert": "experts",
    "residual": "hidden dimensions",
    "token": "tokens",
}
"""The units in a sentence."""
MIXTURE: dict[Divergence, float] = {"js": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
"""What `Recover.mixture` is by default, for the divergences that have one."""
TOP = 64
"""What `Recover.top` is by default. docs/explanation/distillation.md has what others cost."""

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w][\w .+-]*$")]


_PART = r"[A-Za-z0-9_]+((\.|-+)[A-Za-z0-9_]+)*"
"""Of a path that goes into a URL: it neither begins nor ends with a dot, nor has two of them together."""
_HUB_NAME = f"^{_PART}/{_PART}$"
HubName = Annotated[str, Field(max_length=200, pattern=_HUB_NAME, examples=["HuggingFaceTB/SmolLM2-135M"])]
Revision = Annotated[str, Field(max_length=200, pattern=f"^{_PART}(/{_PART})*$")]
Commit = Annotated[str, Field(pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")]


@cache
def _kinds(model: type[BaseModel], field: str) -> frozenset[Any]:
    """The types that a field's type is put together from."""

    def parts(kind: Any) -> set[Any]:
        return {kind}.union(*map(parts, get_args(kind)))

    return frozenset(parts(model.model_fields[field].annotation))


class Model(BaseModel):
    """Base of everything a person can write: an unknown or misspelt option is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_lookalikes(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1 and "0.5" as 0.5, of which nobody can say that it was meant. Its own strictness would refuse
        1e6 for a whole number too."""
        kinds = _kinds(cls, info.field_name or "")
        if kinds & {int, float}:
            parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            for part in parts:
                if isinstance(part, bool):
                    raise ValueError(f"should be a number, not {str(part).lower()}")
                if isinstance(part, str):
                    raise ValueError(f"should be a number, not the text {clear(part)!r}: write it without quotes")
        elif bool in kinds and not isinstance(value, bool):
            raise ValueError("should be true or false, without quotes" if isinstance(value, str) else "should be true or false")
        return value


Amount = Annotated[float, Field(gt=0, le=1e16)]


class Budget(Model):
    """How small the result must be. Exactly one of the fields."""

    parameters: Amount | None = Field(
        None,
        description="Parameters of the result: a fraction of the base's up to 1, a count above 1.",
        examples=[0.5, 4_000_000],
    )
    bytes: Amount | None = Field(
        None,
        description="Bytes of the result's weights in safetensors: a fraction of the base's up to 1, a count above 1.",
        examples=[50_000_000],
    )
    flops: Amount | None = Field(
        None,
        description="FLOPs of one token's forward pass: a fraction of the base's up to 1, a count above 1.",
        examples=[0.5],
    )
    latency: Amount | None = Field(
        None,
        description="Time of one generated token, measured on the machine that runs the job (torch, float32, batch 1): "
        "a fraction of the base's up to 1, milliseconds above 1.",
        examples=[0.5, 20],
    )
    retention: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="The smallest model that keeps this much of the target skill already after an eighth of the recovery.",
        examples=[0.95],
    )
    keep: dict[Unit, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="The fraction of each kind of unit to keep, for those who want a shape rather than a size. Kinds not "
        "named stay whole; of a vocabulary that is not named, what the text uses stays.",
        examples=[{"neuron": 0.25}],
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"a budget takes exactly one of {', '.join(map(repr, type(self).model_fields))}")
        for name, amount in given.items():
            if name in QUANTITIES and amount > 1 and amount != int(amount):
                raise ValueError(f"{name!r} above 1 is a count and must be a whole number; up to 1 it is a fraction")
        return self

    def amount(self) -> tuple[Quantity, float] | None:
        """What is limited and to how much; None where the budget is a shape, or is met by measuring."""
        for quantity in QUANTITIES:
            value = getattr(self, quantity)
            if value is not None:
                return quantity, value
        return None


class GroupLasso(Model):
    """Narrow the base before the cut: train on the target with a group-lasso penalty (arXiv 2505.15811, section 5).

    The penalty moves the target's skill into few neurons and drives the others to exactly zero by proximal steps.
    """

    kind: Literal["group_lasso"] = Field("group_lasso", description="The one that there is.")
    tokens: int = Field(131_072, ge=1, le=10**12, description="Tokens to train on under the penalty.")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak, of AdamW.")


class Curriculum(Model):
    """Train on broad text as well, since skills rest on one another (arXiv 2505.15811, section 3): its share of the tokens
    goes from `start` to `end` in a straight line, and stays there.
    """

    start: float = Field(1.0, ge=0, le=1, description="Share of broad text at first.")
    end: float = Field(0.0, ge=0, le=1, description="Share of broad text in the end.")
    until: float = Field(0.5, ge=0, le=1, description="Part of the training after which it is the share in the end.")


class Correction(Model):
    """The teacher is trained on the target's next tokens before it teaches (arXiv 2407.14679, section 2.3; 2408.11796)."""

    tokens: int = Field(ge=1, le=10**12, description="Of the target, to train the teacher on.")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak; by default that of the recovery's optimizer.")


class Match(Model):
    """Weights of terms that compare student and base layer by layer, in the units that were kept."""

    hidden: float = Field(
        0.0, ge=0, le=1000, description="Of the squared distance of the residual streams after each layer ÷ the base's square."
    )
    attention: float = Field(
        0.0, ge=0, le=1000, description="Of KL(base‖student) of what each query attends to, as in MiniLM (arXiv 2002.10957)."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.hidden or self.attention):
            raise ValueError("'match' needs a weight above 0 in 'hidden' or in 'attention'")
        return self


TEACHING = ("cache", "correction", "on_policy", "match")
"""Options of a recovery that say how it is taught."""


class Recover(Model):
    """Train the cut model on the target."""

    objective: Objective = Field(
        "mixed",
        description="next_token: the data's own next token; distill: divergence from the base; mixed: the mean of both.",
    )
    tokens: int = Field(1_000_000, ge=0, le=10**12, description="Tokens to train on; 0 leaves the cut model as it is.")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: for the layers' matrices, with AdamW for the rest; adamw: for everything."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak; by default the optimizer's measured best, which is another for fresh weights."
    )
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="Of the learning rate after a short warm-up: linear to nothing, or constant."
    )
    batch_tokens: int = Field(2048, ge=1, le=2**22, description="Tokens of one optimizer step.")
    temperature: float = Field(2.0, gt=0, le=100, description="Softens both distributions of the distillation term.")
    divergence: Divergence = Field(
        "kl",
        description="Of base p and student q in the distillation term. kl: KL(p‖q); reverse_kl: KL(q‖p); js: generalised "
        "Jensen–Shannon, β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q; skew_kl: KL(p‖αp + (1−α)q); skew_reverse_kl: "
        "KL(q‖(1−α)p + αq).",
    )
    mixture: float | None = Field(
        None, gt=0, lt=1, description="β of js, by default 0.5, or α of the skewed divergences, by default 0.1."
    )
    curriculum: Curriculum | None = Field(None, description="Mixes in the text of `broad`.")
    cache: Cache | None = Field(
        None,
        description="Write down once, before training, what the teacher says to each block, and read it from there in every "
        "epoch, and in every point of a sweep. Then the teacher takes no memory in training. hidden: its last hidden states, two "
        "bytes a dimension a token, which lose nothing; top: its likeliest tokens, six bytes each, and the mass of the rest.",
    )
    top: int | None = Field(None, ge=1, le=1024, description="Tokens at each position in a cache of kind top, by default 64.")
    correction: Correction | None = Field(
        None, description="Trains the base, as the teacher and not as what is cut, on the target first."
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of batches in which the student itself continues the first half of each block, by sampling, and "
        "learns what the teacher says to that. Their loss is the divergence alone.",
    )
    match: Match | None = Field(None, description="Draws the student's insides to the base's as well.")

    @model_validator(mode="after")
    def _taught(self) -> Self:
        asked = [name for name in TEACHING if getattr(self, name) not in (None, 0)]
        if asked and self.objective == "next_token":
            raise ValueError(f"{asked[0]!r} is of use where a model teaches, and with 'objective' 'next_token' none does")
        live = [name for name in ("on_policy", "match") if name in asked]
        if self.cache and live:
            raise ValueError(f"{live[0]!r} needs the teacher itself while it trains: leave 'cache' out")
        if self.top is not None and self.cache != "top":
            raise ValueError("'top' is the number of tokens in a 'cache' of kind 'top': set that, or leave it out")
        return self

    @model_validator(mode="after")
    def _mixture_of_a_divergence(self) -> Self:
        if self.mixture is not None and self.divergence not in MIXTURE:
            raise ValueError(
                f"'mixture' is the β or α of {', '.join(MIXTURE)}, and {self.divergence!r} has none: choose one of those as "
                "'divergence' or leave 'mixture' out"
            )
        return self


Kind = Literal["prune", "distill", "scratch", "export"]
Init = Literal["cut", "layers", "fresh"]


class Method(Model):
    """How the small model comes about: one line, of which each kind uses what it needs.

    What is not given follows the kind.
    """

    kind: Kind = Field(
        "prune",
        description="prune: score, cut, refit, recover. distill: a student of the size asked for, trained to the base's "
        "distribution. scratch: fresh weights trained on the text alone, the control. export: the base as it is, in other "
        "formats.",
    )
    init: Init = Field(
        "cut",
        description="Weights that training starts from. cut: the base's best units; layers: evenly spaced layers of the base; "
        "fresh: none of the base, of which only the shape is taken. By default cut to prune, else fresh.",
    )
    units: list[Unit] = Field(
        default=["neuron", "token"],
        min_length=1,
        max_length=len(UNITS),
        description="What may be cut. With token, the vocabulary is trimmed to what the target's text and that of skills to keep "
        "use, before anything else.",
    )
    multiple: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Neurons are kept in multiples of this where a budget leaves the choice: kernels are fastest at whole tiles. "
        "By default 64 in MLPs of 4,096 neurons and more, 32 where gguf-q8_0 is among the formats, else 8. Neurons of experts "
        "are kept in multiples of 8 in any case.",
    )
    importance: Criterion = Field(
        "reconstruction",
        description="What a unit is worth to the target. reconstruction: how much the output loses when the rest is refitted; "
        "fisher and attribution: by gradients; activation, magnitude: by size; random: the control.",
    )
    calibration_tokens: int = Field(65_536, ge=1, le=10**9, description="Tokens of the target that scores and refit see.")
    regularizer: GroupLasso | None = Field(None, description="Drives neurons to exactly zero before the cut.")
    refit: bool = Field(
        True,
        description="Refit layer by layer towards the base's residual stream: least squares for the projections that read the "
        "cut units, and a short training of the whole layer. No labels are used. By default only to prune.",
    )
    recover: Recover = Field(
        default_factory=Recover,
        description="Its objective is by default mixed to prune, distill to distill, and next_token from scratch.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, given: Any) -> Any:
        kind = given.get("kind") if isinstance(given, dict) else None
        if not isinstance(kind, str) or kind not in DEFAULTS:
            return given
        defaults = DEFAULTS[kind]
        made = {**defaults, **given}
        if isinstance(made["recover"], dict):
            made["recover"] = {**defaults["recover"], **made["recover"]}
        return made

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.units)) != len(self.units):
            raise ValueError("'units' names a kind of unit twice")
        if self.regularizer and "neuron" not in self.units:
            raise ValueError("group_lasso acts on neurons: add 'neuron' to 'units' or leave the regularizer out")
        if self.init == "layers" and set(self.units) - {"token"} != {"layer"}:
            raise ValueError("'init' takes whole layers of the base: 'units' must be 'layer', alone or with 'token'")
        if self.init == "fresh" and (self.refit or self.regularizer):
            raise ValueError(
                "fresh weights take nothing of the base: leave 'refit' and 'regularizer' out, or set 'init' to 'cut'"
            )
        if self.kind == "export" and (self.init != "cut" or self.regularizer or self.refit or self.recover.tokens):
            raise ValueError("'export' gives the base back as it is: leave 'init', 'regularizer', 'refit' and 'recover' out")
        if self.kind == "prune" and self.init == "fresh":
            raise ValueError("pruning starts from the base: set 'kind' to 'distill' or 'scratch' for fresh weights")
        if self.kind == "scratch" and (self.init != "fresh" or self.recover.objective != "next_token"):
            raise ValueError("'scratch' takes nothing of the base: its 'init' is 'fresh' and its objective 'next_token'")
        if self.kind == "distill" and self.recover.objective == "next_token":
            raise ValueError("to distill, the objective must be 'distill' or 'mixed'")
        return self


DEFAULTS: dict[str, dict[str, Any]] = {
    "prune": {"recover": {"objective": "mixed"}},
    "distill": {"init": "fresh", "refit": False, "recover": {"objective": "distill"}},
    "scratch": {"init": "fresh", "refit": False, "recover": {"objective": "next_token"}},
    "export": {"units": ["neuron"], "refit": False, "recover": {"tokens": 0}},
}
"""What a method's options are where its kind says otherwise than their fields do."""


Export = Annotated[
    list[Format],
    Field(
        min_length=1,
        max_length=len(get_args(Format)),
        description="Formats. Of onnx and gguf, those with int or q have rounded weights, and the report says what that costs.",
    ),
]
ResultType = Annotated[DType | None, Field(description="Type of the result's weights in safetensors; by default the base's.")]
WHOLE = Budget(keep={"neuron": 1.0})
"""Of what is only exported."""
BlockTokens = Annotated[int, Field(ge=8, le=2**17, description="Length of the token blocks that training reads.")]
SkillTokens = Annotated[int, Field(ge=64, le=10**9, description="Tokens that each skill is measured on, at most.")]
MAX_SEED = 2**31 - 1


Control = Literal["random", "trained"]


class Relearn(Model):
    """The probe of skills to forget: training on them, until they are back. What comes back at once was only hidden."""

    tokens: int = Field(131_072, ge=1, le=10**12, description="Tokens of the skill to train on, at most.")
    within: float = Field(0.1, gt=0, le=100, description="Back is a loss of at most this many nats a token above the base's.")


class Options(Model):
    """What a spec file and a job have in common."""

    method: Method = Field(default_factory=Method)
    budget: Budget = Field(
        default_factory=lambda: WHOLE, description="Required, but where `method.kind` is export, which cuts nothing."
    )
    export: Export = ["safetensors", "onnx"]
    dtype: ResultType = None
    controls: list[Control] = Field(
        default=["random"],
        max_length=2,
        description="What the report compares with, beside the base. random: units drawn at random in the same shape, refitted "
        "too. trained: the uncut base trained on as many tokens of the same text, which costs another training.",
    )
    locality: bool = Field(
        True,
        description="Measure which units the skills share with one another, and what each loses as units go in the target's "
        "order. Of use with a skill beside the target.",
    )
    relearn: Relearn | None = Field(
        default_factory=Relearn,
        description="For skills to forget: count the tokens after which the result, a cut at random and fresh weights have "
        "learned them again. Half of such a skill's text is kept for that. null leaves it out.",
    )
    block_tokens: BlockTokens = 512
    skill_tokens: SkillTokens = 65_536
    seed: int = Field(0, ge=0, le=MAX_SEED, description="The same one gives the same result on the same machine.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.export)) != len(self.export):
            raise ValueError("'export' names a format twice")
        if self.method.kind != "export" and "budget" not in self.model_fields_set:
            raise ValueError("'budget' is missing: say how small the result must be")
        if self.method.kind == "export" and self.budget != WHOLE:
            raise ValueError("'export' cuts nothing: leave 'budget' out")
        other = set(self.budget.keep or ()) - set(self.method.units)
        if other:
            raise ValueError(f"'budget.keep' names {sorted(other)[0]!r}, which is not among 'method.units': add it there")
        measured = self.budget.retention is not None or self.budget.latency is not None
        if measured and self.method.units == ["token"]:
            raise ValueError("a budget of retention or latency needs more in 'units' than 'token': the text decides about tokens")
        if measured and self.method.init != "cut":
            raise ValueError(
                "a budget of retention or latency is met by trying cuts of the base: set 'init' to 'cut', or give a size"
            )
        if self.budget.retention is not None and self.method.regularizer is not None:
            raise ValueError("a budget of retention tries many sizes and group_lasso trains for one: leave one of them out")
        return self


_ESCAPED = re.compile(r"\\[^NUux]")
"""In a regular expression: an escape that may stand there, after which nothing else is one."""
_SLOW = re.compile(r"\\[NUux]|\(\?[aiLmsux-]+")


class Answer(Model):
    """Rows that hold an answer beside the text, which is its prompt as models see it. Prompt and answer together
    are what is trained and measured on, and of held-out rows it is counted how often a model writes the answer itself.
    """

    column: str = Field("answer", min_length=1, max_length=200, description="The field of a row that holds its answer.")
    extract: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        pattern="^[ -~]+$",
        description="A regular expression of Python's `re`, in printable ASCII, without inline flags like `(?i)` and without the "
        "escapes `\\x`, `\\u`, `\\U` and `\\N`. Its last match, or its first group there, is what is compared, in the answer as "
        "in what was written. By default all of both, without the space around them.",
        examples=[r"#### (-?[\d,.]+)"],
    )
    tokens: int = Field(128, ge=1, le=8192, description="That a model may write, at most.")
    stop: list[str] = Field(default=["\n"], max_length=8, description="What ends an answer, beside the model's own end of text.")
    prompts: int = Field(200, ge=1, le=100_000, description="That are asked, at most.")

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        # It is compiled where requests are answered, once for each spec that is read and again for each that is shown: a class as
        # wide as Unicode took 5.6 s, and one of letters under (?i) twenty times what it takes without.
        slow = _SLOW.search(_ESCAPED.sub(".", self.extract or ""))
        if slow:
            raise ValueError(f"'extract' has {slow[0]!r}: write what it matches in ASCII, without inline flags and such escapes")
        try:
            re.compile(self.extract or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"'extract' is not a regular expression: {error}") from error
        if not all(0 < len(stop) <= 100 for stop in self.stop):
            raise ValueError("what is in 'stop' has 1 to 100 characters")
        return self


Called = Annotated[
    str | None, Field(max_length=200, description="Its name in the report, where it is not the file's or folder's.")
]


class ModelPath(Model):
    path: Path = Field(description="A folder in the Hugging Face layout: config.json, *.safetensors, tokenizer.json.")
    hub: HubName | None = Field(None, description="Its name on the hub that it is from, for the report.")
    commit: Commit | None = Field(None, description="And of which commit its files are.")
    called: Called = None


Answered = Annotated[
    Answer | None, Field(description="Where the text is prompts: their answers, and how to judge what models write to them.")
]


class DatasetPath(Model):
    path: Path = Field(description="JSON Lines, CSV, TSV or plain text, also .gz or .zst, or Parquet.")
    column: str = Field("text", min_length=1, max_length=200, description="The field of a row that holds its text.")
    bad_rows: BadRows = Field("stop", description="What a bad row does: stop the run, or be left out and counted.")
    answer: Answered = None
    called: Called = None


SkillName = Annotated[Name, Field(description="Its row in the report.")]
SkillRole = Annotated[
    Role,
    Field(
        description="keep and forget say what is hoped for, and the report says whether it came true; watch: it is only measured."
    ),
]


class SkillPath(DatasetPath):
    name: SkillName
    role: SkillRole = "watch"


INPUTS = {"base", "teacher", "target", "broad", "skills"}
PLACING = {"priority", "resources"}
"""What a job says of when and where it runs: no matter of the engine's."""
"""The fields that say where a spec's inputs are, in which a `CompressionSpec` and a `JobSpec` differ."""


_BASE = "The general model that is made narrow."
_TEACHER = "A model that teaches in the base's place, with the same tokenizer, such as a larger one of its family."
_TARGET = "Text of the domain whose skill must survive."
_BROAD = "The broad text of `method.recover.curriculum`."
_SKILLS = "What else is measured: the cut follows the target alone."


class CompressionSpec(Options):
    """What the engine runs: inputs by path. Relative paths count from the spec file's folder."""

    base: ModelPath = Field(description=_BASE)
    teacher: ModelPath | None = Field(None, description=_TEACHER)
    target: DatasetPath = Field(description=_TARGET)
    target_name: Name = Field("target", description="The target's row in the table of skills.")
    broad: DatasetPath | None = Field(None, description=_BROAD)
    skills: list[SkillPath] = Field(default=[], max_length=50, description=_SKILLS)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        _unique_names([self.target_name, *(s.name for s in self.skills)])
        _broad_where_asked(self.broad, self.method.recover.curriculum)
        _teacher_where_of_use(self.teacher, self.method.recover)
        return self

    @property
    def data(self) -> list[DatasetPath]:
        """All datasets."""
        return [self.target, *self.skills, *([self.broad] if self.broad else [])]


class ModelId(Model):
    model: str = Field(description="Its id.", pattern=r"^mdl_[0-9a-z]{16,40}$", examples=["mdl_01h455vb4pex5vsknk084sn02q"])


class DatasetId(Model):
    dataset: str = Field(description="Its id.", pattern=r"^ds_[0-9a-z]{16,40}$", examples=["ds_01h455vb4pex5vsknk084sn02q"])
    answer: Answered = None


class SkillId(DatasetId):
    name: SkillName
    role: SkillRole = "watch"


Priority = Annotated[int, Field(ge=-10, le=10, description="Of a tenant's jobs that wait, those with the highest go first.")]


class Resources(Model):
    """What a job gets of a cluster's node. On a service without a cluster it has the whole machine but for `memory`, with as many
    processes in training as `gpus` says, each of which takes a GPU where there are any.
    """

    gpus: int = Field(0, ge=0, le=64, description="Training is spread over them.")
    cpus: int | None = Field(None, ge=1, le=1024, description="By default as the service says.")
    memory: int | None = Field(
        None,
        ge=2**28,
        le=2**50,
        description="Bytes of main memory; by default the machine's, and of a cluster's node as `POST /plans` estimates.",
    )


class JobSpec(Options):
    """What `POST /jobs` takes: inputs by id. The target's skill is named after its dataset."""

    base: ModelId = Field(description=_BASE)
    teacher: ModelId | None = Field(None, description=_TEACHER)
    target: DatasetId = Field(description=_TARGET)
    broad: DatasetId | None = Field(None, description=_BROAD)
    skills: list[SkillId] = Field(default=[], max_length=50, description=_SKILLS)
    priority: Priority = 0
    resources: Resources = Field(default_factory=Resources)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        _unique_names([s.name for s in self.skills])
        _broad_where_asked(self.broad, self.method.recover.curriculum)
        _teacher_where_of_use(self.teacher, self.method.recover)
        return self

    @property
    def data(self) -> list[DatasetId]:
        """All datasets."""
        return [self.target, *self.skills, *([self.broad] if self.broad else [])]


POINTS = 200
"""Of a sweep, at most."""


class SweepSpec(Model):
    """What `POST /sweeps` takes: a job for each method, budget and seed, over one base and the same data.

    The frontier that comes out is loss against parameters and against tokens.
    """

    base: ModelId = Field(description=_BASE)
    teacher: ModelId | None = Field(None, description=_TEACHER + " Of the methods that are taught.")
    target: DatasetId = Field(description=_TARGET)
    broad: DatasetId | None = Field(None, description="The broad text of the methods that have a curriculum.")
    skills: list[SkillId] = Field(default=[], max_length=50, description=_SKILLS)
    methods: dict[Name, Method] = Field(
        default_factory=lambda: {"prune": Method()},
        min_length=1,
        max_length=10,
        description="What is compared, by a name of your own.",
        examples=[{"prune": {}, "scratch": {"kind": "scratch"}}],
    )
    budgets: list[Budget] = Field(min_length=1, max_length=10, examples=[[{"parameters": 0.5}, {"parameters": 0.25}]])
    seeds: list[int] = Field(default=[0], min_length=1, max_length=10, description="The figures are means over the seeds.")
    export: Export = ["safetensors"]
    dtype: ResultType = None
    block_tokens: BlockTokens = 512
    skill_tokens: SkillTokens = 65_536
    priority: Priority = -1  # so that nobody's single job waits for a whole sweep
    resources: Resources = Field(default_factory=Resources)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, values in (("budgets", self.budgets), ("seeds", self.seeds)):
            twice = [value for number, value in enumerate(values) if value in values[:number]]
            if twice:
                told = twice[0].model_dump_json(exclude_none=True) if isinstance(twice[0], Budget) else twice[0]
                raise ValueError(f"{name!r} has {told} twice")
        exporting = [name for name, method in self.methods.items() if method.kind == "export"]
        if exporting:
            raise ValueError(f"the method {exporting[0]!r} only exports, which has no points to compare: make a job of it")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"'seeds' has {seed}: a seed is a number from 0 to {MAX_SEED}")
        count = len(self.methods) * len(self.budgets) * len(self.seeds)
        if count > POINTS:
            product = f"{len(self.methods)} methods × {len(self.budgets)} budgets × {len(self.seeds)} seeds"
            raise ValueError(f"{product} make {count} points: a sweep has at most {POINTS}")
        if self.broad and not any(method.recover.curriculum for method in self.methods.values()):
            raise ValueError("'broad' is the text of a curriculum, and no method has one: give both, or neither")
        if self.teacher and not any(taught(method) for method in self.methods.values()):
            raise ValueError("'teacher' is of use where a model teaches, and no method has the objective 'distill' or 'mixed'")
        for name, method in self.methods.items():
            for budget in self.budgets:
                try:
                    self.job(method, budget, self.seeds[0])
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    told = budget.model_dump_json(exclude_none=True)
                    raise ValueError(f"the method {name!r} with the budget {told}: {wording(first)}") from error
        return self

    def job(self, method: Method, budget: Budget, seed: int) -> JobSpec:
        """The job of one point."""
        return JobSpec(
            base=self.base,
            teacher=self.teacher if taught(method) else None,
            target=self.target,
            broad=self.broad if method.recover.curriculum else None,
            skills=self.skills,
            priority=self.priority,
            resources=self.resources,
            method=method,
            budget=budget,
            export=self.export,
            dtype=self.dtype,
            controls=[],
            locality=False,
            relearn=None,
            block_tokens=self.block_tokens,
            skill_tokens=self.skill_tokens,
            seed=seed,
        )


def controls(options: Options) -> list[Control]:
    """The controls that are asked for and make sense: units are drawn where some are chosen, and the base trained where the
    model is."""
    method = options.method
    lasso = method.regularizer.tokens if method.regularizer else 0
    sense = {
        "random": method.init != "fresh" and method.units != ["token"] and method.kind != "export",
        "trained": method.recover.tokens + lasso > 0,
    }
    return [control for control in sorted(set(options.controls)) if sense[control]]


def probes_locality(spec: "CompressionSpec | JobSpec") -> bool:
    """Whether there are skills to compare, and an order in which units go."""
    return spec.locality and bool(spec.skills) and chooses(spec.method)


def chooses(method: Method) -> bool:
    """Whether units of the base are chosen by their scores."""
    return method.init == "cut" and method.units != ["token"] and method.kind != "export"


def leaves_a_choice(options: Options) -> bool:
    """Whether shapes have to be tried: where arithmetic alone does not say how many units of each kind to keep."""
    budget, chosen = options.budget, chosen_units(options)
    if options.method.init != "cut":
        return False
    measured = budget.retention is not None or budget.latency is not None
    return bool(chosen) and (measured or (budget.keep is None and len(chosen) > 1))


def chosen_units(options: Options) -> list[Unit]:
    """The kinds of which scores say what to keep: of tokens, the text does."""
    return [unit for unit in options.method.units if unit != "token"]


def relearned(spec: "CompressionSpec | JobSpec") -> list[str]:
    """The skills that are learned again, by name."""
    return [skill.name for skill in spec.skills if skill.role == "forget" and spec.relearn]


def taught(method: Method) -> bool:
    """Whether a model teaches in a method's recovery."""
    return method.recover.objective != "next_token" and method.recover.tokens > 0


class SweepPoint(NamedTuple):
    """One job of a sweep: the name of its method, and its spec."""

    method: str
    spec: JobSpec


def points(sweep: SweepSpec) -> list[SweepPoint]:
    """The jobs of a sweep, in the order in which they should run: those that share most one after the other."""
    return [
        SweepPoint(name, sweep.job(method, budget, seed))
        for seed in sweep.seeds
        for name, method in sweep.methods.items()
        for budget in sweep.budgets
    ]


def _unique_names(names: list[str]) -> None:
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"two skills are called {sorted(twice)[0]!r}: each row of the report needs its own name")


def _broad_where_asked(broad: Any, curriculum: Curriculum | None) -> None:
    if (broad is None) != (curriculum is None):
        raise ValueError("'broad' is the text of 'method.recover.curriculum': give both, or neither")


def _teacher_where_of_use(teacher: Any, recover: Recover) -> None:
    if teacher is None:
        return
    if recover.objective == "next_token":
        raise ValueError("'teacher' is of use where a model teaches, and with the objective 'next_token' none does")
    of_base = next((name for name in ("correction", "match") if getattr(recover, name)), None)
    if of_base:
        raise ValueError(f"'method.recover.{of_base}' is about the base as the teacher: leave 'teacher' or that out")


NOT_A_NAME = "is not a name: it takes letters, digits, spaces and . + - _, and begins with a letter, a digit or _"
_WHOLE_NUMBER = "should be a whole number"
PLAIN = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _WHOLE_NUMBER),
    "int_parsing_size": f"{_WHOLE_NUMBER} of fewer digits",
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    "finite_number": "should be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    "string_type": "should be a text",
    "list_type": "should be a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "should be a JSON object"),
}
"""What pydantic says in words of programmers."""
_NAME_PATTERN = TypeAdapter(Name).json_schema()["pattern"]


def wording(error: Mapping[str, Any]) -> str:
    """What pydantic found wrong with a spec, as the rest of a sentence that begins with the name of the field."""
    kind, pattern = error["type"], error.get("ctx", {}).get("pattern", "")
    if kind == "extra_forbidden":
        return f"there is no option {clear(error['loc'][-1])!r} here: is it misspelt?"
    if kind == "missing":
        return "is missing"
    if kind == "string_pattern_mismatch" and pattern.startswith(("^mdl_", "^ds_")):
        return f"is not an id like {pattern[1:].partition('[')[0]}01h455vb4pex5vsknk084sn02q"
    if kind == "string_pattern_mismatch" and pattern == _NAME_PATTERN:
        return NOT_A_NAME
    if kind == "string_pattern_mismatch" and pattern == _HUB_NAME:
        return "is not the name of a model on a hub, like HuggingFaceTB/SmolLM2-135M"
    text = str(error["msg"]).replace(" after validation", "")
    if kind == "value_error":
        return text.removeprefix("Value error, ")[:300]
    if kind in PLAIN:
        return PLAIN[kind]
    subject, should, rest = text.partition(" should ")
    return (f"should {rest}" if should and " " not in subject else text)[:300]


def sentence(where: str, words: str) -> str:
    """A field's name (empty for the whole) and `wording`, as a sentence."""
    if not where:
        whole = words[0].upper() + words[1:]
    else:
        whole = f"{where} {words}" if words.startswith(("is ", "should ")) else f"{where}: {words}"
    return whole if whole.endswith(("?", ".")) else f"{whole}."


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as a sentence that begins with where it is."""
    first = first_of(error)
    return sentence(".".join(clear(part) for part in first["loc"] if part != "[key]"), wording(first))


def first_of(error: ValidationError) -> Mapping[str, Any]:
    """What of pydantic's errors is told. A misspelt option is also a missing one: the spelling is what helps."""
    return min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")


def clear(key: Any) -> str:
    """A key that somebody sent: not too long, and without halves of surrogate pairs, which no answer could hold."""
    return str(key)[:60].encode(errors="replace").decode()


def printable(text: str) -> str:
    """A line for a terminal, without control characters, which could move its cursor or recolour it."""
    return "".join(c for c in text if c.isprintable())
