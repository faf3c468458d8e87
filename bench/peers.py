"""Other tools on the same base, domain, size and tokens as this engine: where they can be run, and what stops them where not.

    python3 -m venv peers-venv                # a venv of its own, which reads .venv and does not change it
    realpath .venv/lib/python3.11/site-packages > peers-venv/lib/python3.11/site-packages/narrow.pth
    peers-venv/bin/pip install -r bench/peers.txt
    PYTHONPATH=.:client peers-venv/bin/python bench/peers.py [--seeds 0] [--tokens 327680] [--only TEXT]

llm-compressor 0.14.0.1 wants transformers 5.15 to 5.17: a second venv made the same way with
`pip install llmcompressor==0.14.0.1`, and `--llm-compressor SECOND/bin/python` here.

Every arm takes base-s from 1,024 to 256 neurons in each of its 6 layers, which is a cut, and trains it, which is a recovery.
Cuts, each scored on 65,536 tokens of the domain:
    narrow             this engine's default for neurons: reconstruction score, refit with each layer's training
    narrow, least squares, narrow, no refit   the same neurons, with half of the refit or none of it
    narrow, tokens     the default for `units`, neurons and tokens, at the parameters of the other cuts: a job from its score to
                       its refit. It keeps the tokens that the text has, and holds a tenth of the text out
    tp taylor          Torch-Pruning's pruner on each MLP with its group Taylor importance; the ranking is the one that
                       LLM-Pruner calls param_first
    tp mix             the same with LLM-Pruner's default, param_mix: |w g - w² E[g²] / 2| (LLM-Pruner itself wants
                       transformers 4 and a copy of Torch-Pruning of its own). The second term is so small that the same
                       neurons are cut
    tp hessian, tp magnitude   Torch-Pruning's two other importances for linear layers
    tp group norm      GroupNormPruner: half of the tokens train the base with its regulariser (AdamW, 1e-3), then it cuts by
                       group norm, and half are left for recovery
    tp taylor, refit; tp hessian, refit   Torch-Pruning's neurons, this engine's refit
    tp taylor, least squares   the same without each layer's training
    oto hesso          only-train-once: HESSO, AdamW with next token, chooses neurons and shrinks them to zero while it trains,
                       from a tenth to a half of all the tokens, in 10 periods; then its subnet is taken. Some layers may keep
                       more than others. It imports modules that torch has moved and calls `cuda`: `stand_ins` mends that here
Torch-Pruning and only-train-once cut each MLP as a graph of its own: what Torch-Pruning's graph of the whole model makes here by
default does not run, and only-train-once makes none.
Recoveries:
    narrow             this engine's default: mean of next token and KL to the base, Muon
    adamw              transformers' Trainer, next token, AdamW, linear decay
    lora published     peft as LLM-Pruner sets it: rank 8, alpha 16, dropout 0.05, all projections, 1e-4
    lora               the same with its rate tuned
    modelopt kd        ModelOpt's KDTrainer: KL to the base
    gkd kl             TRL's GKDTrainer on the corpus (lmbda 0) with beta 0, which is KL to the base; `gkd` is its default,
                       beta 0.5, twice as slow. TRL's DistillationTrainer learns from the student's own text only
All train in blocks of 512 tokens, in batches of 2,048 or 4,096 as the arm says, with warm-up and linear decay to zero, bfloat16
where this engine would, gradients clipped to 1. TRL would checkpoint activations by default; that is off, as it costs time. Peak
rates of the peers are tuned on a quarter of the tokens, seed 0: 3e-4, 1e-3 and 3e-3 (LoRA from 1e-3), and further while the best
is at an end; for each cut and recovery but those in TUNED_ON, in batches of 4,096. HESSO takes AdamW's. GroupNormPruner's
strength is tuned likewise, around its default, by the loss after the recovery. This engine's rate is its default, which was once
found on this very base.

Losses are nats a token on the validation split, minus the untouched base's; where tokens are cut, nats of the same text for each
of the base's tokens. Each cut, recovery and probe is a process of its own: seconds of wall and of processor for the work alone,
without imports and reading, and the process's peak of resident memory, all its imports included. Finished ones are kept in
bench/out/peers.json and not run again; bench/results/peers.json is the one behind the README.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine sets it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from quality import BASE, CALIBRATION, HERE, LENGTH, MEASURED, TRAIN, clock, read, recover, since
from tokenizers import Tokenizer

from narrow_engine import corpus, importance, models, reconstruct, skills, train, vocabulary
from narrow_engine.plan import make_plan, whole_plan
from narrow_engine.run import Run
from narrow_engine.slice import slice_model
from narrow_engine.spec import CompressionSpec

WORK, DOMAIN, KEEP = HERE / "out" / "peers", "python", 256
ARMS = [
    ("Narrow", "narrow", "narrow", 2048),
    ("Narrow, neurons and tokens", "narrow, tokens", "line", 2048),
    ("Narrow's cut; ModelOpt KDTrainer", "narrow", "modelopt kd", 2048),
    ("Narrow, least squares alone", "narrow, least squares", "narrow", 2048),
    ("Narrow, least squares alone", "narrow, least squares", "narrow", 4096),
    ("Narrow's least squares; ModelOpt KDTrainer", "narrow, least squares", "modelopt kd", 4096),
    ("Narrow's least squares; TRL GKD as KL", "narrow, least squares", "gkd kl", 4096),
    ("Narrow's neurons without refit; Narrow's recovery", "narrow, no refit", "narrow", 4096),
    ("Torch-Pruning, Taylor; AdamW", "tp taylor", "adamw", 2048),
    ("Torch-Pruning, Taylor; AdamW", "tp taylor", "adamw", 4096),
    ("Torch-Pruning, Taylor; Narrow's recovery", "tp taylor", "narrow", 4096),
    ("Torch-Pruning, Taylor; Narrow's least squares", "tp taylor, least squares", None, None),
    ("Torch-Pruning, Taylor; Narrow's refit and recovery", "tp taylor, refit", "narrow", 2048),
    ("Torch-Pruning, Hessian; Narrow's refit and recovery", "tp hessian, refit", "narrow", 2048),
    ("Torch-Pruning, GroupNormPruner; AdamW", "tp group norm", "adamw", 2048),
    ("only-train-once, HESSO", "oto hesso", None, None),
    ("Torch-Pruning, Hessian", "tp hessian", None, None),
    ("Torch-Pruning, magnitude", "tp magnitude", None, None),
    ("LLM-Pruner's recipe as published", "tp mix", "lora published", 4096),
    ("LLM-Pruner's recipe, rate tuned", "tp mix", "lora", 4096),
]
PARAMETERS = 4_263_168
"""Of every cut of neurons alone."""
RATES = {"lora": (1e-3, 3e-3, 1e-2)}
USUAL_RATES = (3e-4, 1e-3, 3e-3)
REGULARIZERS = (1e-4, 1e-2, 1.0)
"""Of GroupNormPruner; the first is its default."""
FIXED = {"narrow": None, "line": None, "lora published": 1e-4}
"""Peak rates that are not tuned."""
TUNED_ON = {
    ("narrow, least squares", "gkd kl"): ("narrow, least squares", "modelopt kd"),
    ("narrow", "modelopt kd"): ("narrow, least squares", "modelopt kd"),
    ("tp group norm", "adamw"): ("tp taylor", "adamw"),
}
"""Where a rate is taken over from another cut and recovery, which learns alike: to tune each would take another half hour."""


# Cuts


def torch_pruning(model, pruners: list) -> list[list[int]]:
    """Lets a pruner for each layer's MLP cut it in place; the neurons that are left."""
    kept = []
    for layer, pruner in zip(models.layers(model), pruners, strict=True):
        (group,) = pruner.step(interactive=True)
        gone = set(group[0].idxs)
        kept.append([neuron for neuron in range(model.config.intermediate_size) if neuron not in gone])
        group.prune()
        layer.mlp.intermediate_size = KEEP
    model.config.intermediate_size = KEEP
    model.zero_grad(set_to_none=True)
    return kept


def make_pruners(model, kind, **settings) -> list:
    """One for each MLP. What an MLP writes is ignored as the start of a group: it is the residual stream's."""
    ratio = 1 - KEEP / model.config.intermediate_size
    example = torch.zeros(1, 8, model.config.hidden_size)
    return [
        kind(layer.mlp, example, pruning_ratio=ratio, round_to=8, ignored_layers=[layer.mlp.down_proj], **settings)
        for layer in models.layers(model)
    ]


def gradients(model, blocks: corpus.Blocks) -> tuple[dict, dict]:
    """Means over the calibration sequences of each parameter's gradient and of its square."""
    count = CALIBRATION // LENGTH
    squares = {p: torch.zeros_like(p) for p in model.parameters()}
    sums = {p: torch.zeros_like(p) for p in model.parameters()}
    for number in range(count):
        ids = blocks.batch(number, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        for p in model.parameters():
            sums[p] += p.grad / count
            squares[p] += p.grad.square() / count
        model.zero_grad(set_to_none=True)
    return sums, squares


def cut_by_torch_pruning(model, blocks: corpus.Blocks, criterion: str) -> list[list[int]]:
    import torch_pruning as tp

    if criterion == "magnitude":
        score = tp.importance.GroupMagnitudeImportance(p=2)
    elif criterion == "taylor":
        score = tp.importance.GroupTaylorImportance()
        for number in range(0, CALIBRATION // LENGTH, 8):
            ids = blocks.batch(number, 8)
            model(input_ids=ids, labels=ids).loss.backward()
    else:
        first, second = gradients(model, blocks)
        # Torch-Pruning's Hessian is w² h with h in `grad`; |w (g - w h / 2)| is its Taylor with that for the gradient.
        score = tp.importance.GroupHessianImportance() if criterion == "hessian" else tp.importance.GroupTaylorImportance()
        for p in model.parameters():
            p.grad = second[p] if criterion == "hessian" else first[p] - p.detach() * second[p] / 2
    return torch_pruning(model, make_pruners(model, tp.pruner.BasePruner, importance=score))


def cut_by_group_norm(model, blocks: corpus.Blocks, strength: float, tokens: int) -> list[list[int]]:
    import torch_pruning as tp
    from transformers import TrainerCallback

    score = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")  # as in its own benchmarks
    pruners = make_pruners(model, tp.pruner.GroupNormPruner, importance=score, reg=strength)

    class Regularize(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__) -> None:
            for pruner in pruners:
                pruner.regularize(pruner.model)

    stock_trainer(model, blocks, tokens, 1e-3, 2048, callbacks=[Regularize()], schedule="constant_with_warmup")
    return torch_pruning(model, pruners)


@contextmanager
def stand_ins():
    """What only-train-once asks of torch and is no longer there: modules of its ONNX export, and a GPU."""
    from torch.onnx._internal.torchscript_exporter import _globals
    from torch.onnx._internal.torchscript_exporter import utils as exporter

    sys.modules["torch.onnx._globals"] = _globals
    torch.onnx._optimize_graph = exporter._optimize_graph
    cuda, torch.Tensor.cuda = torch.Tensor.cuda, lambda tensor: tensor
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda


def cut_by_hesso(model, blocks: corpus.Blocks, rate: float, tokens: int) -> None:
    from only_train_once import OTO
    from only_train_once.optimizer import HESSO

    width = model.config.hidden_size
    graphs = [OTO(layer.mlp, torch.randn(1, 8, width)) for layer in models.layers(model)]
    groups = []
    for number, graph in enumerate(graphs):
        for group in graph._graph.get_param_groups():
            names = {"id": f"{number} {group['id']}", "p_names": [f"{number} {name}" for name in group["p_names"]]}
            groups.append({**group, **names})
    seen = {p for group in groups for p in group["params"]}
    rest = {name: p for name, p in model.named_parameters() if p not in seen}
    same = {"p_names": list(rest), "params": list(rest.values()), "p_transform": [1] * len(rest)}
    flags = {"is_prunable": False, "is_auxiliary": False, "auxiliary_ngs": [], "num_groups": 1}
    groups.append({"id": "rest", "op": "rest", **same, **flags})
    steps = tokens // 2048
    optimizer = HESSO(
        groups,
        variant="adamw",
        lr=rate,
        weight_decay=0.0,
        target_group_sparsity=1 - KEEP / model.config.intermediate_size,
        start_pruning_step=steps // 10,
        pruning_steps=max(10, 4 * steps // 10),
        pruning_periods=10,
    )
    low = train.training_dtype(torch.device("cpu"))
    model.train()
    for step in range(steps):
        optimizer.set_learning_rate(rate * train._rate(step, steps, "linear"))
        ids = blocks.batch(step * 2048 // LENGTH, 2048 // LENGTH)
        with torch.autocast("cpu", low, enabled=low != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    ids = blocks.batch(0, 1)
    whole = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as folder:
        for graph in graphs:
            graph.construct_subnet(out_dir=folder, save_full_group_sparse_model=False)
    assert torch.allclose(whole, model(input_ids=ids).logits, atol=1e-4), "its subnet is another model"


def refit(base, small, plan, blocks: corpus.Blocks, kind: str) -> None:
    if kind != "no refit":
        passes = {"passes": 0} if kind == "least squares" else {}
        reconstruct.refit(base, small, plan, blocks, CALIBRATION, lambda *_: None, **passes)


def narrow_cut(base, blocks: corpus.Blocks, kind: str, seed: int):
    found = importance.collect(base, blocks, CALIBRATION, False, lambda *_: None)
    plan = make_plan(models.config_dict(base), importance.CRITERIA["reconstruction"](base, found, seed), {"neuron": KEEP})
    small = slice_model(base, plan)
    refit(base, small, plan, blocks, kind)
    return small


def make_cut(name: str, base, training, seed: int, strength: float | None, rate: float | None, tokens: int):
    blocks = corpus.Blocks(training.tokens, LENGTH, seed)
    name, _, kind = name.partition(", ")
    if name == "narrow":
        return narrow_cut(base, blocks, kind, seed)
    model = slice_model(base, whole_plan(models.config_dict(base)))
    model.config.use_cache = False
    if name == "tp group norm":
        cut_by_group_norm(model, corpus.Blocks(training.tokens, LENGTH, seed + 2), strength, tokens)
        return model
    if name == "oto hesso":
        with stand_ins():
            cut_by_hesso(model, corpus.Blocks(training.tokens, LENGTH, seed + 1), rate, tokens)
        return model
    kept = cut_by_torch_pruning(model, blocks, name.removeprefix("tp "))
    plan = whole_plan(models.config_dict(base)).model_copy(update={"neurons": kept})
    ours = slice_model(base, plan)
    ids = blocks.batch(0, 1)
    assert torch.allclose(ours(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4), "the two slice differently"
    if kind:
        refit(base, ours, plan, blocks, kind)
        return ours
    return model


# Recoveries


def arguments(tokens: int, rate: float, batch: int, schedule: str, folder: str) -> dict:
    """Of transformers' Trainer and those built on it: what this engine's loop does, as far as they have it."""
    steps = tokens // batch
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch // LENGTH,
        "learning_rate": rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": max(1, round(train.WARM_UP * steps)),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": train.training_dtype(torch.device("cpu")) == torch.bfloat16,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def rows_of(blocks: corpus.Blocks, tokens: int) -> list[dict]:
    """The blocks that this engine's loop would read, each with its next tokens: 512 predictions from 513 tokens."""
    ids = blocks.batch(0, tokens // LENGTH)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def stock_trainer(model, blocks, tokens, rate, batch, callbacks=(), schedule="linear") -> list[float]:
    from transformers import Trainer, TrainingArguments

    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(**arguments(tokens, rate, batch, schedule, folder))
        Trainer(model=model, args=settings, train_dataset=rows_of(blocks, tokens), callbacks=list(callbacks)).train()
    model.eval()
    return since(started)


def lora(model, blocks, tokens, rate, batch):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer  # noqa: F401  what it takes to import is not counted

    started = clock()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=names, bias="none", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    stock_trainer(adapted, blocks, tokens, rate, batch)
    return adapted.merge_and_unload().eval(), since(started)


def gkd(model, teacher, blocks, tokens, rate, batch, **settings) -> list[float]:
    from datasets import Dataset
    from transformers import AutoTokenizer, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows_of(blocks, tokens)])
    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        GKDTrainer(
            model=model,
            teacher_model=teacher,
            args=GKDConfig(**arguments(tokens, rate, batch, "linear", folder), lmbda=0.0, max_length=None, **settings),
            data_collator=default_data_collator,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(BASE),
        ).train()
    model.eval()
    return since(started)


def modelopt_kd(model, teacher, blocks, tokens, rate, batch) -> list[float]:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        KDTrainer(
            model=model,
            args=TrainingArguments(**arguments(tokens, rate, batch, "linear", folder)),
            train_dataset=rows_of(blocks, tokens),
            distill_args={"teacher_model": teacher},
        ).train()
    model.eval()
    return since(started)


def make_recovery(name: str, model, training, seed: int, rate: float | None, tokens: int, batch: int):
    """The trained model and what training took."""
    blocks = corpus.Blocks(training.tokens, LENGTH, seed + 1)
    teacher = models.load_model(BASE) if name in ("narrow", "gkd", "gkd kl", "modelopt kd") else None
    if name == "narrow":
        return model, recover(model, blocks, train.Settings(tokens, batch, "mixed", 1.0, "muon"), teacher)
    if name == "adamw":
        return model, stock_trainer(model, blocks, tokens, rate, batch)
    if name.startswith("lora"):
        return lora(model, blocks, tokens, rate, batch)
    if name == "modelopt kd":
        return model, modelopt_kd(model, teacher, blocks, tokens, rate, batch)
    return model, gkd(model, teacher, blocks, tokens, rate, batch, beta=0.0 if name == "gkd kl" else 0.5)


# The line of a job: what cuts tokens needs a tokenizer of its own


def job(folder: Path, seed: int, tokens: int) -> Run:
    """A job of this engine with its default units, in `folder`."""
    spec = CompressionSpec.model_validate(
        {
            "base": {"path": BASE},
            "target": {"path": TRAIN[DOMAIN]},
            "budget": {"parameters": PARAMETERS},
            "method": {"recover": {"tokens": tokens}},
            "seed": seed,
        }
    )
    return Run(spec, folder, lambda *_: None)


def run_stages(line: Run, first: str, last: str) -> list[float]:
    """What they took."""
    from narrow_engine.pipeline import LINE  # it takes 300 MiB, mostly for ONNX

    names = [stage.name for stage in LINE]
    started = clock()
    for stage in LINE[names.index(first) : names.index(last) + 1]:
        if stage.wanted(line.spec):
            line.out(stage.name).mkdir(parents=True)
            stage.run(line, line.out(stage.name))
    return since(started)


def loss_beside_base(line: Run, model) -> float:
    """Nats of the validation split for each of the base's tokens. Both read the same text, each in its own tokens: what the
    stretches lose at their ends by that is made up for by the base's loss on the same."""
    base, read_anew = models.load_model(BASE), Tokenizer.from_file(str(line.out("load") / "tokenizer" / "tokenizer.json"))
    whole = documents("validation")
    path = HERE / "data" / f"{DOMAIN}.validation.jsonl.gz"
    small = corpus.tokenize(path, "text", read_anew, 0).documents
    widths = (
        vocabulary.widths(Tokenizer.from_file(str(BASE / "tokenizer.json")), base.config.vocab_size),
        vocabulary.widths(read_anew, model.config.vocab_size),
    )
    stretches = corpus.sample(whole, MEASURED, LENGTH, 0)
    sides = corpus.Reading(whole, small, widths).at(stretches)
    of_base, of_model = (
        skills.measure(m, [], side, LENGTH, lambda *_: None)[0] for m, side in zip((base, model), sides, strict=True)
    )
    return of_model.per(of_base).mean_loss() - of_base.mean_loss() + skills.loss_of(base, stretches, LENGTH)


# Tools that cut no model here

PROBES = {
    "Torch-Pruning 1.6.1, the whole model": (
        "import torch, torch_pruning as tp; from narrow_engine import models; from quality import BASE; "
        "m = models.load_model(BASE); m.requires_grad_(True); "
        "tp.DependencyGraph().build_dependency(m, torch.zeros(1, 8, dtype=torch.long), output_transform=lambda o: o.logits); "
        "p = tp.pruner.BasePruner(m, torch.zeros(1, 8, dtype=torch.long), tp.importance.GroupMagnitudeImportance(), "
        "ignored_layers=[m.lm_head], output_transform=lambda o: o.logits); p.step(); m(torch.zeros(1, 8, dtype=torch.long))"
    ),
    "only-train-once 3.0.1": "import only_train_once",
    "only-train-once 3.0.1, the whole model": (
        "import torch, peers; from narrow_engine import models; from quality import BASE; m = models.load_model(BASE)\n"
        "with peers.stand_ins():\n from only_train_once import OTO\n OTO(m, torch.zeros(1, 8, dtype=torch.long))"
    ),
    "nvidia-modelopt 0.47.0, mcore_minitron": (
        "import torch, modelopt.torch.prune as mtp; from narrow_engine import models; from quality import BASE; "
        "m = models.load_model(BASE); mtp.prune(m, mode='mcore_minitron', constraints={'params': '60%'}, "
        "dummy_input=torch.zeros(1, 8, dtype=torch.long), config={'score_func': lambda m: 0.0})"
    ),
    "nvidia-modelopt 0.47.0, fastnas": (
        "import torch, modelopt.torch.prune as mtp; from narrow_engine import models; from quality import BASE; "
        "m = models.load_model(BASE); mtp.prune(m, mode='fastnas', constraints={'params': '60%'}, "
        "dummy_input=torch.zeros(1, 8, dtype=torch.long), config={'score_func': lambda m: 0.0, 'data_loader': []})"
    ),
}
PROBE_SECONDS = 120


def probe(code: str) -> dict:
    """The last line of what a tool says when it is asked."""
    started = clock()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}"],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
        said = "ran" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:300]
    except subprocess.TimeoutExpired:
        said = f"no result in {PROBE_SECONDS} s"
    return {"said": said, "seconds": since(started)}


# Processes


def documents(name: str) -> corpus.Documents:
    """A dataset's tokens, made once: reading them takes memory that would hide a peak."""
    if not (WORK / f"{name}.documents.npz").exists():
        path = TRAIN[DOMAIN] if name == "training" else HERE / "data" / f"{DOMAIN}.validation.jsonl.gz"
        corpus.save(read(path), WORK, name)
    return corpus.load(WORK, name)


def peak() -> int:
    """MiB of this process at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(task: dict, threads: int) -> dict:
    """One cut or recovery, in this process."""
    torch.set_num_threads(threads)
    training, seed = documents("training"), task.get("seed", 0)
    torch.manual_seed(seed)
    if task["step"] in ("base", "masks"):
        model, result = models.load_model(Path(task.get("load", BASE))), {}
    elif task["cut"] == "narrow, tokens":
        return run_job(task)
    elif task["step"] == "cut":
        base = models.load_model(BASE)
        imported = peak()
        started = clock()
        model = make_cut(task["cut"], base, training, seed, *(task.get(k) for k in ("strength", "rate", "tokens")))
        result = {"seconds": since(started), "peak_mib": peak(), "before_mib": imported}
        model.save_pretrained(task["save"])
    else:
        model = models.load_model(Path(task["load"]))
        imported = peak()
        settings = (task["rate"], task["tokens"], task["batch"])
        model, seconds = make_recovery(task["recovery"], model, training, seed, *settings)
        result = {"seconds": seconds, "peak_mib": peak(), "before_mib": imported}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    held_out = corpus.sample(documents("validation"), MEASURED, LENGTH, 0)
    model.config.use_cache = False
    return {**result, "loss": round(skills.loss_of(model, held_out, LENGTH), 4)}


def run_job(task: dict) -> dict:
    """The cut or the recovery of a job. The curve's held-out loss is measured on one stretch only: the other arms have none."""
    from narrow_engine import earlier, stages

    stages.VALIDATION_TOKENS = 1
    if task["step"] == "cut":
        folder = Path(task["save"])
        line = job(folder, task["seed"], task["tokens"])
        run_stages(line, "load", "measure_base")
        imported = peak()
        seconds = run_stages(line, "score", "reconstruct")
        model, result = line.models["reconstruct"], {"keep": earlier.allocation(line).keep}
    else:
        line = job(Path(task["load"]), task["seed"], task["tokens"])
        imported = peak()
        seconds, result = run_stages(line, "recover", "recover"), {}
        model = line.models["recover"]
    result |= {"seconds": seconds, "peak_mib": peak(), "before_mib": imported}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return {**result, "loss": round(loss_beside_base(line, model), 4)}


class Results:
    """Rows by their keys, kept in a file; what is not there is run."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.rows = json.loads(path.read_text()) if path.exists() else []

    def get(self, key: dict, **more) -> dict:
        found = self.known(**key)
        if found is None:
            if key["step"] == "probe":
                answer = probe(PROBES[key["tool"]])
            else:
                if key["step"] == "masks":
                    more["load"] = str(WORK / key["method"])
                    command = [more.pop("python"), "-W", "ignore", HERE / "peers_masks.py", key["method"], BASE]
                    tokens = WORK / "training.tokens.npy"
                    done = subprocess.run([*command, tokens, more["load"]], stdout=subprocess.PIPE, text=True, check=True)
                    masked = json.loads(done.stdout.strip().splitlines()[-1])
                command = [sys.executable, "-W", "ignore", __file__, "--threads", str(self.threads)]
                task = {**key, **more}
                if key["step"] == "tuning":
                    task["step"] = "recovery" if "recovery" in key else "cut"
                done = subprocess.run([*command, "--task", json.dumps(task)], stdout=subprocess.PIPE, text=True, check=True)
                answer = json.loads(done.stdout.strip().splitlines()[-1])
                if key["step"] == "masks":
                    answer |= masked
            found = {**key, **answer}
            if "loss" in found and key["step"] != "base":
                found["gap"] = round(found["loss"] - self.get({"step": "base"})["loss"], 4)
            self.rows.append(found)
            self.path.write_text(json.dumps(self.rows, indent=1))
            print(json.dumps(found), flush=True)
        return found

    def known(self, **key) -> dict | None:
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def tuned(self, values: tuple, row) -> float:
        """The value whose row has the lowest loss, looking further while it is at an end of what was tried."""
        losses = {value: row(value)["gap"] for value in values}
        while len(losses) < 7:
            best = min(losses, key=losses.get)
            if best == max(losses):
                further = best / max(v for v in losses if v < best)
            elif best == min(losses):
                further = best / min(v for v in losses if v > best)
            else:
                break
            value = float(f"{best * further:.0e}")
            losses[value] = row(value)["gap"]
        return min(losses, key=losses.get)

    def cut(self, name: str, seed: int, tokens: int) -> tuple[dict, Path]:
        key = {"step": "cut", "cut": name, "seed": seed}
        if name == "narrow, tokens":
            key["tokens"] = tokens
        if name == "tp group norm":
            key |= {"tokens": tokens // 2, "strength": self.strength(tokens // 4)}
        if name == "oto hesso":
            key |= {"tokens": tokens, "rate": self.rate("tp taylor", "adamw", tokens // 4)}
        return self.saved(key)

    def saved(self, key: dict) -> tuple[dict, Path]:
        """A cut and where it is: made again where the row is there and the model is not."""
        words = [key["cut"], *(f"{key[name]:g}" for name in ("strength", "rate", "tokens") if name in key), str(key["seed"])]
        folder = WORK / "-".join(words).replace(", ", "-").replace(" ", "-")
        if not folder.exists():
            self.rows = [r for r in self.rows if any(r.get(k) != v for k, v in key.items()) or "recovery" in r]
        return self.get(key, save=str(folder)), folder

    def strength(self, tokens: int) -> float:
        """GroupNormPruner's, by the loss after half of `tokens` with its regulariser and half of recovery."""
        key = {"step": "tuning", "cut": "tp group norm", "seed": 0, "tokens": tokens // 2}
        rate = self.rate("tp taylor", "adamw", tokens)

        def row(strength: float) -> dict:
            _, folder = self.saved({**key, "strength": strength})
            return self.get({**key, "strength": strength, "recovery": "adamw", "batch": 2048, "rate": rate}, load=str(folder))

        return self.tuned(REGULARIZERS, row)

    def rate(self, cut: str, name: str, tokens: int) -> float | None:
        """The peak rate of a recovery, tuned on `tokens` in batches of 4,096."""
        if name in FIXED:
            return FIXED[name]
        cut, name = TUNED_ON.get((cut, name), (cut, name))
        key = {"step": "tuning", "cut": cut, "recovery": name, "seed": 0, "tokens": tokens, "batch": 4096}
        return self.tuned(
            RATES.get(name, USUAL_RATES),
            lambda rate: self.known(**key, rate=rate) or self.trained({**key, "rate": rate}, tokens * 4),
        )

    def trained(self, key: dict, tokens: int) -> dict:
        """`tokens` are those of the whole arm."""
        return self.get(key, load=str(self.cut(key["cut"], key["seed"], tokens)[1]))

    def recovery(self, cut: str, name: str, batch: int, seed: int, tokens: int) -> dict:
        spent = tokens // 2 if cut == "tp group norm" else 0
        rate = self.rate(cut, name, tokens // 4)
        key = {
            "step": "recovery",
            "cut": cut,
            "recovery": name,
            "seed": seed,
            "tokens": tokens - spent,
            "batch": batch,
            "rate": rate,
        }
        return self.known(**key) or self.trained(key, tokens)


def table(results: Results, seeds: list[int], tokens: int, arms: list) -> str:
    """Mean over seeds, and the range where there are several, as Markdown."""

    def spread(values: list[float]) -> str:
        mean = f"{sum(values) / len(values):+.3f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):+.3f} … {max(values):+.3f})"

    def seconds(rows: list[dict]) -> str:
        return "{:.0f} ({:.0f})".format(*(sum(r["seconds"][i] for r in rows) / len(rows) for i in (0, 1)))

    lines = [
        f"| tools | after the cut | after {tokens:,} tokens | batch | rate | cut: s (CPU), MiB | recovery: s (CPU), MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, cut, recovery, batch in arms:
        cuts = [results.cut(cut, seed, tokens)[0] for seed in seeds]
        line = f"| {label} | {spread([r['gap'] for r in cuts])} |"
        cost = f"{seconds(cuts)}, {max(r['peak_mib'] for r in cuts):,}"
        if cut == "oto hesso":
            lines.append(f"| {label} | | {spread([r['gap'] for r in cuts])} | 2,048 | {cuts[0]['rate']:g} | {cost} | |")
            continue
        if not recovery:
            lines.append(f"{line} | | | {cost} | |")
            continue
        ends = [results.recovery(cut, recovery, batch, seed, tokens) for seed in seeds]
        rate = "default" if ends[0]["rate"] is None else f"{ends[0]['rate']:g}"
        spent = f"{seconds(ends)}, {max(r['peak_mib'] for r in ends):,}"
        lines.append(f"{line} {spread([r['gap'] for r in ends])} | {batch:,} | {rate} | {cost} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=327_680)
    parser.add_argument("--only", default="", help="arms whose name has this in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "peers.json")
    parser.add_argument("--llm-compressor", help="the Python of the venv that has it; without, it is left out")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if options.task:
        print(json.dumps(run(json.loads(options.task), options.threads)))
        return
    documents("training")
    results = Results(options.out, options.threads)
    results.get({"step": "base"})
    arms = [arm for arm in ARMS if options.only in arm[0]]
    for _, cut, recovery, batch in arms:
        for seed in options.seeds:
            results.cut(cut, seed, options.tokens)
            if recovery:
                results.recovery(cut, recovery, batch, seed, options.tokens)
    probes = [results.get({"step": "probe", "tool": tool}) for tool in (() if options.only else PROBES)]
    methods = ("wanda", "sparsegpt") if options.llm_compressor else ()
    masks = [results.get({"step": "masks", "method": method}, python=options.llm_compressor) for method in methods]
    print(table(results, options.seeds, options.tokens, arms))
    for row in masks:
        told = "{gap:+.3f}, {zeros:.0%} of MLP weights zero, {parameters:,} parameters and {bytes:,} bytes as before"
        print(f"| llm-compressor, {row['method']} | {told.format(**row)} |")
    print("\n".join(f"| {row['tool']} | {row['said']} |" for row in probes))


if __name__ == "__main__":
    main()
