"""Every baseline computes the published iteration before its speed is compared with anything."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from small import PRUNED, one_thread, tiny  # noqa: F401
from torch import Tensor

import smi
from benchmarks.baselines import BASELINES, Baseline
from benchmarks.baselines_timm import PEERS, Peer, merge, merge_tokens
from smi.augment import NOISE, draw_offsets, normal_images

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
B = 3
CONFIG = smi.Config(semantics="official", seed=3, tv1=0.01, l2=1e-3, **PRUNED).resolved()


def start(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    model = tiny().to(dtype)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": MEAN.tolist(), "std": STD.tolist()}
    config = CONFIG
    offsets = draw_offsets(config, range(B), (16, 16), (4, 4), ())
    return {
        "model": model,
        "images": normal_images(config.seed, NOISE, range(B), (3, 16, 16)).to(dtype),
        "targets": torch.tensor([0, 3, 1]),
        "offsets": offsets,
        "config": config,
        "mean": MEAN.to(dtype),
        "std": STD.to(dtype),
    }


def run(name: str, dtype: torch.dtype, **options: Any) -> tuple[Baseline, list[Tensor]]:
    baseline = Baseline(name, **start(dtype), **options)
    keeps = []
    for t in range(CONFIG.iterations):
        baseline.step()
        if t in baseline.schedule:
            keeps.append(baseline.keep)
    return baseline, keeps


@pytest.fixture(scope="module")
def expected() -> dict[bool, oracle.OracleResult]:
    given = start()
    given["mean"], given["std"] = MEAN.double().tolist(), STD.double().tolist()
    return {
        dense: oracle.invert(**{**given, "config": CONFIG.replace(strategy="dense" if dense else "sparse")})
        for dense in (False, True)
    }


@pytest.mark.parametrize("name", BASELINES)
def test_in_float64_it_is_the_oracle(name: str, expected: dict[bool, oracle.OracleResult]) -> None:
    baseline, keeps = run(name, torch.float64, exact=True, compiler="none")
    wanted = expected[BASELINES[name].dense]
    assert min(wanted.margins, default=1) > 1e-6
    assert len(keeps) == len(wanted.keeps) == (0 if BASELINES[name].dense else 3)
    assert all(torch.equal(a, b) for a, b in zip(keeps, wanted.keeps, strict=True))
    assert (baseline.images.detach() - wanted.images).abs().max() < 1e-9
    assert baseline.loss.item() == pytest.approx(wanted.history["total"][-1], rel=1e-9)


@pytest.mark.parametrize("name", ["E32d", "E32s", "E32f", "E32s+graph"])
def test_in_float32_it_is_the_library(name: str) -> None:
    given = start(torch.float32)
    config = CONFIG.replace(strategy="dense" if BASELINES[name].dense else "sparse")
    library = smi.Inversion(given["model"], given["targets"], config, backend="reference")
    while not library.done:
        library.step()
    baseline, _ = run(name, torch.float32)
    assert torch.equal(baseline.keep, library.keep)
    assert (baseline.images.detach() - library.images).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["A16", "A16+graph", "C16"])
def test_in_bf16_gradients_point_the_same_way(name: str) -> None:
    for prunings in (0, 2):
        exact = Baseline(name, **start(torch.float32), exact=True, compiler="none")
        rough = Baseline(name, **start(torch.float32), compiler="none")
        for _ in range(7 if prunings else 0):
            exact.step()
        rough.iteration, rough.keep = exact.iteration, exact.keep
        rough.images = exact.images.detach().clone().requires_grad_(True)
        a, b = exact.gradient(), rough.gradient()
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.99
        assert not torch.equal(a, b), "nothing ran in bf16"


def test_weights_get_gradients_only_where_the_published_code_leaves_them_trainable() -> None:
    for name, recipe in BASELINES.items():
        baseline = Baseline(name, **start(torch.float32), compiler="none")
        baseline.step()
        grads = [p.grad is not None for p in baseline.network.model.parameters()]
        assert all(grads) if recipe.trainable else not any(grads)


def test_through_inductor_too() -> None:
    given = start(torch.float32)
    given["config"] = CONFIG.replace(iterations=2, prune_at=(), prune_ratio=())
    compiled, eager = (Baseline(name, **given, exact=True) for name in ("C16", "E32s"))
    for baseline in (compiled, eager):
        baseline.step()
        baseline.step()
    assert (compiled.images - eager.images).abs().max() < 1e-3


@pytest.mark.parametrize("tune", [True, False])
def test_all_of_a_compiled_step_is_tuned_or_nothing(tune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options.get("mode")) or function)
    made = Baseline("C16", **start(torch.float32))
    asked.clear()
    made.in_graph = tune is False  # whether there are graphs decides nothing here
    made._start_update("inductor", tune)
    assert asked == ["max-autotune-no-cudagraphs" if tune else None] * 2


def test_compiling_ahead_changes_nothing() -> None:
    cold, warm = (Baseline("C16", **start(), exact=True, compiler="none") for _ in range(2))
    warm.warm_up()
    for _ in range(5):
        cold.step()
        warm.step()
    assert torch.equal(cold.images, warm.images) and torch.equal(cold.keep, warm.keep)


def test_another_model_or_semantics_is_refused_with_the_mend() -> None:
    given = start(torch.float32)
    with pytest.raises(smi.SmiError, match="Did you mean 'E32s'"):
        Baseline("E32x", **given)
    with pytest.raises(smi.SmiError, match=r'augment_per is .image.*semantics="official"'):
        Baseline("E32s", **{**given, "config": smi.Config(**PRUNED)})
    with pytest.raises(smi.SmiError, match="not exactly one class token"):
        Baseline("E32s", **{**given, "model": tiny(reg_tokens=2)})


def test_on_a_cpu_the_row_says_what_is_left_out() -> None:
    assert Baseline("E32f+graph", **start(torch.float32)).notes == ("no CUDA graph on a CPU", "no TF32 on a CPU")
    assert Baseline("E32s", **start(torch.float32)).notes == ()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_leaves_nothing_out_is_timms_own_forward(name: str) -> None:
    given = start()
    peer = Peer(name, given["model"], given["images"], given["targets"], kept=16, exact=True)
    leaf = given["images"].clone().requires_grad_(True)
    logits = given["model"](leaf)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, given["targets"]), leaf)
    assert (peer.gradient() - expected).abs().max() < 1e-12
    assert (peer.logits - logits).abs().max() < 1e-12


def test_tokens_merge_by_hand() -> None:
    x = torch.tensor([[[9.0], [1.0], [2.0], [4.0], [8.0]]])  # class, a1, b0 ... alternate
    metric = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
    # Of the tokens 2 and 4 the first is most like token 1 (0.96), the second most like token 3 (0.8).
    merged, size = merge(x, torch.tensor([[[1.0], [1.0], [3.0], [1.0], [1.0]]]), metric, 1)
    assert merged.flatten().tolist() == [9, 8, 1.75, 4]  # (1 * 1 + 3 * 2) / 4
    assert size.flatten().tolist() == [1, 1, 4, 1]


def test_merging_ends_with_so_many_tokens_that_stand_for_all_patches() -> None:
    model = tiny()
    merge_tokens(model, 8)
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    model(start(torch.float32)["images"])
    assert seen == [1 + 8]
    assert model.blocks[-1].sizes.value.sum(1).flatten().tolist() == [17] * B


def test_patch_dropout_feeds_so_many_patches_and_a_peer_descends() -> None:
    given = start(torch.float32)
    peer = Peer("PatchDropout", given["model"], given["images"], given["targets"], kept=5)
    touched = (peer.gradient().reshape(B, 3, 4, 4, 4, 4) != 0).any(dim=(1, 3, 5)).sum(dim=(1, 2))
    assert touched.tolist() == [5] * B
    merging = Peer("ToMe", given["model"], given["images"], given["targets"], kept=8)
    losses = []
    for _ in range(8):
        merging.step()
        losses.append(torch.nn.functional.cross_entropy(merging.logits, given["targets"]).item())
    assert losses[-1] < losses[0] / 2
