"""The report's page and card say what the report says, and nothing that a user named becomes markup."""

import json
import re
from html.parser import HTMLParser

import narrow_client
import pytest
from huggingface_hub import ModelCard
from misbehaving import JOB
from narrow_client import models
from tiny import ROOT

from narrow_engine.report.card import render_card
from narrow_engine.report.model import Report
from narrow_engine.report.page import render_page
from narrow_engine.report.schema import schema

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def report() -> Report:
    return example()


def example() -> Report:
    size = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 100, "flops_per_token": 10}
    skill = {
        "documents": 40,
        "tokens": 9000,
        "base": {"loss": 2.0, "low": 1.75, "high": 2.25, "perplexity": 7.389},
        "cut": {"loss": 2.5, "low": 2.25, "high": 2.75, "perplexity": 12.18},
        "recovered": {"loss": 2.123, "low": 1.873, "high": 2.373, "perplexity": 8.356},
        "retention": {"value": 0.884, "low": 0.861, "high": 0.902},
        "agreement": {"value": 0.81, "low": 0.4, "high": 0.9},
        "kl": {"value": 0.123, "low": 0.1, "high": 0.9},
    }
    return Report.model_validate(
        {
            "target": "python",
            "family": "llama",
            "spec": {
                "method": {
                    "units": ["neuron"],
                    "importance": "fisher",
                    "refit": True,
                    "recover": {"objective": "mixed"},
                }
            },
            "before": {**size, "parameters": 1_000_000, "bytes": 4_000_000, "width": 256},
            "after": {**size, "parameters": 400_000, "bytes": 1_600_000, "width": 64},
            "speed": [{"runtime": "torch", "base": {"prefill": 100, "decode": 10}, "narrow": {"prefill": 200, "decode": 15}}],
            "skills": {"python": {**skill, "role": "keep"}, EVIL: {**skill, "role": "forget", "note": EVIL}},
            "allocation": {
                "keep": {"neuron": 64, "head": 2},
                "sensitivity": {"neuron": [{"keep": {"neuron": 64}, "parameters": 400_000, "refitted": 0.2}]},
                "trials": [
                    {"keep": {"neuron": 64, "head": 2}, "parameters": 400_000, "refitted": 0.3, "recovered": 0.25},
                    {"keep": {"neuron": 32, "head": 4}, "parameters": 390_000, "refitted": 0.4, "latency": 3.21},
                ],
                "recovery_tokens": 4096,
            },
            "cuts": [{"unit": "neuron", "kept": 64, "of": 256, "per_layer": [64, 64]}],
            "parity": {"slice": {"max_error": 1e-6, "relative_error": 1e-7}},
            "curve": [
                {"phase": "recover", "tokens": 0, "validation": 2.5, "seconds": 0},
                {"phase": "recover", "tokens": 4096, "loss": 2.4, "validation": 2.2, "seconds": 5},
            ],
            "samples": [{"prompt": EVIL, "base": EVIL, "narrow": EVIL}],
            "notices": [{"phase": "load", "code": "x", "message": EVIL}],
            "files": [{"path": "model/config.json", "bytes": 10, "sha256": "ab" * 32}],
            "provenance": {
                "inputs": [
                    {"part": "base", "name": "base", "sha256": "a" * 64},
                    {"part": "target", "name": EVIL, "sha256": "b" * 64, "column": "text"},
                ],
                "tokenizer_sha256": "d" * 64,
                "spec_sha256": "c" * 64,
                "seed": 0,
                "versions": {"torch": "2.13"},
                "machine": {"system": EVIL},
                "seconds": {"load": 1.0},
                "recovery_tokens": 4096,
                "regularizer_tokens": 0,
            },
        }
    )


def test_a_hub_reads_the_card(report, tmp_path):
    report.provenance.base_model = "owner/base"
    (tmp_path / "README.md").write_text(render_card(report), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/base", "transformers", "text-generation")
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"perplexity": 8.356, "retention": 0.884}
    assert {result.dataset_name for result in data.eval_results} == {"python"}
    report.provenance.base_model = None
    assert "base_model" not in render_card(report)


def test_a_base_from_a_hub_is_told_with_its_commit(report):
    assert " at the commit " not in render_card(report)
    base = report.provenance.inputs[0]
    base.hub, base.commit = "owner/base", "c0ffee" * 6 + "c0ff"
    assert f"`{base.sha256}`, which are those of `owner/base` at the commit `{base.commit}`." in render_card(report)
    assert f"owner/base at <code>{base.commit}</code>" in render_page(report)


def test_the_published_schema_is_that_of_reports(report):
    published = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert published == json.loads(schema())
    assert set(report.model_dump()) == set(published["properties"]) >= set(published["required"])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_is_whole_and_runs_nothing(report):
    page = render_page(report)
    parser = Tags()
    parser.feed(page)
    assert "script" not in parser.tags
    assert all(link.startswith("#") for link in parser.links), "the page needs nothing from elsewhere"
    assert parser.tags.count("svg") == 4
    assert "&lt;script&gt;" in page


def test_the_page_tells_the_reports_figures(report):
    text = re.sub(r"<[^>]+>", " ", render_page(report))
    for figure in ("40% of the size, 88.4% of python kept", "0.884", "0.861", "0.902", "2.123", "1,000,000", "400,000", "1.50"):
        assert figure in text, figure


def test_a_model_that_lost_nothing_and_one_without_recovery_have_pages(report):
    report.skills["python"].retention.low = 1.01
    report.curve = []
    assert "nothing of python lost" in render_page(report)


def test_the_card_tells_the_figures_and_no_markup(report):
    card = render_card(report)
    assert "| python | keep | 2.000 | 2.123 | 0.884 |" in card
    assert "<script>" not in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_client_reads_what_the_engine_writes(report):
    from narrow_client.models import Report as ClientReport

    read = ClientReport.model_validate(json.loads(report.model_dump_json()))
    assert read.skills["python"].retention.value == 0.884


def test_a_notebook_shows_it_in_short(report):
    from narrow_client.models import Report as ClientReport

    found = report.model_copy(update={"target": "<b>", "skills": {"<b>": report.skills[report.target]}})
    page = ClientReport.model_validate_json(found.model_dump_json())._repr_html_()
    assert ("&lt;b&gt; kept" in page, "<b> kept" in page) == (True, False)
    assert page.count("<tr>") == 1 + len(found.skills)


def test_a_result_is_short_where_python_shows_it(tmp_path):
    job = models.Job.model_validate(JOB)
    read = models.Report.model_validate_json(example().model_dump_json())
    shown = repr(narrow_client.Result(job, read, tmp_path / "model", {}, tmp_path / "report.html"))
    assert shown.startswith(f"Result({job.id}: ")
    assert str(tmp_path / "model") in shown
    assert len(shown) < 500
