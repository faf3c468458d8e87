"""The model card: README.md of the result, for whoever finds the folder without its report."""

from narrow_engine.report.model import Report

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- narrow
- pruned
- {family}
---

# A narrow model for {target}

Cut from a larger {family} model for one domain with Narrow: {before:,} parameters became {after:,} ({share:.0%}).
It keeps {value:.1%} of the base's skill on {target} (95 % interval {low:.1%} to {high:.1%}; perplexity of the base ÷ its own).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

| skill | role | base loss | loss | retention | 95 % interval |
|---|---|---|---|---|---|
{rows}

Losses are nats a token on documents that were not trained on. What is not in this table was not measured, and a model
cut for one domain should be expected to have lost it.

How it was made: {units} scored by {importance}, {refit}, {tokens:,} tokens of recovery ({objective}), seed {seed}.
The whole account is in report.json and report.html beside this folder.
"""


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
        target=_plain(report.target),
        before=report.before.parameters,
        after=report.after.parameters,
        share=report.after.parameters / report.before.parameters,
        value=kept.value,
        low=kept.low,
        high=kept.high,
        rows=rows,
        units=" and ".join(f"{unit.replace('_', ' ')}s" for unit in method["units"]),
        importance=method["importance"],
        refit="least-squares refit" if method["refit"] else "no refit",
        tokens=report.provenance.recovery_tokens,
        objective=method["recover"]["objective"].replace("_", " "),
        seed=report.provenance.seed,
    )


def _plain(name: str) -> str:
    return "".join(c for c in name if c.isalnum() or c in " .+-_")
