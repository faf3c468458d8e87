"""Experts: what routing does once some are gone, what their scores say, and what configs may not ask for."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import EXPERTS, tiny_config, tiny_model
from torch.nn import functional

from narrow_engine import earlier, importance, stages
from narrow_engine.corpus import Blocks
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.losses import objective
from narrow_engine.model_files import inspect_model
from narrow_engine.models import config_dict, family, head, hidden_states, layers
from narrow_engine.muon import Muon
from narrow_engine.plan import make_plan
from narrow_engine.report.model import Parity
from narrow_engine.sizing import shrink, size_of, solve
from narrow_engine.slice import mask_model, slice_model
from narrow_engine.spec import Options

TOKENS = np.random.default_rng(0).integers(0, 320, 3000).astype(np.uint32)
RENORMALISED = {"mixtral", "granitemoe"}
"""Families whose gates always sum to one; the others say so by norm_topk_prob."""


def expert_plan(model, kept):
    dims = dimensions(config_dict(model))
    scores = {"expert": torch.zeros(dims.layers, dims.experts)}
    scores["expert"][:, kept] = 1
    return make_plan(config_dict(model), scores, {"expert": len(kept)})


def collected(model):
    return list(importance.collect(model, Blocks(TOKENS, 32, 0), 256, True, lambda *_: None))


def block_as_the_papers_write_it(block, table, stream, kept, renormalise):
    """Experts of [n, hidden] by softmax, top two and weighted sum, with the logits of all but the kept at −∞."""
    router = block.get_submodule(table.router.removeprefix(f"{table.mlp}."))
    logits = stream @ router.weight.T
    logits[:, [e for e in range(logits.shape[1]) if e not in kept]] = -torch.inf
    gates, chosen = logits.softmax(1).topk(2, dim=1)
    if renormalise:
        gates = gates / gates.sum(1, keepdim=True)
    out = torch.zeros_like(stream)
    for token in range(len(stream)):
        for gate, expert in zip(gates[token], chosen[token], strict=True):
            gate_up = block.experts.gate_up_proj[expert] @ stream[token]
            half = len(gate_up) // 2
            out[token] += gate * (block.experts.down_proj[expert] @ (functional.silu(gate_up[:half]) * gate_up[half:]))
    if table.shared_key:
        out += block.shared_expert(stream) * torch.sigmoid(block.shared_expert_gate(stream))
    return out


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_without_some_experts_the_router_chooses_among_the_kept(name, renormalise):
    model = tiny_model(name, norm_topk_prob=renormalise)
    table, plan = family(model), expert_plan(model, [0, 2, 5])
    stream = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    for made in (slice_model(model, plan), mask_model(model, plan)):
        for layer, base in zip(layers(made), layers(model), strict=True):
            wanted = block_as_the_papers_write_it(
                base.get_submodule(table.mlp), table, stream[0], [0, 2, 5], renormalise or name in RENORMALISED
            )
            assert torch.allclose(layer.get_submodule(table.mlp)(stream)[0], wanted, rtol=1e-4, atol=1e-5)


def gated_experts(module, gates, seen):
    """A forward of a module of experts with a factor on each expert and each neuron of each token: gates [n, experts], [n,
    experts, width]. Adds (expert, ‖gate · output‖) of all routed tokens to `seen`."""

    def forward(hidden, chosen, weights):
        of_expert, of_neuron = gates
        out = torch.zeros_like(hidden)
        for expert in range(module.num_experts):
            gate, up = functional.linear(hidden, module.gate_up_proj[expert]).chunk(2, -1)
            inner = module.act_fn(gate) * up * of_neuron[:, expert]
            weight = (weights * (chosen == expert)).sum(1, keepdim=True)
            written = functional.linear(inner, module.down_proj[expert]) * weight * of_expert[:, expert, None]
            seen.extend((expert, norm) for norm in written.norm(dim=1)[(chosen == expert).any(1)].tolist())
            out = out + written
        return out

    return forward


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "qwen2_moe"])
def test_scores_of_experts_and_of_their_neurons_are_what_their_formulas_say(name):
    model = tiny_model(name)
    found = collected(model)
    scores = {criterion: importance.CRITERIA[criterion](model, found, 0) for criterion in importance.CRITERIA}
    table, dims = family(model), dimensions(config_dict(model))
    batch = Blocks(TOKENS, 32, 0).batch(0, 8)
    count = batch[:, :-1].numel()
    gates, seen = [], []
    for layer in layers(model):
        gates.append((torch.ones(count, dims.experts), torch.ones(count, dims.experts, dims.width)))
        seen.append([])
        for gate in gates[-1]:
            gate.requires_grad_()
        module = layer.get_submodule(table.mlp_out)
        module.forward = gated_experts(module, gates[-1], seen[-1])
    hidden = hidden_states(model, batch[:, :-1]).flatten(0, 1)
    (objective(hidden, head(model), batch[:, 1:].flatten()).total * count).backward()
    for number in range(dims.layers):
        norms = [torch.tensor([norm for e, norm in seen[number] if e == expert]) for expert in range(dims.experts)]
        reap = torch.stack([n.mean() if len(n) else torch.zeros(()) for n in norms])
        energy = torch.stack([n.square().sum() for n in norms])
        assert torch.allclose(scores["activation"]["expert"][number].float(), reap, rtol=1e-3)
        assert torch.allclose(scores["reconstruction"]["expert"][number].float(), energy, rtol=1e-3)
        for unit, gate in zip(("expert", "neuron"), gates[number], strict=True):
            slope = gate.grad.flatten(1).double()
            assert torch.allclose(scores["attribution"][unit][number], slope.sum(0).abs(), rtol=1e-3, atol=1e-3)
            assert torch.allclose(scores["fisher"][unit][number], slope.square().sum(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("criterion", ["reconstruction", "activation", "fisher", "attribution"])
def test_an_expert_that_no_token_reaches_is_worth_nothing(criterion):
    model = tiny_model("qwen3_moe")
    found = collected(mask_model(model, expert_plan(model, [0, 1, 2, 4, 5])))
    scores = importance.CRITERIA[criterion](model, found, 0)
    assert (scores["expert"][:, 3] == 0).all()
    assert (scores["expert"].amax(1) > 0).all()
    assert torch.isfinite(scores["neuron"]).all()


@pytest.mark.parametrize(
    ("name", "errors", "kept", "notices"),
    [
        ("qwen3_moe", [1e-2, 1e-7], 1e-7, 1),
        ("qwen3_moe", [1e-7], 1e-7, 0),
        ("qwen3_moe", [1e-2] * 4, 1e-2, 3),
        ("llama", [1e-2], 1e-2, 0),
    ],
)
def test_a_near_tie_is_told_from_an_error_by_other_tokens(monkeypatch, name, errors, kept, notices):
    probes, told = [], []
    monkeypatch.setattr(earlier, "probe", lambda run, number: probes.append(number))
    monkeypatch.setattr(earlier, "info", lambda run: {"model": {"config": config_dict(tiny_model(name))}})
    run = SimpleNamespace(emit=lambda *event: told.append(event))
    first, *more = [Parity(max_error=error, relative_error=error) for error in errors]
    assert stages._despite_ties(run, "slice", first, 1e-4, lambda _: more.pop(0)).relative_error == kept
    assert (len(told), probes) == (notices, list(range(1, notices + 1)))


def test_muon_takes_each_expert_for_a_matrix_of_its_own():
    torch.manual_seed(0)
    for rows, columns in ((6, 10), (10, 6)):
        stack = torch.nn.Parameter(torch.randn(12, rows, columns))
        single = [torch.nn.Parameter(part.clone()) for part in stack.detach()]
        gradient = torch.randn(12, rows, columns)
        stack.grad = gradient
        for parameter, part in zip(single, gradient, strict=True):
            parameter.grad = part.clone()
        Muon([stack], lr=0.1).step()
        Muon(single, lr=0.1).step()
        assert torch.allclose(stack, torch.stack(single), atol=1e-6)


def test_a_token_costs_only_the_experts_that_it_meets():
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 billion of them active, the embedding among them."""
    lengths = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32}
    lengths |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936}
    config = {"model_type": "qwen3_moe", **lengths}
    whole = size_of(config, dimensions(config), 2)
    assert whole.parameters == pytest.approx(30.5e9, rel=0.01)
    assert whole.flops_per_token / 2 + 151_936 * 2048 == pytest.approx(3.35e9, rel=0.01)
    fewer = size_of(config, shrink(dimensions(config), {"expert": 64}), 2)
    assert whole.flops_per_token - fewer.flops_per_token == 2 * 48 * 64 * 2048, "cut experts cost a token their router rows only"


def test_as_many_experts_stay_as_a_token_is_routed_to_and_that_is_said():
    config = tiny_config("mixtral").to_dict()
    units = {"units": ["expert"]}
    with pytest.raises(NarrowError, match="routed to 2 experts, so as many must stay"):
        solve(config, Options.model_validate({"budget": {"parameters": 0.2}, "method": units}), 2)
    keep, notices = solve(config, Options.model_validate({"budget": {"keep": {"expert": 0.1}}, "method": units}), 2)
    assert keep == {"expert": 2}
    assert notices == ["0.1 of 6 experts is 0.6; 2 are kept.", "Each token is routed to 2 experts, so as many must stay."]


def test_neurons_of_experts_are_kept_in_what_the_stock_product_takes():
    config = tiny_config("mixtral").to_dict()
    keep, _ = solve(config, Options.model_validate({"budget": {"keep": {"neuron": 0.44}}}), 2)
    assert keep["neuron"] == 24
    slim = Options.model_validate({"budget": {"parameters": 0.7}, "method": {"multiple": 1}})
    assert solve(config, slim, 2)[0]["neuron"] % 8 == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"mlp_only_layers": [1]}, "unsupported_architecture", r"'mlp_only_layers' is \[1\]"),
        ({"decoder_sparse_step": 2}, "unsupported_architecture", "all layers are alike"),
        ({"num_experts": 4}, "bad_config", "one number under two names"),
        ({"num_experts_per_tok": 7}, "bad_config", "from 1 to 6"),
        ({"num_local_experts": 4000}, "wrong_tensors", r"asks for \[4000, 32\]"),
        ({"num_local_experts": 4}, "wrong_tensors", r"asks for \[4, 32\]"),
    ],
)
def test_what_the_table_is_not_true_of_is_refused(tmp_path, tokenizer_file, change, code, words):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(NarrowError, match=words) as raised:
        inspect_model(tmp_path)
    assert raised.value.code == code


def test_a_config_from_before_transformers_5_is_read_alike(tmp_path, tokenizer_file):
    """Qwen's own files say num_experts where transformers 5 says num_local_experts."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dimensions(inspect_model(tmp_path).config).experts == 6
