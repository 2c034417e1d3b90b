"""The Python of the documents runs as it is printed there, on a small network in place of a published one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pools import fill_pool
from small import one_thread, tiny  # noqa: F401

import smi
from smi.dataset import fill_dropped
from smi.pool import to_pixels

ROOT = Path(__file__).parent.parent
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the one Python block of a page that holds a text, in an empty folder; what it leaves in its names."""
    model = tiny(num_classes=1000)
    config = smi.Config(iterations=3, prune_at=(1,), prune_ratio=(0.5,), batch_size=2)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    monkeypatch.setattr(smi, "load_model", lambda _: model, raising=False)
    monkeypatch.setattr(smi, "preset", lambda _: config, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(page: str, holds: str, shorter: dict[str, str] | None = None, **names: Any) -> dict[str, Any]:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        (code,) = [block for block in blocks if holds in block]
        for printed, less in (shorter or {}).items():
            assert printed in code
            code = code.replace(printed, less)
        exec(code, names)
        return names

    return run


@pytest.mark.parametrize(("page", "fill"), [("README.md", "as-is"), ("docs/inverting.md", "mean")])
def test_images_come_out_of_a_model_in_a_few_lines(run: Run, page: str, fill: Any) -> None:
    result = run(page, "targets=[1, 207, 281]")["result"]
    images = fill_dropped(result.images, result.keep, result.indices, result.info, 0, fill)
    lines = [json.loads(line) for line in Path("images/metadata.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == [1, 207, 281]
    for line, image, keep in zip(lines, images, result.keep, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(Path("images", line["file_name"])))).permute(2, 0, 1)
        assert torch.equal(pixels, to_pixels(image, result.info)) and line["keep"] == keep.tolist()


def test_a_pool_is_made(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/pools.md", "WorkPlan", {"1024": "4"})
    assert capsys.readouterr().out == "4 True\n"
    assert len(smi.open_pool("pools/deit-b")) == 4


def test_attention_maps(run: Run) -> None:
    teacher = tiny()
    result = smi.invert(teacher, [0, 1], smi.Config(iterations=3, prune_at=(1,), prune_ratio=(0.5,)))
    names = run("docs/inverting.md", "attention_maps", smi=smi, teacher=teacher, result=result)
    assert [tuple(one.shape) for one in names["maps"]] == [(2, 2, 9, 9)] * 2
    assert names["seen"].shape == (2, 8)


def test_soft_targets(run: Run) -> None:
    names = run("docs/inverting.md", "one_hot", smi=smi, torch=torch, teacher=tiny(num_classes=1000))
    assert names["result"].targets.tolist() == [1, 207]


def test_a_model_without_classes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: tiny(num_classes=0))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = run("docs/inverting.md", "losses.embedding", smi=smi, timm=timm, images=images)
    assert names["wanted"].shape == (2, 16) and len(names["result"].images) == 2


def test_the_published_call(run: Run) -> None:
    images, model = torch.zeros(2, 3, 16, 16), tiny(num_classes=1000)
    names = run("docs/kernels.md", "PublishedTeacher", {"197": "17"}, smi=smi, timm=timm, torch=torch, images=images)
    torch.testing.assert_close(names["logits"], model(images))
    assert names["attention"][-1].shape == (2, 2, 17, 17)


def test_onnxruntime_calibrates_on_a_pool(run: Run) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    fill_pool(Path("pools/deit-b"))
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["pixels", "w"], ["y"], strides=[4, 4])],
        "patches",
        [onnx.helper.make_tensor_value_info("pixels", real, ["n", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", real, ["n", 4, 2, 2])],
        [onnx.numpy_helper.from_array(np.ones((4, 3, 4, 4), np.float32), "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), "vit.onnx")
    run("docs/applications.md", "CalibrationReader")
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load("vit.int8.onnx").graph.node)
