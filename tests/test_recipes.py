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
