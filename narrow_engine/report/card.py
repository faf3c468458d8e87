"""The model card: README.md of the result, for whoever finds the folder without its report."""

import json
import re

from narrow_engine.report.model import Report
from narrow_engine.spec import PLURAL

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- narrow
- {made_by}
- {family}
model-index:
- name: narrow-{slug}
  results:
  - task:
      type: text-generation
    dataset:
      name: {target_json}
      type: text
    metrics:
    - type: perplexity
      value: {perplexity:.4f}
      name: Perplexity on held-out text, per token of the base
    - type: retention
      value: {value:.4f}
      name: Perplexity of the base ÷ its own
{exact_match}---

# A narrow model for {target}

{made} for one domain with Narrow: {before:,} parameters became {after:,} ({share:.0%}).
It keeps {value:.1%} of the base's skill on {target} (95 % interval {low:.1%} to {high:.1%}; perplexity of the base ÷ its own).

With transformers 5 or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
{onnx}
| skill | role | base loss | loss | retention | 95 % interval |
|---|---|---|---|---|---|
{rows}

{answers}Losses are nats per token of the base on documents that were not trained on. A retention above 1 proves little: training
on narrow text improves any model on it, the uncut base too.

## Limits

{forgotten}What is not in this table was not measured, and a model cut for one domain should be expected to have lost it. What the
base gets wrong, this model gets wrong as well; the terms under which the base may be used are the base's.

## How it was made

{cut}, {tokens:,} tokens of training ({objective}), seed {seed}, from the base whose
files have the SHA-256 `{base}`{source}. The whole account is in report.json and report.html beside this folder.
"""

_ONNX = """
The same model for ONNX Runtime, in float32 with a KV cache, is in `../onnx`:

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("../onnx/model.onnx")
ids = np.array([tokenizer.encode("...")], dtype=np.int64)
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
for past in session.get_inputs()[3:]:  # empty at first; feed back the `present` outputs to go on
    feed[past.name] = np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32)
logits, *present = session.run(None, feed)
```
"""

_MADE = {
    "prune": "Cut from a larger {family} model",
    "distill": "Distilled from a larger {family} model",
    "scratch": "Trained from scratch in the shape of a smaller {family} model",
    "export": "A {family} model as it was brought, in other formats",
}


_TAGS = {"prune": "pruned", "distill": "distilled", "scratch": "trained-from-scratch", "export": "exported"}


def render_card(report: Report) -> str:
    """Markdown with the front matter that model hubs read. Names from users are kept to one line of plain text."""
    method = report.spec["method"]
    kept = report.skills[report.target].retention
    rows = "\n".join(
        f"| {_plain(name)} | {row.role} | {row.base.loss:.3f} | {row.recovered.loss:.3f} | {row.retention.value:.3f} "
        f"| {row.retention.low:.3f} – {row.retention.high:.3f} |"
        for name, row in report.skills.items()
    )
    return _TEMPLATE.format(
        family=report.family,
        base_model=f"base_model: {report.provenance.base_model}\n" if report.provenance.base_model else "",
        made_by=_TAGS[method.get("kind", "prune")],
        slug=re.sub(r"[^a-z0-9]+", "-", report.target.lower()).strip("-") or "model",
        target_json=json.dumps(_plain(report.target)),
        perplexity=report.skills[report.target].recovered.perplexity,
        made=_MADE[method.get("kind", "prune")].format(family=report.family),
        target=_plain(report.target),
        before=report.before.parameters,
        after=report.after.parameters,
        share=report.after.parameters / report.before.parameters,
        value=kept.value,
        low=kept.low,
        high=kept.high,
        rows=rows,
        exact_match=_exact_match(report),
        answers=_answers(report),
        forgotten="".join(f"{_plain(row.note)}\n\n" for row in report.relearning.values()),
        onnx=(_ONNX if "onnx" in report.parity else "") + _others(report),
        base=report.provenance.sha256("base"),
        source=_source(report),
        cut=_cut(report),
        tokens=report.provenance.recovery_tokens,
        objective=method["recover"]["objective"].replace("_", " "),
        seed=report.provenance.seed,
    )


def _others(report: Report) -> str:
    """The formats beside this folder."""
    found = sorted({load.format for load in report.runtimes} - {"safetensors"})
    if not found:
        return ""
    places = ", ".join(f"`../{form}`" for form in found)
    return f"\nIn other formats: {places}. `narrow run-model FOLDER PROMPT` runs any of them.\n"


def _source(report: Report) -> str:
    """Where the base is from, if it was fetched."""
    base = next((item for item in report.provenance.inputs if item.part == "base" and item.hub), None)
    return f", which are those of `{base.hub}` at the commit `{base.commit}`" if base else ""


def _exact_match(report: Report) -> str:
    """The target's answers as a metric, where it has any."""
    found = report.skills[report.target].answers
    if not found:
        return ""
    told = f"Held-out prompts answered, of {found.prompts:,}"
    return f"    - type: exact_match\n      value: {found.recovered.value:.4f}\n      name: {told}\n"


def _answers(report: Report) -> str:
    rows = [
        f"| {_plain(name)} | {found.prompts:,} | {found.base.value:.1%} | {found.recovered.value:.1%} "
        f"| {found.recovered.low:.1%} – {found.recovered.high:.1%} |"
        for name, row in report.skills.items()
        if (found := row.answers)
    ]
    if not rows:
        return ""
    head = ["| skill | prompts | the base answers | this model | 95 % interval |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n\n"


def _cut(report: Report) -> str:
    """What was cut and how, as the beginning of a sentence."""
    method = report.spec["method"]
    scored = " and ".join(PLURAL[unit] for unit in method["units"] if unit != "token")
    said = []
    if "token" in method["units"]:
        said.append(f"vocabulary trimmed from {report.before.vocabulary:,} to {report.after.vocabulary:,} tokens")
    init = method.get("init", "cut")
    if method.get("kind") == "export":
        said.append("nothing was cut")
    elif init == "fresh":
        said.append(f"fresh weights in a shape with fewer {scored}" if scored else "fresh weights")
    elif init == "layers":
        said.append("evenly spaced layers of the base")
    elif scored:
        said.append(f"{scored} scored by {method['importance']}, {'least-squares refit' if method['refit'] else 'no refit'}")
    words = ", ".join(said)
    return words[0].upper() + words[1:]


def _plain(text: str) -> str:
    """What a user named, or a sentence with such a name in it, as one line without markup."""
    return "".join(c for c in text if c.isalnum() or c in " .,:;?!%()+-_")
