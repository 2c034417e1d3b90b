"""Quantized networks as ONNX: QuantizeLinear and DequantizeLinear around float operators."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi.errors import SmiError

OPSET = 18


def check_packages() -> None:
    """Raises `SmiError` if onnx, onnxscript or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None


def save_onnx(program: Any, example: Tensor, path: Path) -> None:
    """Write an exported, converted program; its input is ``images``, its output ``logits``, the batch is free.

    Raises:
        SmiError: a package is missing.
    """
    check_packages()
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18

    def quantize_per_tensor(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
        """As the operator is defined: onnxscript's own translation forgets the ends of fewer than 8 bits."""

        def constant(value: int) -> Any:
            return op.Constant(value=onnx.helper.make_tensor("value", int(dtype), [], [value]))

        whole = op.QuantizeLinear(x, scale, constant(zero_point))
        if (quant_min, quant_max) == (0, 255):
            return whole
        return op.Clip(whole, constant(quant_min), constant(quant_max))

    table: Any = {torch.ops.quantized_decomposed.quantize_per_tensor.default: quantize_per_tensor}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            custom_translation_table=table,
            verbose=False,
        )
        assert made is not None
    model = made.model_proto
    _keep_biases_apart(model)
    onnx.save(model, path)


def _keep_biases_apart(model: Any) -> None:
    """``Conv(x, w, b)`` as ``Conv(x, w) + b``, and ``Gemm`` alike, in place.

    Onnxruntime would round `b` to a multiple of the products' scale: coarse in few bits, and float in the converted
    program.
    """
    import onnx

    graph = model.graph
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        bias = onnx.numpy_helper.to_array(constants[node.input[2]])
        graph.initializer.remove(constants[node.input[2]])
        shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
        apart, output = f"{node.output[0]}_bias", node.output[0]
        graph.initializer.append(onnx.numpy_helper.from_array(bias.reshape(shape), apart))
        del node.input[2]
        node.output[0] = f"{output}_product"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], apart], [output], name=f"{output}_add"))
    del graph.node[:]
    graph.node.extend(nodes)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """A function of images (B, C, H, W) float32 on onnxruntime's CPU provider.

    Raises:
        SmiError: onnxruntime is missing, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has families of its own
        raise SmiError(f"{str(path)!r} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run


def _missing(error: ImportError) -> SmiError:
    return SmiError(
        f"ONNX needs onnx, onnxscript and onnxruntime, and {error.name} cannot be imported; install them with "
        f"pip install 'sparse-model-inversion[export]'."
    )
