"""Weights rounded to 8 or 4 bits: once, on torch's side, so that what is measured is what is in the file.

Each row of a matrix is cut into blocks of BLOCK inputs, and each block gets a scale and a zero point of its own:
w ≈ (q − zero) · scale, q in 0 … 2^bits − 1. Of four bits, a block is rounded with its whole range and with narrower ones, and
what has the least squared error stays. The embedding and the head keep 8 bits: every token passes them.

ONNX Runtime multiplies by such blocks (com.microsoft MatMulNBits). Norms, biases, routers and
embeddings of positions stay.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.export.onnx import EXTERNAL_BYTES
from narrow_engine.models import matrices

BLOCK = 32
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of a block's own, that are tried for four bits."""
IN_FLOAT, IN_BYTES = 1, 4
"""How MatMulNBits multiplies (`accuracy_level`): in float32, or with activations rounded to 8 bits, a block at a time. Of a base
with 8 M parameters, a token took 27 ms and 2.9 ms with weights in 8 bits, 11 ms and 2.3 ms in 4."""


class Rounded(NamedTuple):
    """A matrix [rows, columns] in blocks: quants uint8 [rows, blocks, BLOCK], scale float32 and zero uint8 [rows, blocks]."""

    quants: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    columns: int

    def value(self) -> Tensor:
        """The matrix that is meant, float32 [rows, columns]."""
        whole = (self.quants.float() - self.zero.float()[..., None]) * self.scale[..., None]
        return whole.flatten(1)[:, : self.columns].contiguous()


def round_matrix(weight: Tensor, bits: int) -> Rounded:
    """A matrix [rows, columns] in blocks of a row; the last is filled up with zeros."""
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    least, most = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = 2**bits - 1
    best: list[Tensor] = []
    for part in RANGES if bits < 8 else RANGES[:1]:
        scale = ((most - least) * part / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-least * part / scale).round().clamp(0, top)
        quants = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, top)
        error = ((quants - zero[..., None]) * scale[..., None] - blocks).square().sum(-1)
        found = [error, quants, scale, zero]
        if best:
            better = error < best[0]
            found = [
                torch.where(better[..., None] if new.dim() > 2 else better, new, old)
                for new, old in zip(found, best, strict=True)
            ]
        best = found
    _, quants, scale, zero = best
    return Rounded(quants.to(torch.uint8), scale, zero.to(torch.uint8), bits, columns)


@torch.no_grad()
def round_model(model: PreTrainedModel, bits: int) -> dict[str, Rounded]:
    """Rounds the matrices of a model in place. Returns what became of each, by the digest of what it was (`_digest`)."""
    found: dict[str, Rounded] = {}
    for _, matrix, outer in matrices(model):
        rounded = round_matrix(matrix, 8 if outer else bits)
        found[_digest(matrix.float().cpu().numpy())] = rounded._replace(
            quants=rounded.quants.cpu(), scale=rounded.scale.cpu(), zero=rounded.zero.cpu()
        )
        matrix.copy_(rounded.value())
    return found


def _digest(matrix: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix, np.float32).tobytes()).hexdigest() + str(matrix.shape)


def quantize_onnx(source: Path, out: Path, rounded: dict[str, Rounded]) -> None:
    """Writes the decoder `source` to `out` with the matrices of `rounded` in blocks."""
    model = onnx.load(source)
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    made: dict[str, tuple[str, str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []

    def read(name: str) -> NDArray[Any] | None:
        """A matrix that is in the file as it is, turned, or as one of several."""
        if name in weights:
            return numpy_helper.to_array(weights[name])
        node = made_by.get(name)
        if node is None or node.op_type not in ("Transpose", "Gather", "Constant"):
            return None
        if node.op_type == "Constant":
            return numpy_helper.to_array(node.attribute[0].t) if node.attribute[0].name == "value" else None
        whole = read(node.input[0])
        if whole is None or node.op_type == "Transpose":
            return None if whole is None or whole.ndim != 2 else whole.T
        at = read(node.input[1])
        first = not any(a.name == "axis" and a.i for a in node.attribute)
        return whole[int(at)] if first and at is not None and at.ndim == 0 and whole.ndim == 3 else None

    def find(name: str, flipped: bool) -> tuple[str, Rounded] | None:
        array = read(name)
        if array is None or array.ndim != 2:
            return None
        digest = _digest(array.T if flipped else array)
        return (digest, rounded[digest]) if digest in rounded else None

    def store(digest: str, value: Rounded) -> tuple[str, str, str]:
        """The names of a matrix's quants, scales and zeros, once in the file."""
        if digest not in made:
            stem = f"blocks.{len(made)}"
            made[digest] = (f"{stem}.quants", f"{stem}.scale", f"{stem}.zero")
            arrays = (_packed(value.quants, value.bits), value.scale.numpy(), _packed(value.zero, value.bits))
            added.extend(numpy_helper.from_array(a, n) for a, n in zip(arrays, made[digest], strict=True))
        return made[digest]

    for node in graph.node:
        replaced = None
        if node.op_type in ("MatMul", "Gemm"):
            flipped = not any(a.name == "transB" and a.i for a in node.attribute)
            found = find(node.input[1], flipped)
            if found:
                quants, scale, zero = store(*found)
                given = [node.input[0], quants, scale, zero, *(("", *node.input[2:]) if len(node.input) > 2 else ())]
                replaced = helper.make_node(
                    "MatMulNBits",
                    given,
                    node.output,
                    node.name,
                    domain="com.microsoft",
                    K=found[1].columns,
                    N=len(found[1].scale),
                    bits=found[1].bits,
                    block_size=BLOCK,
                    accuracy_level=IN_BYTES,
                )
        elif node.op_type == "Gather" and node.input[0] in weights:
            found = find(node.input[0], False)
            if found and found[1].bits == 8 and found[1].columns % BLOCK == 0:
                nodes.extend(_rows(node, *store(*found)))
                continue
        nodes.append(replaced or node)
    needed = {output.name for output in graph.output}
    for node in reversed(nodes):  # what only led to a matrix leads nowhere now
        if needed & set(node.output):
            needed.update(node.input)
    nodes = [node for node in nodes if needed & set(node.output)]
    initializers = [i for i in graph.initializer if i.name in needed] + added
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    if "com.microsoft" not in {o.domain for o in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    _save(model, out)


def _rows(gather: onnx.NodeProto, quants: str, scale: str, zero: str) -> list[onnx.NodeProto]:
    """Rows of a matrix in blocks of 8 bits. GatherBlockQuantized would be one node for it, which runtimes in browsers lack."""
    ids, out = gather.input[1], gather.output[0]
    made = (f"{out}.quants", f"{out}.scale", f"{out}.zero")

    def constant(name: str, *numbers: int) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(numbers, np.int64)))

    return [
        constant(f"{out}.last", -1),
        constant(f"{out}.shape", 0, 0, -1),
        *(helper.make_node("Gather", [matrix, ids], [name]) for matrix, name in zip((quants, scale, zero), made, strict=True)),
        *(helper.make_node("Cast", [name], [f"{name}.float"], to=onnx.TensorProto.FLOAT) for name in (made[0], made[2])),
        helper.make_node("Unsqueeze", [f"{made[2]}.float", f"{out}.last"], [f"{out}.zeros"]),
        helper.make_node("Unsqueeze", [made[1], f"{out}.last"], [f"{out}.scales"]),
        helper.make_node("Sub", [f"{made[0]}.float", f"{out}.zeros"], [f"{out}.steps"]),
        helper.make_node("Mul", [f"{out}.steps", f"{out}.scales"], [f"{out}.blocks"]),
        helper.make_node("Reshape", [f"{out}.blocks", f"{out}.shape"], [out], gather.name),
    ]


def set_compute(source: Path, out: Path, level: int) -> None:
    """The decoder `source` with another way to multiply."""
    model = onnx.load(source)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    _save(model, out)


def _save(model: onnx.ModelProto, out: Path) -> None:
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_BYTES
    onnx.save(model, out, save_as_external_data=large, location=f"{out.name}.data" if large else None)


def _packed(values: Tensor, bits: int) -> NDArray[np.uint8]:
    """uint8, of four bits two in each, the first in the lower half; the last dimension is filled up."""
    array: NDArray[np.uint8] = values.numpy()
    if bits == 8:
        return array
    if array.shape[-1] % 2:
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 1)])
    packed: NDArray[np.uint8] = (array[..., ::2] | (array[..., 1::2] << 4)).astype(np.uint8)
    return packed
