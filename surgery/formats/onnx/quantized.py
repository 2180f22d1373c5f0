"""quantized: the weights of bitsandbytes in a graph, over the codes that their files hold.

4 bits: MatMulBnb4 of com.microsoft, which onnxruntime decodes as bitsandbytes does, to the bit. Where it cannot
stand, or operators of ONNX alone are wanted, a Gather of pairs of values times the absmax of their block, which is the
same to the bit. int8: DequantizeLinear by row, whose scale is SCB * RECIPROCAL; bitsandbytes multiplies by one after
the other, and rounds otherwise in the last digit.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from surgery.codecs.bnb8 import RECIPROCAL
from surgery.core.codec import Shape
from surgery.formats.onnx.stored import Stored, initializer

MICROSOFT = "com.microsoft"
BLOCKS = (32, 64, 128, 256)  # of those that bitsandbytes has, the sizes that MatMulBnb4 has a kernel for
_KINDS = {"fp4": 0, "nf4": 1}  # what it calls them


class FourBits(NamedTuple):
    """Codes of 4 bits, two in a byte over the flattened weight."""

    shape: Shape  # out, in
    codes: Stored
    absmax: Stored  # float32, by block
    kind: str  # nf4 or fp4
    blocksize: int
    values: tuple[float, ...]  # of the 16 codes
    native: bool  # MatMulBnb4 decodes them so, and may

    def multiply(self, nodes: "Nodes", x: Any) -> Any:
        """`x` times the transposed weight."""
        sizes = {"K": self.shape[1], "N": self.shape[0], "block_size": self.blocksize, "quant_type": _KINDS[self.kind]}
        nodes.model.opset_imports[MICROSOFT] = 1
        return nodes("MatMulBnb4", x, self.codes.as_bytes(), self.absmax, domain=MICROSOFT, **sizes)

    def decode(self, nodes: "Nodes") -> Any:
        """The weight."""
        import onnx_ir as ir

        count = self.shape[0] * self.shape[1]
        codes = nodes("Cast", self.codes.as_bytes(), to=int(ir.DataType.INT32))
        values = nodes("Gather", self._pairs(nodes), codes)  # [bytes, 2]
        absmax = nodes("Unsqueeze", self.absmax, [1])  # [block, 1]
        if count % self.blocksize:  # the last block is not full
            absmax = nodes("Slice", _flat(nodes, nodes("Expand", absmax, [1, self.blocksize])), [0], [count])
            values = nodes("Slice", _flat(nodes, values), [0], [count])
        else:
            values = nodes("Reshape", values, [-1, self.blocksize])
        return nodes("Reshape", nodes("Mul", values, absmax), list(self.shape))

    def _pairs(self, nodes: "Nodes") -> Any:
        """What the two codes of each byte stand for, [256, 2]."""
        values, octets = numpy.array(self.values, numpy.float32), numpy.arange(256)
        return nodes.constant(numpy.stack([values[octets >> 4], values[octets & 15]], 1))


class EightBits(NamedTuple):
    """int8 codes, with a scale for each row."""

    shape: Shape  # out, in
    codes: Stored
    SCB: Stored

    def decode(self, nodes: "Nodes") -> Any:
        """The weight."""
        scale = nodes("Mul", self.SCB, nodes.constant(numpy.array(RECIPROCAL, numpy.float32)))
        return nodes("DequantizeLinear", self.codes, scale, axis=0)


class Nodes:
    """Puts nodes before another one."""

    def __init__(self, model: Any, before: Any, name: str) -> None:
        self.model, self.before, self.name = model, before, name
        self.count = 0

    def __call__(self, op: str, *given: Any, domain: str = "", **attributes: Any) -> Any:
        """The output of a new node; of what is given, a tensor of a file or numbers become an initializer."""
        import onnx_ir as ir

        node = ir.node(op, [self._value(one) for one in given], attributes, domain=domain)
        node.name = node.outputs[0].name = f"{self.name}.{op}.{self.count}"
        self.count += 1
        self.model.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, values: Any) -> Any:
        """An initializer within the graph, once for the same values."""
        import onnx_ir as ir

        told = f"{values.dtype} {values.shape} ".encode() + values.tobytes()
        name = f"constant.{hashlib.sha256(told).hexdigest()[:32]}"
        if name in self.model.graph.initializers:
            return self.model.graph.initializers[name]
        value = ir.Value(name=name, shape=ir.Shape(values.shape), const_value=ir.tensor(values, name=name))
        value.type = ir.TensorType(ir.tensor(values).dtype)
        self.model.graph.initializers.add(value)
        return value

    def _value(self, given: Any) -> Any:
        if isinstance(given, Stored):
            return initializer(self.model, given)
        return self.constant(numpy.array(given)) if isinstance(given, list) else given


Quantized = FourBits | EightBits


def put(model: Any, value: Any, one: Quantized) -> None:
    """In the place of an initializer of floats [out, in]."""
    import onnx_ir as ir

    model.graph.initializers.pop(value.name)
    name = one.codes.info.name
    if isinstance(one, FourBits) and one.native:
        for i, node in enumerate(list(_multiplying(value))):
            nodes = Nodes(model, node, f"{name}.{i}")
            out = one.multiply(nodes, node.inputs[0])
            _replace(model, node, nodes("Add", out, node.inputs[2]) if len(node.inputs) == 3 else out)
    if value.uses():
        weight = one.decode(Nodes(model, model.graph[0], name))
        weight.shape, weight.type = ir.Shape(one.shape), value.type
        ir.convenience.replace_all_uses_with(value, weight, replace_graph_outputs=True)


def _multiplying(value: Any) -> Iterator[Any]:
    """The nodes that do nothing but multiply by the transposed weight, and add."""
    for node, i in value.uses():
        if node.op_type == "Gemm" and i == 1 and _is_linear(node):
            yield node
        if node.op_type == "Transpose" and list(node.attributes["perm"].value) == [1, 0]:
            yield from (user for user, at in node.outputs[0].uses() if user.op_type == "MatMul" and at == 1)


def _is_linear(node: Any) -> bool:
    told = {name: one.value for name, one in node.attributes.items()}
    return (told.get("alpha", 1), told.get("beta", 1), told.get("transA", 0), told.get("transB", 0)) == (1, 1, 0, 1)


def _replace(model: Any, node: Any, out: Any) -> None:
    """The node goes, and what transposed a weight for it alone."""
    import onnx_ir as ir

    was = node.outputs[0]
    out.shape, out.type, name = was.shape, was.type, was.name
    ir.convenience.replace_all_uses_with(was, out, replace_graph_outputs=True)
    transposed = node.inputs[1].producer()
    model.graph.remove(node, safe=True)
    out.name = name  # a graph's output is called as it was
    if transposed is not None and not transposed.outputs[0].uses():
        model.graph.remove(transposed, safe=True)


def _flat(nodes: Nodes, values: Any) -> Any:
    return nodes("Reshape", values, [-1])
