"""Counting how often a network is right: the counts, the data sets, the command."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pools import INFO
from small import CLASSES, one_thread, tiny  # noqa: F401
from test_cli import Call, call  # noqa: F401
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import smi
from smi import embedded
from smi.adapters.timm_names import known_names
from smi.calibration import from_noise
from smi.errors import SmiError
from smi.evaluation import _label_by_name, compiled, data_config, data_transform, evaluate_together, open_dataset
from smi.export import _class_folders

IDENTITY = torch.eye(6)


def numbers(labels: list[int], first: list[int], second: list[int]) -> TensorDataset:
    """Items whose "image" is the logits: 2 at `first`, 1 at `second`, else 0."""
    return TensorDataset(2 * IDENTITY[first] + IDENTITY[second], torch.tensor(labels))


def test_top1_and_top5_are_counted_by_hand() -> None:
    data = TensorDataset(-torch.arange(6.0).expand(8, 6), torch.tensor([0, 0, 0, 1, 4, 4, 5, 5]))  # ranked 0 to 5
    seen: list[tuple[int, int]] = []
    found = smi.evaluate(lambda x: x, data, batch_size=3, on_batch=lambda *at: seen.append(at))
    assert (found.images, found.classes, found.top1, found.top5) == (8, 6, 3 / 8, 6 / 8)
    assert seen == [(3, 8), (6, 8), (8, 8)]
    assert 0 < found.model_seconds <= found.seconds
    assert found.images_per_second == 8 / found.model_seconds


def test_fewer_than_five_classes_and_limit() -> None:
    data = numbers([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0], [1, 2, 3, 1, 1, 1])
    half = smi.evaluate(lambda x: x, data, limit=3)  # 0, 2 and 4, spread evenly
    assert (half.images, half.top1) == (3, 2 / 3)
    few = smi.evaluate(lambda x: x[:, :3], numbers([0, 1, 2], [0, 0, 0], [1, 1, 1]))
    assert (few.top1, few.top5) == (1 / 3, 1.0)


def test_logits_that_are_no_numbers_are_never_right() -> None:
    """All NaN, of which the label would be among the five largest of six, or one too many."""
    data = numbers([0, 1, 2, 3, 4, 5], [5] * 6, [4] * 6)
    assert smi.evaluate(lambda x: x, data).top5 > 0
    for broken in (lambda x: x * torch.nan, lambda x: torch.cat((x[:, :5], x[:, 5:] * torch.nan), 1)):
        found = smi.evaluate(broken, data)
        assert (found.top1, found.top5) == (0, 0)


def test_training_mode_comes_back() -> None:
    model = nn.Sequential(nn.Dropout(0.9)).train()
    assert smi.evaluate(model, numbers([0] * 50, [0] * 50, [1] * 50)).top1 == 1.0
    assert model.training


def test_parts_in_other_modes_than_the_whole_stay_in_them() -> None:
    """Frozen batch norms in a network that is trained; dropout that acts in one that is not."""
    data = numbers([0] * 50, [0] * 50, [1] * 50)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6))
    for modes in ([True, True, False], [False, True, False]):
        for part, training in zip(model.modules(), modes, strict=True):
            part.training = training
        assert smi.evaluate(model, data).top1 == 1.0
        assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"dataset": TensorDataset(torch.zeros(0, 6), torch.zeros(0))}, "data set is empty"),
        ({"dataset": numbers([6], [0], [1])}, "a label 6, the model has classes 0 to 5"),
        ({"dataset": numbers([1, -1, 2], [0] * 3, [1] * 3)}, "a label -1, the model has classes 0 to 5"),
        ({"dataset": TensorDataset(IDENTITY, IDENTITY, IDENTITY)}, r"gives 3 values an item; expected pairs"),
        ({"dataset": IDENTITY}, r"gives Tensor batches; expected pairs"),
        ({"model": lambda x: x[0]}, r"expected \(2, classes\) logits"),
    ],
)
def test_unusable_input(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": lambda x: x, "dataset": numbers([0, 1], [0, 1], [1, 2])} | options
    with pytest.raises(SmiError, match=message):
        smi.evaluate(**arguments)


def test_compiled_networks_take_short_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).eval()
    run = compiled(model, 4, (3, 2, 2))
    data = TensorDataset(torch.randn(10, 3, 2, 2), torch.arange(10) % 6)
    slow, fast = (smi.evaluate(one, data, batch_size=4) for one in (model, run))
    assert (fast.images, fast.top1, fast.top5) == (slow.images, slow.top1, slow.top5)
    for count in (4, 1):
        torch.testing.assert_close(run(data.tensors[0][:count]), model(data.tensors[0][:count]))
    with pytest.raises(SmiError, match=r"cannot be compiled here: .*Leave out --compile"):
        compiled(model, 4, (3, 5, 5))


def test_two_models_take_turns_and_are_counted_apart() -> None:
    data = numbers([0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [1, 2, 3, 1, 1])
    ran: list[str] = []

    def right(x: Tensor) -> Tensor:
        ran.append("right")
        return x

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ran.append("wrong")
            return -x

    wrong = Wrong().train()
    found = evaluate_together([(right, data), (wrong, data)], batch_size=2)
    assert ran == ["right", "wrong", "right", "wrong", "wrong", "right", "right", "wrong"]  # each once before
    for one, model in zip(found, (right, wrong), strict=True):
        alone = smi.evaluate(model, data, batch_size=2)
        assert (one.images, one.top1, one.top5) == (alone.images, alone.top1, alone.top5)
    assert found[0].top1 == 3 / 5 != found[1].top1 and wrong.training
    with pytest.raises(SmiError, match="other labels for the same images"):
        evaluate_together([(right, data), (right, numbers([0, 1, 2, 3, 5], [0] * 5, [1] * 5))])
    with pytest.raises(SmiError, match=r"have \[5, 2\] images; expected the same"):
        evaluate_together([(right, data), (right, numbers([0, 1], [0] * 2, [1] * 2))])


def test_a_quantized_network_compiles_to_integer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what inductor is about to write as C++: a oneDNN call for every linear layer and the embedding."""
    made: list[str] = []

    def enough(graph: Any) -> None:
        made.extend(type(operation).__name__ for operation in graph.operations)
        raise RuntimeError("enough was seen")  # the compiler that would come next takes most of the time

    monkeypatch.setattr("torch._inductor.graph.GraphLowering.codegen", enough)
    network = tiny(depth=2)
    noise = from_noise(smi.SparseModel(network, backend="reference").info, images=8)
    for model, integer in ((smi.quantize(network, noise).model, True), (network, False)):
        made.clear()
        with pytest.raises(SmiError, match="enough was seen"):
            compiled(model, 4, (3, 16, 16))
        assert made.count("QLinearPointwisePT2E") == (4 * 2 + 1 if integer else 0)
        assert made.count("QConvPointWisePT2E") == (1 if integer else 0)


# --- data sets ---


def write_folder(path: Path, names: list[str], each: int = 2, side: int = 16) -> Path:
    """Pictures of noise, `each` in one folder for each name."""
    draw = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path / name / f"{i}.png")
    return path


def test_a_folder_equals_a_count_by_hand(tmp_path: Path) -> None:
    model = tiny()
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0}
    names = ["ant", "bee", "cow", "dog", "eel"]
    folder = write_folder(tmp_path, names, each=4)
    data = open_dataset(str(folder), data_transform(data_config(model)), num_classes=CLASSES)
    found = smi.evaluate(model, data, batch_size=7)

    right, ranks = 0, []
    for label, name in enumerate(names):
        for file in sorted((folder / name).iterdir()):
            pixels = torch.from_numpy(np.asarray(Image.open(file)).astype(np.float32) / 255).permute(2, 0, 1)
            image = (pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[
                :, None, None
            ]
            with torch.no_grad():
                logits = model(image[None])[0].tolist()
            right += max(range(CLASSES), key=logits.__getitem__) == label
            ranks.append(sorted(logits, reverse=True).index(logits[label]))
    assert 0 < right < 20, "all right or all wrong would prove little"
    assert (found.images, found.top1, found.top5) == (20, right / 20, sum(rank < 5 for rank in ranks) / 20)


def labels(data: Any) -> dict[str, int]:
    """The label of each class folder, as items have it."""
    return {Path(file).parent.name: data[place][1] for place, (file, _) in enumerate(data.samples)}


def plain(picture: Any) -> Tensor:
    return torch.zeros(1)


def test_folders_named_after_the_classes_are_taken_by_name(tmp_path: Path) -> None:
    shuffled = ("Zebra", "ant", "Great shark")
    folder = write_folder(tmp_path / "names", ["ant", "great-shark", "zebra"])
    assert labels(open_dataset(str(folder), plain, num_classes=3, class_names=shuffled)) == {
        "zebra": 0,
        "ant": 1,
        "great-shark": 2,
    }
    assert labels(open_dataset(str(folder), plain, num_classes=3)) == {"ant": 0, "great-shark": 1, "zebra": 2}
    long = ("of the " * 12 + "zoo", "of the " * 12 + "ark", *(f"class {number}" for number in range(9)))
    exported = _class_folders(dataclasses.replace(INFO, num_classes=11, class_names=long))
    assert exported[0].endswith("-0") and len(exported[0]) > 60
    named = write_folder(tmp_path / "long", exported)
    found = labels(open_dataset(str(named), plain, num_classes=11, class_names=long))
    assert found == {name: number for number, name in enumerate(exported)}
    many = write_folder(tmp_path / "many", [str(number) for number in range(11)])
    numbered = {str(number): number for number in range(11)}
    assert labels(open_dataset(str(many), plain, num_classes=11)) == numbered
    # Exported of a pool whose model had no names yet.
    assert labels(open_dataset(str(many), plain, num_classes=11, class_names=long)) == numbered


def test_folders_of_imagenet_are_taken_in_their_order_though_its_classes_have_names(tmp_path: Path) -> None:
    info = ImageNetInfo()
    names = known_names(timm.create_model("test_vit.r160_in1k"))
    assert len(names) == 1000 and info.label_names() == sorted(info.label_names())
    folder = SimpleNamespace(classes=info.label_names(), target_transform=None)
    _label_by_name(folder, 1000, names)
    assert folder.target_transform is None
    exported = _class_folders(dataclasses.replace(INFO, num_classes=1000, class_names=names))
    assert exported[134] == "crane-134" and len(set(exported)) == 1000
    folder.classes = sorted(exported)
    _label_by_name(folder, 1000, names)
    assert [exported[folder.target_transform(place)] for place in range(1000)] == sorted(exported)


def write_cifar10(path: Path) -> None:
    """Twenty test images as torchvision reads them, without the checksums that make it refuse them."""
    folder = path / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    batch = {"data": draw.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [f"c{i}" for i in range(10)]))
    data = open_dataset(f"cifar10:{tmp_path}", plain, num_classes=10)
    assert [label for _, label in data] == [i % 10 for i in range(20)]
    with pytest.raises(SmiError, match="10 classes, the model has 1000"):
        open_dataset(f"cifar10:{tmp_path}", plain, num_classes=1000)


@pytest.mark.parametrize(
    ("data", "download", "message"),
    [
        ("", False, "name the images with --data"),
        ("cifar10:/nowhere", False, "holds no such images: .*Fetch it with --download"),
        ("imagenet:/nowhere", False, "holds no such images"),
        ("imagenet:/nowhere", True, "cannot be downloaded"),
        ("cifar:/nowhere", False, "unknown data set 'cifar'. Did you mean 'cifar10'"),
        ("/nowhere", False, "there are no images at '/nowhere'"),
    ],
)
def test_data_that_is_not_there(data: str, download: bool, message: str) -> None:
    with pytest.raises(SmiError, match=message):
        open_dataset(data, plain, num_classes=10, download=download)


def test_classes_must_fit_the_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["a", "b", "c"])
    with pytest.raises(SmiError, match=r"has 3 classes, the model has 5"):
        open_dataset(str(folder), plain, num_classes=5)
    with pytest.raises(SmiError, match="--download goes with cifar10"):
        open_dataset(str(folder), plain, num_classes=3, download=True)
    (tmp_path / "d").mkdir()
    with pytest.raises(SmiError, match="holds no such images"):
        open_dataset(str(folder), plain, num_classes=4)


def test_pictures_of_the_embedded_teacher_are_not_cropped() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (embedded.MEAN, embedded.STD))
    found = data_transform(data_config(smi.load_model("embedded:teacher")))(picture)
    torch.testing.assert_close(found, (pixels - mean) / std)


# --- command ---


def test_command(call: Call, tmp_path: Path) -> None:  # noqa: F811
    folder = write_folder(tmp_path, [str(i) for i in range(10)], each=3, side=64)
    words = ["evaluate", "test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--data", folder]
    code, out, err = call(*words, "--json", "--batch-size", "4")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    torch.manual_seed(0)
    model = smi.load_model("test_vit", pretrained=False, img_size=64, num_classes=10)
    data = open_dataset(str(folder), data_transform(data_config(model)), num_classes=10)
    with torch.no_grad():
        right = [int(model(image[None]).argmax()) == label for image, label in data]
    assert (facts["images"], facts["classes"], facts["top1"]) == (30, 10, sum(right) / 30)
    assert facts["images_per_second"] > 0
    code, out, err = call(*words, "--limit", "7")
    assert (code, err) == (0, "")
    assert out.startswith("top-1   ") and "of 7 images" in out
    both = json.loads(call(*words, "--against", "test_vit", "--json")[1])
    assert both["top1"] == both["against"]["top1"] == facts["top1"] and both["against"]["model"] == "test_vit"
    code, out, err = call(*words, "--against", "test_vit", "--limit", "7")
    assert (code, err) == (0, "")
    named, top1, _, speed = out.splitlines()
    assert named.split() == ["test_vit"] * 2 and len(set(top1.split()[1:3])) == 1 and "images/s" in speed


def test_command_errors_are_one_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    for words, message in (
        (["evaluate"], "name the images with --data"),
        (["evaluate", "--data", "x", "--backend", "cpu"], "--backend cpu is for inversion"),
        (["evaluate", "a", "--against", "b", "--checkpoint", "c", "--data", "x"], "would be loaded into both a and b"),
        (["evaluate", tmp_path / "q.pt2", "--no-pretrained", "--data", "x"], "leave out --no-pretrained"),
        (["evaluate", "--data", "cifar10:/nowhere"], "Fetch it with --download"),
        (["evaluate", "--data", write_folder(tmp_path, ["a", "b"])], "has 2 classes, the model has 10"),
        (["evaluate", tmp_path / "none.pt2", "--data", "x"], "is not a quantized model"),
    ):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
