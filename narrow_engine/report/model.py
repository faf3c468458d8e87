"""The report of a run, as data. `report.json` is this model; the HTML page and the model card are drawn from it."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from narrow_engine.spec import Answer, BadRows, Format, Role, Unit

Variant = Literal["base", "cut", "recovered"]


class Size(BaseModel):
    parameters: int
    bytes: int = Field(description="Of the weights, as saved.")
    flops_per_token: int = Field(
        description="Multiply-adds × 2 of one token's forward pass without attention over the past, in the experts it meets."
    )
    layers: int
    hidden: int
    width: int = Field(description="MLP neurons in a layer; in an expert, where there are experts.")
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = Field(1, description="Experts in a layer; 1 in dense models.")


class Interval(BaseModel):
    value: float
    low: float = Field(description="Lower end of the 95 % interval: by bootstrap over documents, where nothing else is said.")
    high: float


class Fit(BaseModel):
    """How one model does on one skill."""

    loss: float = Field(description="Next-token cross-entropy in nats per token of the base, whose tokens may be longer.")
    low: float = Field(description="Lower end of the loss's 95 % bootstrap interval over documents.")
    high: float
    perplexity: float


class Answers(BaseModel):
    """How often models write the answer to a prompt themselves, greedily. Shares with their 95 % interval (Wilson's)."""

    prompts: int = Field(description="That were asked.")
    base: Interval
    cut: Interval
    recovered: Interval
    gained: int = Field(description="Prompts that the result answers and the base does not.")
    lost: int = Field(description="Prompts that the base answers and the result does not.")
    note: str = ""


class Skill(BaseModel):
    """One row of the table of skills."""

    role: Role
    documents: int = Field(description="That it was measured on.")
    tokens: int = Field(description="As the base cuts the text.")
    base: Fit
    cut: Fit = Field(description="After the cut and the refit, before any training.")
    recovered: Fit = Field(description="The result.")
    random: Fit | None = Field(
        None, description="Control: units drawn at random in the same shape, refitted as the cut was; to be compared with `cut`."
    )
    trained: Fit | None = Field(
        None, description="Control: the uncut base trained on as many tokens of the same text; to be compared with `recovered`."
    )
    retention: Interval = Field(description="Base perplexity ÷ compressed perplexity: 1 kept, near 0 lost.")
    agreement: Interval = Field(
        description="Share of positions where base and compressed model predict the same token; of a base with the same "
        "vocabulary, where that is trimmed."
    )
    kl: Interval = Field(description="Mean KL divergence from the same base's next-token distribution, in nats.")
    answers: Answers | None = Field(None, description="Of skills whose text is prompts with answers.")
    rounded: dict[Format, Interval] = Field({}, description="Retention of the formats that round the result's weights further.")
    note: str = Field("", description="What to keep in mind when reading this row.")


class Pace(BaseModel):
    """How one model runs in one format, in a process of its own."""

    prefill: float = Field(description="Tokens per second of a prompt.")
    decode: float = Field(description="Tokens per second that are written.")
    load: float | None = Field(None, description="Seconds from the files to a model that can be run.")
    memory: int | None = Field(None, description="The most bytes of main memory that the process has had.")


class Speed(BaseModel):
    """A format of the result and of the base, in turn on the machine that ran the job, one sequence at a time."""

    format: Format = "safetensors"
    runtime: Literal["torch", "onnxruntime", "llama.cpp"]
    base: Pace | None = Field(description="None where the base was too large to be brought into this format.")
    narrow: Pace
    predicted: float = Field(1.0, description="The base's FLOPs a token ÷ the result's: how many times as fast it should be.")
    bound: str = Field("", description="Where it is less than 0.9 of that: what else takes the time.")


class Load(BaseModel):
    """Whether a runtime takes a format of the result."""

    runtime: str
    format: Format
    loads: bool
    checked: bool = Field(description="It was run here, by this job; else it is by the rules of the runtime's documentation.")
    note: str = ""


class Cut(BaseModel):
    """What was kept of one kind of unit."""

    unit: Unit
    kept: int = Field(description="In each layer, or in the model.")
    of: int = Field(description="How many the base has.")
    per_layer: list[int] = Field(
        description="Kept units of each layer; for `layer` the kept layers' old indices; empty for units of the whole model."
    )


class Trial(BaseModel):
    """A shape that was tried before one was chosen. Losses are of training text set apart, in nats above the base's."""

    keep: dict[Unit, int]
    parameters: int
    refitted: float = Field(description="After cut and refit.")
    recovered: float | None = Field(None, description="After a short recovery, where there was one.")
    latency: float | None = Field(None, description="Milliseconds of one generated token, where that was measured.")


class Allocation(BaseModel):
    """How the shape was chosen."""

    keep: dict[Unit, int] = Field(description="Units kept of each kind: in every layer, or in the model.")
    sensitivity: dict[Unit, list[Trial]] = Field({}, description="Each kind cut alone, by how much is kept of it.")
    trials: list[Trial] = Field([], description="Whole shapes, in the order in which they were tried.")
    recovery_tokens: int = Field(0, description="Tokens that all the trials' recoveries took together.")


class Parity(BaseModel):
    """Agreement of two forms of one model on the same tokens."""

    max_error: float = Field(description="Largest absolute difference of logits.")
    mean_error: float | None = Field(None, description="Mean absolute difference of logits.")
    relative_error: float = Field(description="The same over the largest absolute logit.")
    greedy_tokens: int | None = Field(None, description="Greedy tokens that were compared.")
    greedy_equal: int | None = Field(None, description="How many of them, from the first, are equal.")


class CurvePoint(BaseModel):
    phase: str = Field(description="The training that it is of: sparsify, recover, ...")
    tokens: int = Field(description="Trained on so far, in this phase.")
    loss: float | None = Field(None, description="Training objective, mean since the point before; none at the start.")
    validation: float | None = Field(None, description="Next-token loss on held-out target documents.")
    sparsity: float | None = Field(None, description="Share of neurons that are zero, under group lasso.")
    seconds: float = Field(description="Since the training began.")


class Overlap(BaseModel):
    """How many of one skill's most important units are another's too, by the run's own criterion."""

    unit: Unit
    top: int = Field(description="How many units count as most important: of each layer, or of the model.")
    of: int
    shared: list[list[float]] = Field(
        description="By the order of `Locality.skills`, twice: the share of the top units of one skill, on a half of its text, "
        "that are the other's on a half of its own. Of a skill and itself, the two halves: all that the measurement could show. "
        "Chance is top ÷ of."
    )


class LocalityCurve(BaseModel):
    """What every skill loses as units of one kind are cut in the target's order, without refit or training."""

    unit: Unit
    cut: list[float] = Field(description="Share of the units that is gone.")
    loss: dict[str, list[float]] = Field(description="Of each skill, in nats a token above the base's.")


class Locality(BaseModel):
    """How far the skills share units (arXiv 2505.15811, section 4: skills are not localized)."""

    skills: list[str] = Field(description="In the order of the overlaps.")
    overlaps: list[Overlap]
    curves: list[LocalityCurve]
    summary: str = Field("", description="What it comes to at the size of the result, in a few sentences.")


class Learner(BaseModel):
    """A model that is trained on a skill."""

    tokens: int | None = Field(description="After which it was back; none if it was not, on all of them.")
    curve: list[CurvePoint] = Field(description="`validation` is the loss on held-out text of the skill, per token of the base.")


class Relearning(BaseModel):
    """How fast a skill that should be forgotten comes back."""

    base: float = Field(description="The base's loss on the text that the curves are measured on.")
    within: float = Field(description="Back is a loss of at most this many nats above the base's.")
    tokens: int = Field(description="Of training, at most.")
    text: int = Field(description="Tokens of the skill's text to train on, read again where `tokens` are more.")
    narrow: Learner
    random: Learner | None = Field(description="As many units drawn at random, refitted; none where weights are fresh.")
    fresh: Learner = Field(description="The same shape with fresh weights.")
    note: str


class Sample(BaseModel):
    prompt: str
    base: str
    narrow: str


class File(BaseModel):
    path: str
    bytes: int
    sha256: str


class Notice(BaseModel):
    """Something that was truncated, skipped, rounded or fell back."""

    phase: str
    code: str
    message: str


class Input(BaseModel):
    """What a run was given, by its bytes: `narrow reproduce` takes no other."""

    part: Literal["base", "teacher", "target", "broad", "skill"]
    name: str = Field(description="Of the file or folder.")
    sha256: str = Field(description="Of a file's bytes; of a model, over the names and digests of its files.")
    hub: str | None = Field(None, description="Of a model that was fetched from a hub: its name there.")
    commit: str | None = Field(None, description="And the commit that its files are of.")
    skill: str | None = None
    column: str | None = None
    answer: Answer | None = None
    bad_rows: BadRows = "stop"


class Provenance(BaseModel):
    inputs: list[Input]
    base_model: str | None = Field(None, description="The base's name on a hub, if it is from one or its config tells it.")
    tokenizer_sha256: str
    spec_sha256: str = Field(description="Of the spec without its inputs.")
    seed: int
    versions: dict[str, str] = Field(description="Of Narrow and of the libraries that matter.")
    machine: dict[str, Any] = Field(description="System, Python, threads, GPU, processes.")
    seconds: dict[str, float] = Field(description="Wall time of each stage.")
    memory: dict[str, int] = Field(
        {},
        description="The most bytes that the process had in each stage, of the GPU's memory where it ran on one. Where jobs are "
        "shut in, only the stages in which it had more than ever before are there.",
    )
    recovery_tokens: int
    regularizer_tokens: int
    correction_tokens: int = Field(0, description="That the teacher was trained on.")

    def sha256(self, part: str) -> str:
        """Of the base, the target, ...; of the first, if there are some; empty if there is none."""
        return next((item.sha256 for item in self.inputs if item.part == part), "")


class Report(BaseModel):
    schema_version: Literal[1] = 1
    target: str = Field(description="The target's name in `skills`.")
    family: str = Field(description="The type of the model, as its config names it.")
    spec: dict[str, Any] = Field(description="What was asked for, without its inputs: those are in `provenance`.")
    before: Size = Field(description="The base.")
    after: Size = Field(description="The result.")
    speed: list[Speed]
    skills: dict[str, Skill]
    allocation: Allocation
    cuts: list[Cut]
    parity: dict[str, Parity] = Field(
        description="vocabulary: the base with its vocabulary trimmed and whole; slice: sliced and masked; reload: a fresh "
        "process; of other formats: what runs them and torch, with the same weights or, for gguf, with those before rounding."
    )
    runtimes: list[Load] = Field([], description="Which programs take which files.")
    curve: list[CurvePoint] = Field(description="Of group lasso, if there was one, and of recovery.")
    locality: Locality | None = None
    relearning: dict[str, Relearning] = Field({}, description="Of skills to forget.")
    samples: list[Sample] = Field(description="Held-out beginnings, continued greedily by base and result.")
    notices: list[Notice]
    files: list[File] = Field(description="All that came out, but for the report itself.")
    provenance: Provenance
