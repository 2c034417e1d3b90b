"""Reading ``model.pt2`` of whatever origin: nothing in it is unpickled, executed or looked up outside its operators.

`torch.export.load` takes what it reads for its own: it unpickles tensors and objects, loads compiled libraries,
executes guards, evaluates sizes as Python and finds operators by attributes of the torch module. Here the archive is
searched for all of that first, and by the reader that torch itself uses, so that both see the same.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_RECORDS = re.compile(
    r"data/(weights/(weight_\d+|\w+_weights_config\.json)|constants/(tensor_\d+|\w+_constants_config\.json)|"
    r"sample_inputs/\w+\.pt)|models/\w+\.json|archive_format|archive_version|byteorder|version|\.data/\w+"
)
_TARGET = re.compile(r"torch\.ops\.(aten|quantized_decomposed|torchao)\.(?!from_file)(?!_?_)\w+\.\w+|_operator\.[a-z]+")
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, (positive|integer|nonnegative)=True)*\)")
_SIZE = re.compile(r"([a-z]+\d+|\d{1,18}|Max|Min|Mod|FloorDiv|\*(?!\*)|[-+/(), ])*")
_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def load_program(file: Path) -> Callable[[Tensor], Tensor]:
    """The program, to be called with images; its operators must have been registered.

    Raises:
        ValueError: it holds what would have to be executed or unpickled.
        Exception: of many kinds, where it is damaged.
    """
    data = file.read_bytes()
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    for record in reader.get_all_records():
        if not _RECORDS.fullmatch(record):
            raise ValueError(f"it holds {record!r}, which is no part of a quantized model")
        if record.endswith(".json"):
            _check(json.loads(reader.get_record(record)))
        elif record.endswith(".pt"):
            torch.load(io.BytesIO(reader.get_record(record)), map_location="cpu", weights_only=True)
    module: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(data)).module()
    return module


def _check(told: Any) -> None:
    for key, value in _entries(told):
        if key == "use_pickle" and value is not False:
            raise ValueError("it holds a pickle, which is not read")
        if key == "guards_code" and value:
            raise ValueError("it holds guards, which would have to be executed")
        if key == "target" and not (isinstance(value, str) and _TARGET.fullmatch(value)):
            raise ValueError(f"it calls {str(value)[:60]!r}, which is no operator of a quantized model")
        if key == "expr_str" and not _is_size(value):
            raise ValueError(f"it holds the size {str(value)[:60]!r}, which would have to be evaluated")
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            for name, kind in _entries(json.loads(value) if value else None):
                if name == "type" and kind not in _TYPES:
                    raise ValueError(f"it takes or gives {str(kind)[:60]!r}, expected tensors")


def _entries(told: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth."""
    waiting = [told]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _is_size(text: Any) -> bool:
    return isinstance(text, str) and len(text) < 500 and _SIZE.fullmatch(_SYMBOL.sub("s0", text)) is not None
