"""The page's words follow the figures: a loss is called a loss, and what was not forgotten is not called forgotten."""

import re

import pytest

from narrow_engine.report.card import render_card
from narrow_engine.report.model import Report
from narrow_engine.report.page import render_page


def skill(role, value, low, high):
    return {
        "role": role,
        "documents": 40,
        "tokens": 9000,
        "base": {"loss": 2.25, "low": 2, "high": 2.5, "perplexity": 9.488},
        "cut": {"loss": 2.75, "low": 2.5, "high": 3, "perplexity": 15.64},
        "recovered": {"loss": 2.5, "low": 2.25, "high": 2.75, "perplexity": 12.18},
        "retention": {"value": value, "low": low, "high": high},
        "agreement": {"value": 0.5, "low": 0.4, "high": 0.9},
        "kl": {"value": 0.25, "low": 0.1, "high": 0.9},
    }


def report(skills, **changes):
    size = {"parameters": 3000, "bytes": 6000, "hidden": 8, "width": 64, "heads": 4, "kv_heads": 2, "vocabulary": 9}
    size["flops_per_token"] = 10
    return Report.model_validate(
        {
            "target": "python",
            "family": "llama",
            "spec": {"method": {"units": ["layer"], "importance": "fisher", "refit": False, "recover": {"objective": "mixed"}}},
            "before": {**size, "layers": 4},
            "after": {**size, "layers": 3, "parameters": 1500},
            "speed": [{"runtime": "torch", "base": {"prefill": 100, "decode": 10}, "narrow": {"prefill": 90, "decode": 9}}],
            "skills": skills,
            "allocation": {"keep": {"layer": 3}},
            "cuts": [{"unit": "layer", "kept": 3, "of": 4, "per_layer": [0, 1, 3]}],
            "parity": {"slice": {"max_error": 0, "relative_error": 0}},
            "curve": [],
            "samples": [],
            "notices": [],
            "files": [],
            "provenance": {
                "inputs": [
                    {"part": "base", "name": "base", "sha256": "a" * 64},
                    {"part": "target", "name": "python.jsonl", "sha256": "b" * 64, "column": "text"},
                ],
                "tokenizer_sha256": "d" * 64,
                "spec_sha256": "c" * 64,
                "seed": 0,
                "versions": {},
                "machine": {},
                "seconds": {"recover": 75.0, "load": 1.0},
                "recovery_tokens": 0,
                "regularizer_tokens": 0,
            },
            **changes,
        }
    )


def words(page):
    """The page's text as one line."""
    return " ".join(re.sub(r"<[^>]+>", "", page).split())


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.6, 0.5, 0.7, "50% of the size, 60.0% of python kept."),
        (0.98, 0.95, 1.01, "50% of the size, and as good on python as the base within the error of the measurement."),
        (1.1, 1.05, 1.2, "50% of the size, and nothing of python lost that could be measured."),
    ],
)
def test_the_headline_says_no_more_than_the_interval(value, low, high, said):
    assert f"<h1>{said}</h1>" in render_page(report({"python": skill("keep", value, low, high)}))


def test_the_summary_names_the_worst_and_the_unforgotten():
    text = words(
        render_page(
            report(
                {
                    "python": skill("keep", 0.9, 0.8, 0.95),
                    "c": skill("watch", 0.4, 0.3, 0.5),
                    "math": skill("watch", 0.1, 0.05, 0.2),
                    "german": skill("forget", 0.8, 0.7, 0.9),
                    "french": skill("forget", 0.0004, 0.0003, 0.0005),
                    "rust": skill("keep", 0.7, 0.6, 0.8),
                }
            )
        )
    )
    for said in (
        "Of the 2 skills that were only watched, math kept least (10.0%) and c most (40.0%).",
        "To be forgotten: german, still 80.0%.",
        "To be forgotten: french, down to under 0.1%.",
        "To be kept as well: rust, at 70.0%.",
        "Its decoding speed is 0.90 × the base’s in torch.",
        "1 min 16 s (load 1.0 s, recover 1 min 15 s)",
    ):
        assert said in text


def test_bars_are_as_long_as_the_figures():
    page = render_page(report({"python": skill("keep", 0.5, 0.4, 2.0), "c": skill("watch", 0.25, 0.2, 0.3)}))
    skills, sizes = (re.findall(r'<rect class="(\w+)"[^>]* width="([\d.]+)%"', part) for part in page.split("<h2>Size and speed"))
    widths = {name: float(width) for name, width in skills}
    assert widths["keep"] / widths["track"] == pytest.approx(0.5, abs=1e-3)
    assert widths["watch"] / widths["track"] == pytest.approx(0.25, abs=1e-3)
    ends = [float(end) for end in re.findall(r' x2="([\d.]+)%"', page)]
    assert 95 < max(ends) <= 100, "the longest interval has room"
    ratios = [float(width) / float(sizes[0][1]) for name, width in sizes if name != "track"]
    assert ratios == pytest.approx([0.5, 1, 1, 10 / 9], abs=1e-3)


def test_layers_that_are_gone_are_named_and_a_skill_has_room():
    name = "a long name as people write them, with a year 2024"
    page = render_page(report({"python": skill("keep", 0.9, 0.8, 0.95), name: skill("watch", 0.4, 0.3, 0.5)}))
    assert "Layers: 3 of 4 in the model (kept: 0, 1, 3)." in words(page)
    assert f'<th scope="row">{name} <small>watch, 40 documents</small></th>' in page
    assert page.count(name[:29] + "…") == 1


def test_tokens_are_in_the_words_and_not_in_the_chart():
    skills = {"python": skill("keep", 0.9, 0.8, 0.95)}
    tokens = {"unit": "token", "kept": 6, "of": 9, "per_layer": []}
    neurons = {"unit": "neuron", "kept": 32, "of": 64, "per_layer": [32] * 4}
    both = report(skills, cuts=[neurons, tokens])
    both.after.vocabulary = 6
    page = render_page(both)
    assert "Neurons: 32 of 64 in each layer. Tokens: 6 of 9 in the model." in words(page)
    assert re.search(r'<th scope="row">vocabulary</th><td>9</td><td>6</td><td>0.67</td>', page)
    assert ">neurons<" in page
    assert ">tokens<" not in page
    assert "What was cut" not in render_page(report(skills, cuts=[tokens]))
    both.spec["method"]["units"] = ["neuron", "token"]
    assert "Vocabulary trimmed from 9 to 6 tokens, neurons scored by fisher, no refit, 0 tokens" in " ".join(
        render_card(both).split()
    )
    both.spec["method"]["units"] = ["token"]
    assert "Vocabulary trimmed from 9 to 6 tokens, 0 tokens of training" in " ".join(render_card(both).split())


def test_every_table_has_a_caption_and_every_figure_words():
    page = render_page(report({"python": skill("keep", 0.9, 0.8, 0.95)}))
    assert page.count("<table>") == page.count("<caption>") >= 3
    assert all("scope=" in cell for cell in re.findall(r"<th\b[^>]*>", page))
    assert all(re.search(r'aria-label="[^"]{20,}"', figure) for figure in re.findall(r"<figure[^>]*>", page))


def test_the_card_shows_onnx_only_where_there_is_one():
    skills = {"python": skill("keep", 0.9, 0.8, 0.95)}
    assert "onnxruntime" not in render_card(report(skills))
    assert "onnxruntime" in render_card(report(skills, parity={"onnx": {"max_error": 1e-5, "relative_error": 1e-6}}))


def learner(tokens, first, last):
    points = [{"phase": "relearn", "tokens": at, "validation": loss, "seconds": 1} for at, loss in ((0, first), (4096, last))]
    return {"tokens": tokens, "curve": points}


def probed(tokens, last, note="what the probe found"):
    """A report of a skill to forget that was learned again, or not."""
    learners = {"narrow": learner(tokens, 6.0, last), "random": None, "fresh": learner(None, 9.0, 5.0)}
    relearning = {"german": {"base": 2.0, "within": 0.1, "tokens": 4096, "text": 4096, "note": note, **learners}}
    skills = {"python": skill("keep", 0.9, 0.8, 0.95), "german": skill("forget", 0.02, 0.01, 0.03)}
    return report(skills, relearning=relearning)


@pytest.mark.parametrize(
    ("tokens", "last", "said"),
    [
        (1234, 2.0, "To be forgotten: german, down to 2.0%, but back after 1,234 tokens of training on it."),
        (None, 4.0, "To be forgotten: german, down to 2.0%, and not back after 4,096 tokens of training on it."),
        (0, 2.0, "To be forgotten: german, down to 2.0%."),
    ],
)
def test_what_comes_back_is_not_only_called_forgotten(tokens, last, said):
    page = render_page(probed(tokens, last))
    assert said in page
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    row = {1234: "1,234 from 6.000 nats", None: "not in 4.1 k 4.000 nats then", 0: "0 from 6.000 nats"}[tokens]
    assert f"german 2.100 {row} – not in 4.1 k 5.000 nats then" in text
    assert "what the probe found" in text


def test_the_card_warns_of_what_was_only_hidden():
    assert "was only hidden b(b)" in render_card(probed(1234, 2.0, "german was only hidden <b>[(b)]"))
    assert "hidden" not in render_card(report({"python": skill("keep", 0.9, 0.8, 0.95)}))


def test_answers_are_on_the_page_and_in_the_card():
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = {"prompts": 1200, "base": {**share, "value": 0.55}, "cut": share, "recovered": share, "gained": 3, "lost": 63}
    asked = report({"python": {**skill("keep", 0.9, 0.8, 0.95), "answers": {**found, "note": "a little less"}}})
    text = " ".join(re.sub(r"<[^>]+>", " ", render_page(asked)).split())
    assert "python 1,200 55.0% 40.0% – 60.0% 50.0% 40.0% – 60.0% 50.0% 40.0% – 60.0% 3 63" in text
    assert "python. a little less" in text
    card = render_card(asked)
    assert "| python | 1,200 | 55.0% | 50.0% | 40.0% – 60.0% |" in card
    assert "    - type: exact_match\n      value: 0.5000\n      name: Held-out prompts answered, of 1,200\n---" in card


def test_what_skills_share_is_drawn_and_told():
    skills = {name: skill("watch", 0.5, 0.4, 0.6) for name in ("python", "c")}
    overlap = {"unit": "neuron", "top": 16, "of": 64, "shared": [[0.8, 0.5], [0.5, 0.85]]}
    curve = {"unit": "layer", "cut": [0.25, 0.5], "loss": {"python": [0.1, 0.5], "c": [0.2, 0.7]}}
    locality = {"skills": ["python", "c"], "overlaps": [overlap], "curves": [curve], "summary": "They share <much>."}
    page = render_page(report(skills, locality=locality))
    assert "They share &lt;much&gt;." in page
    heat = re.sub(r"<[^>]+>", " ", page[page.index('<table class="heat"') :].partition("</table>")[0]).split()
    assert [word for word in heat if word in ("80%", "50%", "85%")] == ["80%", "50%", "50%", "85%"]
    assert page.count('<td class="own"') == 2
    assert "What each skill loses as layers go" in page
    assert render_page(report(skills)).count("What the skills share") == 0
