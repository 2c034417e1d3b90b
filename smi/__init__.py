"""Sparse Model Inversion: training-like images out of a frozen Vision Transformer, from fewer and fewer of its patches.

    import smi
    result = smi.invert(model, targets=[1, 207, 281], config=smi.preset("fast"))

After Hu et al., "Sparse Model Inversion: Efficient Inversion of Vision Transformers for Data-Free Applications",
ICML 2024. Importing this package does not import torch; the first use of a name does what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smi._version import __version__

if TYPE_CHECKING:
    from smi import calibration, export, flops, logs, losses, refinement, run, schedules, time_left, workers
    from smi.adapters.published import PublishedTeacher
    from smi.adapters.timm import SparseModel
    from smi.comparison import compare
    from smi.comparison_plan import CompareConfig
    from smi.config import PRESETS, Config, preset
    from smi.dataset import SyntheticDataset
    from smi.errors import SmiError
    from smi.evaluation import Evaluation, evaluate
    from smi.inversion import Inversion, invert
    from smi.lessons import Synthesis
    from smi.models import load_model
    from smi.objectives import Context, Objective
    from smi.packed import PackedPool, open_pool, pack
    from smi.pool import Pool, PoolWriter
    from smi.quantization import Quantized, QuantizedModel, load_quantized, quantize
    from smi.sparse_plan import SparsePlan
    from smi.state import ModelInfo, Phase, Result, WorkPlan
    from smi.streaming import PoolStream, stream
    from smi.text_head import with_text_head
    from smi.transfer import TransferConfig, teach

_HOME = {
    "CompareConfig": "comparison_plan",
    "Config": "config",
    "Context": "objectives",
    "Evaluation": "evaluation",
    "Inversion": "inversion",
    "ModelInfo": "state",
    "Objective": "objectives",
    "PRESETS": "config",
    "PackedPool": "packed",
    "Phase": "state",
    "Pool": "pool",
    "PoolStream": "streaming",
    "PoolWriter": "pool",
    "PublishedTeacher": "adapters.published",
    "Quantized": "quantization",
    "QuantizedModel": "quantization",
    "Result": "state",
    "SmiError": "errors",
    "SparseModel": "adapters.timm",
    "SparsePlan": "sparse_plan",
    "Synthesis": "lessons",
    "SyntheticDataset": "dataset",
    "TransferConfig": "transfer",
    "WorkPlan": "state",
    "compare": "comparison",
    "evaluate": "evaluation",
    "invert": "inversion",
    "load_model": "models",
    "load_quantized": "quantization",
    "open_pool": "packed",
    "pack": "packed",
    "preset": "config",
    "quantize": "quantization",
    "stream": "streaming",
    "teach": "transfer",
    "with_text_head": "text_head",
}

_MODULES = (
    "calibration",
    "export",
    "flops",
    "logs",
    "losses",
    "refinement",
    "run",
    "schedules",
    "time_left",
    "workers",
)

__all__ = [
    "PRESETS",
    "CompareConfig",
    "Config",
    "Context",
    "Evaluation",
    "Inversion",
    "ModelInfo",
    "Objective",
    "PackedPool",
    "Phase",
    "Pool",
    "PoolStream",
    "PoolWriter",
    "PublishedTeacher",
    "Quantized",
    "QuantizedModel",
    "Result",
    "SmiError",
    "SparseModel",
    "SparsePlan",
    "Synthesis",
    "SyntheticDataset",
    "TransferConfig",
    "WorkPlan",
    "__version__",
    "calibration",
    "compare",
    "evaluate",
    "export",
    "flops",
    "invert",
    "load_model",
    "load_quantized",
    "logs",
    "losses",
    "open_pool",
    "pack",
    "preset",
    "quantize",
    "refinement",
    "run",
    "schedules",
    "stream",
    "teach",
    "time_left",
    "with_text_head",
    "workers",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"smi.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'smi' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"smi.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
