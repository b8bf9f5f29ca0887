"""A model as an ONNX graph: written by torch's exporter, run in onnxruntime, and in int8 on request.

The files have the places and names that sentence-transformers gives its own (`onnx/model.onnx`, and
`onnx/model_qint8_quantized.onnx` for int8 without a processor's name). A graph ends at the encoder's output: readers
pool, cut and normalise as the folder's other modules say.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import QuintetError, UserError

FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_qint8_quantized.onnx"
OPSET = 18  # of 2022: onnxruntime reads it since 1.14, and torch's exporter translates to it without a conversion
# Between our vectors and onnxruntime's, in fp32: other kernels than torch's, over as many as 24 layers. It is what
# optimum allows a BERT.
TOLERANCE = 1e-4
_ONE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB: weights beyond this go into a file of their own


@dataclass(frozen=True)
class Graphs:
    """What was written: the largest difference of the graph's numbers from ours, and how int8 compares with fp32.

    Attributes:
        difference: the largest absolute difference of any number.
        cosine, lowest: mean and lowest cosine of the int8 vectors to the fp32 ones; None without int8.
    """

    difference: float
    cosine: float | None = None
    lowest: float | None = None

    def __str__(self) -> str:
        text = f"{FILE}: opset {OPSET}, max abs difference {self.difference:.1e} in onnxruntime"
        if self.cosine is None:
            return text
        return f"{text}\n{INT8_FILE}: cosine to the fp32 vectors {self.cosine:.4f}, lowest {self.lowest:.4f}"


def require() -> None:
    """Raise UserError when a library that writes or runs graphs is missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"onnx=true: needs {', '.join(missing)}; pip install 'quintet[onnx]'")


def check(difference: float) -> float:
    """The difference, when it is small enough. Raises QuintetError, also for NaN."""
    if not difference <= TOLERANCE:
        raise QuintetError(
            f"export: {FILE} differs by {difference:.1e} in onnxruntime (allowed {TOLERANCE:.0e}); nothing was written"
        )
    return difference


def write(
    backbone: nn.Module, inputs: Mapping[str, Tensor], output: str, folder: Path, one_file_bytes: int = _ONE_FILE_BYTES
) -> None:
    """Write the graph of a backbone of transformers in fp32, for any number of rows and tokens.

    Args:
        inputs: an example of each input by its name, int64 [n, T] with n and T above 1.
        output: the field of the backbone's output that the graph gives, which also names it.
        one_file_bytes: weights of more than this lie beside the graph, in model.onnx_data.
    """
    import onnx

    file = folder / FILE
    file.parent.mkdir()
    axes = {name: {0: "rows", 1: "tokens"} for name in inputs}
    apart = sum(tensor.numel() * tensor.element_size() for tensor in backbone.parameters()) > one_file_bytes
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Positional(backbone, tuple(inputs), output).eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(tuple(axes.values()),),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(file), external_data=apart)
    graph = onnx.load(file, load_external_data=False)
    _clean(graph)
    if apart:  # the name that readers of the hub ask for
        file.with_name(f"{file.name}.data").rename(file.with_name(f"{file.name}_data"))
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{file.name}_data"
    onnx.save(graph, file)


class _Positional(nn.Module):
    """A backbone that takes its inputs one after the other and gives one field of its output."""

    def __init__(self, backbone: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.backbone, self.names, self.output = backbone, names, output

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        found: Tensor = getattr(self.backbone(**named, return_dict=True), self.output)
        return found


def _clean(model: Any) -> None:
    """Take out where in whose files each node was traced: half of a small model, and nobody else's business."""
    del model.metadata_props[:]
    for holder in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del holder.metadata_props[:]
        holder.doc_string = ""


def quantize(folder: Path) -> None:
    """Write the graph a second time with weights in 8 bits; activations are rounded as they come.

    Weights have a scale for each output, and 7 of the 8 bits: AVX2 and AVX-512 without VNNI add two products in 16
    bits, which 8 would overflow (onnxruntime's documentation on quantization).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    apart = (folder / f"{FILE}_data").is_file()
    with _quiet():
        quantize_dynamic(
            folder / FILE,
            folder / INT8_FILE,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=apart,
        )


class Session:
    """An ONNX file in onnxruntime on the CPU, with as many threads as torch has."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self._session.get_inputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's output for what a tokenizer gives; inputs that the graph does not have are left out."""
        (found,) = self._session.run(None, {name: inputs[name].numpy() for name in self.names})
        return torch.from_numpy(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporter and quantiser tell about themselves out of the log."""
    root = logging.getLogger()
    level, handlers = root.manager.disable, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.handlers[:] = handlers  # logging.warning() puts one there
