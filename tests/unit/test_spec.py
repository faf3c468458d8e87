"""What a method's options are by default, and what is refused with a sentence."""

import re
import time
from contextlib import suppress

import pytest
from pydantic import ValidationError

from narrow_engine.spec import Answer, CompressionSpec, Method, Options, SweepSpec, first_fault, points


def test_what_is_not_given_follows_the_kind():
    found = {kind: Method.model_validate({"kind": kind, "recover": {"tokens": 5}}) for kind in ("prune", "distill", "scratch")}
    assert {kind: (m.init, m.refit, m.recover.objective) for kind, m in found.items()} == {
        "prune": ("cut", True, "mixed"),
        "distill": ("fresh", False, "distill"),
        "scratch": ("fresh", False, "next_token"),
    }
    assert all(method.recover.tokens == 5 for method in found.values())
    assert Method() == Method.model_validate({}) == Method.model_validate({"kind": "prune"})
    for method in (*found.values(), Method.model_validate({"recover": {"cache": "top", "match": None}})):
        assert Method.model_validate(method.model_dump()) == method
    assert Method.model_validate({"kind": "distill", "recover": {"objective": "mixed"}}).recover.objective == "mixed"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"kind": "prune", "init": "fresh", "refit": False}, "pruning starts from the base"),
        ({"kind": "distill", "refit": True}, "fresh weights take nothing of the base"),
        ({"kind": "distill", "regularizer": {}}, "fresh weights take nothing of the base"),
        ({"kind": "distill", "recover": {"objective": "next_token"}}, "to distill, the objective must be"),
        ({"kind": "scratch", "init": "cut"}, "'scratch' takes nothing of the base"),
        ({"kind": "scratch", "recover": {"objective": "mixed"}}, "'scratch' takes nothing of the base"),
        ({"kind": "distill", "init": "layers"}, "'units' must be 'layer'"),
        ({"units": ["neuron", "neuron"]}, "names a kind of unit twice"),
        ({"units": ["head"], "regularizer": {}}, "group_lasso acts on neurons"),
        ({"kind": "destill"}, "'scratch' or 'export'"),
        ({"kind": "scratch", "recover": {"cache": "hidden"}}, "with 'objective' 'next_token' none does"),
        ({"recover": {"on_policy": 0.5, "cache": "top"}}, "'on_policy' needs the teacher itself"),
        ({"recover": {"match": {"hidden": 1}, "cache": "top"}}, "'match' needs the teacher itself"),
        ({"recover": {"top": 8, "cache": "hidden"}}, "'top' is the number of tokens in a 'cache' of kind 'top'"),
        ({"recover": {"match": {}}}, "needs a weight above 0"),
        ({"kind": "export", "recover": {"tokens": 1}}, "gives the base back as it is"),
        ({"kind": "export", "refit": True}, "gives the base back as it is"),
    ],
)
def test_what_contradicts_itself_is_refused(method, words):
    with pytest.raises(ValidationError, match=words):
        Method.model_validate(method)


@pytest.mark.parametrize("budget", [{"retention": 0.9}, {"latency": 0.5}])
@pytest.mark.parametrize("method", [{"kind": "scratch"}, {"init": "layers", "units": ["layer"]}])
def test_a_budget_that_is_met_by_trying_needs_a_cut(budget, method):
    with pytest.raises(ValidationError, match="set 'init' to 'cut'"):
        Options.model_validate({"budget": budget, "method": method})


@pytest.mark.parametrize(
    ("recover", "words"),
    [
        ({"objective": "next_token"}, "with the objective 'next_token' none does"),
        ({"correction": {"tokens": 5}}, "'method.recover.correction' is about the base"),
        ({"match": {"hidden": 1}}, "'method.recover.match' is about the base"),
    ],
)
def test_a_teacher_is_there_where_it_can_teach(recover, words):
    spec = {"base": {"path": "m"}, "target": {"path": "t"}, "budget": {"parameters": 0.5}, "teacher": {"path": "n"}}
    assert CompressionSpec.model_validate(spec).teacher is not None
    with pytest.raises(ValidationError, match=words):
        CompressionSpec.model_validate({**spec, "method": {"recover": recover}})


def test_a_sweep_has_its_teacher_where_one_teaches():
    sweep = {
        "base": {"model": "mdl_" + "0" * 26},
        "teacher": {"model": "mdl_" + "1" * 26},
        "target": {"dataset": "ds_" + "0" * 26},
        "budgets": [{"parameters": 0.5}],
        "methods": {"prune": {}, "scratch": {"kind": "scratch"}},
    }
    assert {p.method: p.spec.teacher is not None for p in points(SweepSpec.model_validate(sweep))} == {
        "prune": True,
        "scratch": False,
    }
    with pytest.raises(ValidationError, match="no method has the objective 'distill' or 'mixed'"):
        SweepSpec.model_validate({**sweep, "methods": {"scratch": {"kind": "scratch"}}})


@pytest.mark.parametrize(("broad", "curriculum"), [({"path": "b"}, None), (None, {})])
def test_broad_text_and_its_curriculum_come_together(broad, curriculum):
    inputs = {"base": {"path": "m"}, "target": {"path": "t"}, "budget": {"parameters": 0.5}, "broad": broad}
    with pytest.raises(ValidationError, match="give both, or neither"):
        CompressionSpec.model_validate({**inputs, "method": {"recover": {"curriculum": curriculum}}})


@pytest.mark.parametrize(
    "extract",
    [
        "[\u0100-\U0010ffff]",
        r"[^\U00000100-\U0010ffff]",
        r"[\u0100-\uffff]",
        r"\\\u0100",
        r"a\x41",
        r"\N{LATIN SMALL LETTER A}",
        "(?i)a",
        "(?i:a)",
        "(?-i:a)",
        r"\\(?u)\w",
        "a\nb",
        "a" * 201,
        "(",
        "a\\",
        "(?:a{1,1000}){99999999999}",
    ],
)
def test_expressions_that_could_take_long_to_compile_are_refused(extract):
    with pytest.raises(ValidationError, match="extract"):
        Answer(extract=extract)


@pytest.mark.parametrize(
    "extract", [r"#### (-?[\d,.]+)", r"\(?s?\)?", r"C:\\(?P<user>\w+)\\u", r"(?<=\bis )(?!not)(?:yes|no)(?=\.)", r"\\x"]
)
def test_ordinary_expressions_are_taken(extract):
    assert Answer(extract=extract).extract == extract


@pytest.mark.parametrize(
    "extract",
    [
        "(?:" * 18 + "a" + "{1,1000})" * 18,
        "(?:" * 28 + "a" + ")*?" * 28,
        "(?:" * 22 + "a" + "{1,9})" * 18,
        r"[\W\D\S]" * 22,
        "[^!-~]" * 33,
        r"[\001-\377]" * 18,
        "(?<=" + "a" * 190 + ")",
        "(" * 99 + ")" * 99,
        "(?:a|" * 33 + "b" + ")" * 33,
        "()" + "(?(1)a|b)" * 22,
        "|".join(map(str, range(60))),
    ],
)
def test_what_is_taken_compiles_in_milliseconds(extract):
    seconds = []
    for _ in range(5):
        re.purge()
        began = time.perf_counter()
        with suppress(ValidationError):
            Answer(extract=extract)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "'budget' is missing"),
        ({"method": {"kind": "export"}, "budget": {"parameters": 0.5}}, "'export' cuts nothing"),
        ({"budget": {"parameters": 0.5}, "export": ["onnx", "onnx"]}, "names a format twice"),
    ],
)
def test_formats_and_budgets_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        Options.model_validate(options)


def test_what_is_exported_has_no_budget_and_is_read_again_as_it_was_written():
    made = Options.model_validate({"method": {"kind": "export"}, "export": ["onnx-int4"]})
    assert Options.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": {"parameters": True}}, "budget.parameters should be a number, not true."),
        ({"budget": {"parameters": "0.5"}}, "budget.parameters should be a number, not the text '0.5': write it without quotes."),
        ({"budget": {"keep": {"neuron": "1"}}}, "budget.keep should be a number, not the text '1': write it without quotes."),
        ({"seed": False}, "seed should be a number, not false."),
        ({"method": {"recover": {"tokens": "5"}}}, "method.recover.tokens should be a number, not the text"),
        ({"method": {"recover": {"tokens": 1.5}}}, "method.recover.tokens should be a whole number."),
        ({"method": {"refit": "false"}}, "method.refit should be true or false, without quotes."),
        ({"locality": 1}, "locality should be true or false."),
        ({"export": ["onnx"] * 7}, "export should have at most 6 items, not 7."),
        ({"method": 5}, "method should be a JSON object."),
        ({"export": "onnx"}, "export should be a list."),
    ],
)
def test_what_is_no_number_is_not_taken_for_one_and_told_in_plain_words(options, told):
    with pytest.raises(ValidationError) as raised:
        Options.model_validate({"budget": {"parameters": 0.5}, **options})
    assert first_fault(raised.value).startswith(told)


def test_numbers_may_be_written_as_whole_ones_or_with_an_exponent():
    text = '{"budget": {"parameters": 1}, "method": {"recover": {"tokens": 1e6}}, "seed": 7.0}'
    made = Options.model_validate_json(text)
    assert (made.budget.parameters, made.method.recover.tokens, made.seed) == (1, 1_000_000, 7)
