"""Rounded weights: as near as their bits allow, and in the file what they are in torch."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model

from narrow_engine.export import formats
from narrow_engine.export.quantize import BLOCK, round_matrix, round_model
from narrow_engine.spec import ROUNDED

IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 3 * BLOCK),
    bits=st.sampled_from([4, 8]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_a_matrix_is_within_half_a_step_of_what_it_was(rows, columns, bits, scale, shift, seed):
    weight = scale * (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift)
    rounded = round_matrix(weight, bits)
    assert int(rounded.quants.max()) < 2**bits
    error = (rounded.value() - weight).abs()
    assert error.shape == weight.shape
    # A step, and half of one for the zero point, which is a whole number too. Of four bits the range may be narrower.
    step = rounded.scale.repeat_interleave(BLOCK, 1)[:, :columns]
    if bits == 8:
        assert (error <= 1.01 * step).all()
    whole = (weight.clamp(min=0).amax() - weight.clamp(max=0).amin()) / (2**bits - 1)
    assert error.square().mean().sqrt() <= 1.01 * whole
    assert torch.allclose(round_matrix(rounded.value(), 8).value(), rounded.value(), atol=float(1.01 * whole))


def test_zeros_and_constants_stay_what_they_are():
    for value in (0.0, 1.5, -2.0):
        weight = torch.full((2, 40), value)
        for bits in (4, 8):
            assert torch.allclose(round_matrix(weight, bits).value(), weight, rtol=0.11 if bits == 4 else 1e-3)


FAST = ("gpt2",)


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_the_file_holds_the_weights_that_are_measured(family, tmp_path):
    model = tiny_model(family).eval()
    model.save_pretrained(tmp_path / "model")
    for form in ("onnx-int8", "onnx-int4"):
        meant = formats.write(form, tmp_path / "model", tmp_path / form, tmp_path / "onnx").model
        exact, told = formats.check(form, meant, tmp_path / "model", tmp_path / form, IDS)
        assert exact.relative_error < 1e-4
        assert exact.mean_error < told.mean_error < 0.2, "activations are rounded too"
        with torch.no_grad():
            moved = (meant(IDS).logits - model(IDS).logits).abs().max()
        assert moved > 100 * exact.max_error, "it is the rounded weights that agree, not those of before"
        proto = onnx.load(tmp_path / form / "model.onnx")
        kinds = {node.op_type for node in proto.graph.node}
        assert "MatMulNBits" in kinds
        large = [i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) > 2000]
        assert [name for name in large if not name.startswith("blocks") and "wpe" not in name] == [], (
            "no matrix is left as it was"
        )
        assert (tmp_path / form / "genai_config.json").exists()
        assert (tmp_path / form / "model.onnx").stat().st_size < (tmp_path / "onnx" / "model.onnx").stat().st_size


def test_the_embedding_keeps_eight_bits_and_norms_stay():
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    found = round_model(model, 4)
    assert {rounded.bits for rounded in found.values()} == {4, 8}
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, round_matrix(before.get_input_embeddings().weight.detach(), 8).value())
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old) == (new.dim() < 2), name


def test_formats_that_round_are_known():
    assert set(ROUNDED) >= {"onnx-int8", "onnx-int4"}
