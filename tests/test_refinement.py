"""Training what few bits lose: nearer to the float network on images not trained on, and in the files as in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import one_thread, tiny  # noqa: F401
from test_cli import Call, call  # noqa: F401
from torch import Tensor

import smi
from smi import quantization
from smi.adapters.timm import SparseModel
from smi.calibration import Calibration, from_noise
from smi.errors import SmiError
from smi.quantization import Quantized
from smi.refinement import Refinement
from smi.weights import weights_hash

OPTIONS = Refinement(steps=60, learning_rate=3e-3, batch_size=16)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(depth=1)


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    return from_noise(SparseModel(model, backend="reference").info, images=64)


def four_bits(model: Any, calibration: Calibration, refine: Refinement | None) -> Quantized:
    return smi.quantize(model, calibration, weights=4, activations=4, observer="mse", refine=refine)


@pytest.fixture(scope="module")
def refined(model: Any, calibration: Calibration) -> Quantized:
    return four_bits(model, calibration, OPTIONS)


def divergence(model: Any, network: Any, images: Tensor) -> float:
    """KL(float || quantized) in float64, mean over images."""
    with torch.no_grad():
        wanted, found = (run(images).double().softmax(1) for run in (model, network))
    return float((wanted * (wanted.log() - found.log())).sum(1).mean())


def test_images_not_trained_on_come_nearer_to_the_float_network(
    model: Any, calibration: Calibration, refined: Quantized
) -> None:
    plain = four_bits(model, calibration, None)
    assert plain.refinement is None and refined.refinement is not None
    before, after = (divergence(model, one.model, calibration.held_out) for one in (plain, refined))
    assert after < 0.6 * before
    recorded = refined.refinement["divergence"]["held_out"]
    assert recorded == pytest.approx((before, after), rel=1e-3), "what is trained is what is converted"
    first, last = refined.refinement["divergence"]["calibration"]
    assert last < 0.4 * first


def test_it_stays_an_ordinary_quantized_network(
    model: Any, calibration: Calibration, refined: Quantized, tmp_path: Path
) -> None:
    graph: Any = refined.model.run
    whole = [value for value in graph.state_dict().values() if value.dtype == torch.int8]
    assert len(whole) == len(refined.weights)
    assert all(int(value.min()) >= -7 and int(value.max()) <= 7 for value in whole)
    refined.save(tmp_path / "q")
    again = smi.load_quantized(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(again(calibration.held_out), refined.model(calibration.held_out))
    record = json.loads((tmp_path / "q/quantization.json").read_text())["refinement"]
    assert (record["method"], record["steps"], record["learning_rate"]) == ("qat", 60, 3e-3)
    assert record["divergence"]["held_out"] == list(refined.refinement["divergence"]["held_out"])  # type: ignore[index]


def test_its_onnx_file_says_the_same(
    calibration: Calibration, refined: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operator by operator, since onnxruntime's integer kernels round otherwise; the learned steps are in the file."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(quantization, "AGREEMENT", 0.0)  # random weights put images between classes
    refined.save(tmp_path / "q", onnx=True)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "q/model.onnx").graph.node}
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "q/model.onnx", options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        here = refined.model(calibration.held_out)
    there = torch.from_numpy(session.run(None, {"images": calibration.held_out.numpy()})[0])
    assert ((there - here).abs().amax(1) < 1e-4).float().mean() > 0.9


def test_the_seed_decides_and_the_callers_model_stays(model: Any, calibration: Calibration) -> None:
    before = weights_hash(model)
    few = [four_bits(model, calibration, Refinement(3, 1e-3, 16, seed)) for seed in (0, 0, 1)]
    first, same, other = (one.refinement["divergence"] for one in few)  # type: ignore[index]
    assert first == same != other
    assert weights_hash(model) == before and all(value.requires_grad for value in model.parameters())


def test_progress_is_told(model: Any, calibration: Calibration) -> None:
    told: list[tuple[int, int]] = []
    smi.quantize(model, calibration, refine=Refinement(2, 1e-4, 16), on_step=lambda *where: told.append(where))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps of the refinement is 0; expected a whole number of at least 1"),
        ({"batch_size": 0.5}, "batch_size of the refinement is 0.5"),
        ({"seed": -1}, "seed of the refinement is -1; expected a whole number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate of the refinement is 0.0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate of the refinement is nan"),
    ],
)
def test_options_that_train_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SmiError, match=message):
        Refinement(**options)


def test_a_rate_that_diverges_is_named(model: Any, calibration: Calibration) -> None:
    with pytest.raises(
        SmiError, match=r"the loss of the refinement is not finite; use a lower learning_rate than 1e\+30"
    ):
        four_bits(model, calibration, Refinement(3, 1e30, 16))


def test_command_errors_are_one_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    for words, message in (
        (["--refine", "-1"], "steps of the refinement is -1"),
        (["--refine", "5", "--learning-rate", "-1"], "learning_rate of the refinement is -1.0"),
        (["--learning-rate", "1e-3"], "--learning-rate 0.001 goes with --refine"),
    ):
        code, said, err = call("quantize", "--noise", "8", "--out", tmp_path / "q", *words)
        assert (code, said) == (2, ""), words
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
