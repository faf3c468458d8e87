"""The stages that measure: the base before anything, and what is made of it beside its controls.

Like the others in `stages`, each is a function of the run and of the folder that it must fill.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from narrow_engine import answers, earlier, footprint, importance, relearning, skills
from narrow_engine import locality as sharing
from narrow_engine import reconstruct as least_squares
from narrow_engine.earlier import base, untouched
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.footprint import SHARED_TOKENS
from narrow_engine.models import config_dict, greedy
from narrow_engine.plan import Scores, make_plan
from narrow_engine.report.model import Locality, LocalityCurve, Relearning, Sample, Skill
from narrow_engine.run import Run, write_json
from narrow_engine.slice import compare, renew, slice_model
from narrow_engine.spec import DatasetPath, Unit, chosen_units, relearned
from narrow_engine.spec import controls as wanted_controls
from narrow_engine.stages import require_exact, train_base

PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLES = 32, 48, 3


def measure_base(run: Run, out: Path) -> None:
    """The base's loss on every skill: what the rest is measured against, and an early end for data that hold nothing.

    It is measured as it was brought. What is scored, cut and taught by from here on may be the base with its vocabulary
    trimmed: the same model, but for the tokens that are gone, which is checked.
    """
    losses, whole = {}, untouched(run)
    for name, skill in earlier.skills(run).items():
        documents = earlier.documents(run, name, "base")
        if not (documents.lengths > 1).any():
            raise NarrowError("text_too_short", f"The documents of {name!r} are all shorter than two tokens.")
        measured = skills.measure(whole, [], documents, run.spec.block_tokens, run.progress("measure_base"))[0]
        measured.save(out / f"{skill.file}.npz")
        losses[name] = measured.mean_loss()
        run.emit(
            "progress",
            "measure_base",
            f"{name}: {losses[name]:.3f} nats",
            {"done": len(losses), "total": len(earlier.skills(run))},
        )
    write_json(out / "skills.json", losses)
    tokens = earlier.info(run)["tokens"]
    if tokens:
        parity = compare(whole, base(run), earlier.probe(run), tokens)
        require_exact(parity, "trimming the vocabulary")
        write_json(out / "parity.json", parity.model_dump())


def controls(run: Run, out: Path) -> None:
    """What the result is compared with: chance, and the base that was trained alike; each measured on every skill."""
    make = {"random": _by_chance, "trained": _trained_base}
    run.models.pop("recover", None)  # it is read again when it is measured
    for control in wanted_controls(run.spec):
        model = make[control](run)
        for name, skill in earlier.skills(run).items():
            found = skills.measure(model, [], earlier.documents(run, name), run.spec.block_tokens, run.progress("controls"))[0]
            found.save(out / f"{control}.{skill.file}.npz")
        del model


def _by_chance(run: Run, phase: str = "controls") -> PreTrainedModel:
    """Units drawn at random, as many as the plan keeps, refitted as the plan's were."""
    config = config_dict(base(run))
    keep: dict[Unit, int] = {unit: count for unit, count in earlier.allocation(run).keep.items() if unit != "token"}
    made = make_plan(config, importance.random.draw(dimensions(config), run.spec.seed + 1), keep)
    small = slice_model(base(run), made)
    if run.spec.method.refit:
        tokens = run.spec.method.calibration_tokens
        least_squares.refit(base(run), small, made, earlier.calibration(run), tokens, run.progress(phase))
    return small


def _trained_base(run: Run) -> PreTrainedModel:
    """The base after as many tokens of the target as the result has seen, those of group lasso among them."""
    method = run.spec.method
    tokens = method.recover.tokens + (method.regularizer.tokens if method.regularizer else 0)
    return train_base(run, "controls", 2, tokens)[0]


def measure(run: Run, out: Path) -> None:
    """Base, cut and recovered model on every skill, side by side on the same text, and a sample of what they write."""
    rows, seed, measured = {}, run.spec.seed, _side_by_side(run)
    for name, skill in earlier.skills(run).items():
        first = skills.Measured.load(run.out("measure_base") / f"{skill.file}.npz")
        beside = measured[name]
        before, after = (variant.per(first) for variant in beside[1:])
        kept = skills.retention(first, after, seed)
        beside_it = {
            control: skills.Measured.load(run.out("controls") / f"{control}.{skill.file}.npz").per(first)
            for control in wanted_controls(run.spec)
        }
        trained = skills.retention(first, beside_it["trained"], seed) if "trained" in beside_it else None
        count = int((first.tokens > 0).sum())
        own = beside[0].tokens
        rows[name] = Skill(
            role=skill.role,
            documents=count,
            tokens=int(first.tokens.sum()),
            base=skills.fit(first, seed),
            cut=skills.fit(before, seed),
            recovered=skills.fit(after, seed),
            **{control: skills.fit(found, seed) for control, found in beside_it.items()},
            retention=kept,
            agreement=skills.interval(after.agree, own, seed),
            kl=skills.interval(after.kl, own, seed),
            note=skills.note(skill.role, kept, count, float(own.sum() / first.tokens.sum()), trained),
        ).model_dump()
        if name == run.spec.target_name and "random" in beside_it:
            worth = skills.interval(beside_it["random"].loss - before.loss, first.tokens, seed)
            if worth.low <= 0:
                run.emit(
                    "notice",
                    "measure",
                    f"Units drawn at random, in the same shape and refitted alike, do as well on {name} before training "
                    f"({worth.value:+.3f} nats, from {worth.low:+.3f} to {worth.high:+.3f}): which units stay makes no "
                    "difference that this text could show.",
                    {"code": "no_better_than_chance"},
                )
    write_json(out / "skills.json", rows)
    write_json(out / "samples.json", [sample.model_dump() for sample in _samples(run)])
    run.models.pop("recover", None)  # whoever asks for it reads it again


def _side_by_side(run: Run) -> dict[str, list[skills.Measured]]:
    """Base, cut and recovered model on every skill. Where there is no room for all three, the base reads the text with each."""
    stages, found = ("reconstruct", "recover"), dict[str, list[skills.Measured]]()
    apart = footprint.together(earlier.job(run)) == 1
    if apart:
        run.models.pop("recover", None)  # it is read again when it is its turn
    whole = base(run)
    for together in [stages[:1], stages[1:]] if apart else [stages]:
        models = [earlier.model(run, stage) for stage in together]
        for name in earlier.skills(run):
            documents, tell = earlier.documents(run, name), run.progress("measure")
            of_base, *others = skills.measure(whole, models, documents, run.spec.block_tokens, tell)
            found.setdefault(name, [of_base]).extend(others)
        for stage in together:
            del run.models[stage]
        del models
    return found


def answer(run: Run, out: Path) -> None:
    """What base, cut and result write to the prompts of skills that have answers, and how often it is the answer."""
    info = earlier.info(run)
    of_base = earlier.reader(run.spec.base.path, info["model"]["config"])
    of_result = of_base if info["tokens"] is None else earlier.reader(earlier.tokenizer_folder(run), config_dict(base(run)))
    prompts: dict[str, list[answers.Prompt]] = {}
    for name, skill in earlier.skills(run).items():
        if skill.data.answer is None:
            continue
        seen = earlier.training(run) if name == run.spec.target_name else None
        held_out = answers.pick(skill.data, earlier.documents(run, name, "base"), seen)
        room = dimensions(info["model"]["config"]).context - skill.data.answer.tokens
        found = [p for p in held_out if all(len(answers.encode(side, p.text)) <= room for side in (of_base, of_result))]
        if len(found) < len(held_out) or not found:
            run.emit("notice", "answer", _unasked(name, len(held_out), len(found), room), {"code": "not_asked"})
        if found:
            prompts[name] = found
    flags: dict[str, list[list[bool]]] = {name: [] for name in prompts}
    # One after the other, for want of memory.
    for stage, reader in (("load", of_base), ("reconstruct", of_result), ("recover", of_result)) if prompts else ():
        model = untouched(run) if stage == "load" else earlier.model(run, stage)
        for name, texts in prompts.items():
            flags[name].append(_right(run, model, reader, earlier.skills(run)[name].data, texts))
        del model
        run.models.pop(stage, None)
    write_json(out / "answers.json", {name: answers.judge(*found).model_dump() for name, found in flags.items()})


def _right(
    run: Run, model: PreTrainedModel, reader: earlier.Reader, data: DatasetPath, prompts: list[answers.Prompt]
) -> list[bool]:
    """Of each prompt, whether a model writes its answer."""
    asked = data.answer
    assert asked
    written = answers.write(model, reader, [prompt.text for prompt in prompts], asked, run.progress("answer"))
    return [answers.right(text, prompt.answer, asked.extract) for text, prompt in zip(written, prompts, strict=True)]


def _unasked(name: str, held_out: int, asked: int, room: int) -> str:
    if not held_out:
        return f"{name} has no whole row among what is held out: what models write to its prompts is not measured."
    return (
        f"{held_out - asked:,} of {held_out:,} prompts of {name} are not asked: they are longer than the {room:,} tokens that "
        "the model's context leaves beside an answer."
    )


def locality(run: Run, out: Path) -> None:
    """Which units the skills share, and what each loses as units go in the target's order."""
    spec, model, tell = run.spec, base(run), run.progress("locality")
    texts = {}
    for name in earlier.skills(run):
        halves = sharing.halves(earlier.documents(run, name), spec.block_tokens, spec.seed)
        if halves:
            texts[name] = halves
        else:
            told = f"{name} has too little text to halve: which units it shares with other skills is not measured."
            run.emit("notice", "locality", told, {"code": "not_compared"})
    units = [unit for unit in chosen_units(spec) if unit in earlier.scores(run)]
    steps = len(texts) + len(units)
    found: list[tuple[Scores, Scores]] = []
    for halves in texts.values():
        residual, step = "residual" in units, len(found)
        first, second = (sharing.scores(model, blocks, residual, lambda *_: tell(step, steps)) for blocks in halves)  # noqa: B023
        found.append((first, second))
    judged = {name: earlier.judged(run, name, SHARED_TOKENS // 2)[:2] for name in earlier.skills(run)}
    curves: list[LocalityCurve] = []
    for unit in units:
        step, order = len(texts) + len(curves), earlier.scores(run)
        curves.append(sharing.curve(model, unit, order, judged, spec.block_tokens, lambda *_: tell(step, steps)))  # noqa: B023
    made = Locality(skills=list(texts), overlaps=sharing.overlaps(found) if found else [], curves=curves)
    (out / "locality.json").write_text(made.model_dump_json())


def relearn(run: Run, out: Path) -> None:
    """Trains the result, a cut at random and fresh weights on each skill to forget, and counts the tokens until it is back."""
    spec, asked = run.spec, run.spec.relearn
    assert asked is not None
    rows: dict[str, Any] = {}
    run.models = {}  # none beside what is trained
    for name in relearned(spec):
        blocks = earlier.relearning_blocks(run, name)
        if blocks is None:
            continue
        judged = earlier.judged(run, name)
        makers: dict[str, Callable[[], PreTrainedModel]] = {
            "narrow": partial(earlier.copy, run, "recover"),  # which may be trained
            "fresh": partial(_fresh, run),
        }
        if spec.method.init != "fresh" and spec.method.units != ["token"]:
            makers["random"] = partial(_by_chance_alone, run)
        found = {
            who: relearning.learn(
                make,
                who == "fresh",
                blocks,
                asked,
                spec.method.recover,
                judged.base,
                folder=run.work("relearn") / f"{earlier.skills(run)[name].file}.{who}",
                emit=run.emit,
                check=run.check,
                validate=earlier.validator(run, name),
            )
            for who, make in makers.items()
        }
        rows[name] = Relearning(
            base=judged.base,
            within=asked.within,
            tokens=asked.tokens,
            text=blocks.count * blocks.length,
            narrow=found["narrow"],
            random=found.get("random"),
            fresh=found["fresh"],
            note=relearning.note(name, judged.base, asked, blocks.count * blocks.length, found["narrow"], found["fresh"]),
        ).model_dump()
    write_json(out / "relearning.json", rows)


def _by_chance_alone(run: Run) -> PreTrainedModel:
    return earlier.alone(run, _by_chance(run, "relearn"))


def _fresh(run: Run) -> PreTrainedModel:
    """The result's shape without anything of the base."""
    model = earlier.unfilled(run)
    renew(model, run.spec.seed + 2)
    return model


def _samples(run: Run) -> list[Sample]:
    """The beginning of held-out text, continued greedily by both models."""
    info = earlier.info(run)
    readers = [earlier.reader(run.spec.base.path, info["model"]["config"])]
    readers.append(
        readers[0] if info["tokens"] is None else earlier.reader(earlier.tokenizer_folder(run), config_dict(base(run)))
    )
    old = np.array(info["tokens"] or range(readers[0].size))
    documents, start = earlier.documents(run, run.spec.target_name), readers[1].start
    found = []
    # What was measured are stretches; those that begin where their document does read best.
    for index in sorted(range(len(documents)), key=lambda i: documents[i][0] != start)[:SAMPLES]:
        prompt = documents[index][:PROMPT_TOKENS].astype("int64")
        texts = []
        for model, reader, numbers in zip(
            (untouched(run), earlier.model(run, "recover")), readers, (old[prompt], prompt), strict=True
        ):
            run.check()
            ids = torch.from_numpy(numbers)[None].to(model.device)
            texts.append(reader.tokenizer.decode(greedy(model, ids, SAMPLE_TOKENS)))
        found.append(Sample(prompt=readers[1].tokenizer.decode(prompt.tolist()), base=texts[0], narrow=texts[1]))
    return found
