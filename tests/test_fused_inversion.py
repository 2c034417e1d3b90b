"""Whole inversions on the fused operations against the ordinary loop on timm's modules and autograd, in float64."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import BACKENDS, DEVICE
from rehearsal import Rehearsal
from small import PRUNED, SEMANTICS, UNPRUNED, randomise, tiny
from timm.models.eva import Eva
from torch import Tensor

import smi
from smi import Config, Inversion, SmiError, SparseModel
from smi_kernels import PixelDescent, SparseViT, native, use_backend
from smi_kernels.launch import record_launches

SHORT = {"iterations": 5, "prune_at": (2, 4), "prune_ratio": (0.3, 0.5)}  # interpreted kernels take their time


def fused(model: Any, backend: str, **options: Any) -> SparseModel:
    """The model on fused operations, be they kernels or their references."""
    sparse = SparseModel(model, backend="reference", merge_to=options.get("merge_to"))
    sparse.vit = SparseViT.from_timm(model, **options)
    sparse.backend = backend
    return sparse


def both(
    backend: str,
    config: Config,
    targets: Any = (0, 3, 1),
    objectives: Any = ((), ()),
    model: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    model = (tiny(**options) if model is None else model).double().to(DEVICE)
    made = []
    networks = fused(model, backend), SparseModel(model, backend="reference")
    for network, terms in zip(networks, objectives, strict=True):
        inversion = Inversion(network, targets, config, objectives=terms)
        assert inversion.fused is (not made)
        made.append(inversion.run())
    return made[0], made[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"semantics": "strict", "tv1": 1e-2, "tv2": 1e-2, "l2": 1e-3},
        {"semantics": "official", "tv1": 1e-2, "tv2": 1e-2, "l2": 1e-3},
        {"semantics": "strict", "jitter": "pixel", "augment_per": "batch"},
        {"strategy": "random", "result_mask": "reranked"},
        {"strategy": "dense", **UNPRUNED},
        {"best": True, "best_every": 2},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_iterations_are_those_of_the_ordinary_loop(backend: str, changes: dict[str, Any]) -> None:
    """At a learning rate and eps where rounding does not grow."""
    if DEVICE == "cpu" and backend == "triton" and "semantics" not in changes:
        pytest.skip("two ways through the interpreter are enough; on a GPU all are run")
    config = Config(**{**(SHORT if backend == "triton" else PRUNED), "learning_rate": 0.05, "eps": 1e-4, **changes})
    compare(*both(backend, config))


def turned() -> Any:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomise(Eva(**sizes, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2))


OTHERS: dict[str, Callable[[], Any]] = {
    "norms": lambda: tiny(pre_norm=True, global_pool="avg", class_token=False, fc_norm=False),
    "pooling": lambda: tiny(global_pool="map", class_token=False, reg_tokens=1, pre_norm=True),
    "texts": lambda: smi.with_text_head(tiny(pre_norm=True), torch.eye(5), logit_scale=4.0),
    "turned": turned,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton" or DEVICE != "cpu"])
def test_so_they_are_of_other_families(backend: str, kind: str) -> None:
    config = Config(**PRUNED, learning_rate=0.05, eps=1e-4, tv2=1e-2, best=True, best_every=3)
    compare(*both(backend, config, model=OTHERS[kind]()))


def compare(found: Any, expected: Any) -> None:
    assert torch.equal(found.keep, expected.keep) and torch.equal(found.dropped_at, expected.dropped_at)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    assert found.history.keys() == expected.history.keys()
    for name, curve in expected.history.items():
        torch.testing.assert_close(found.history[name], curve, rtol=1e-6, atol=1e-6)
    assert found.snapshot_at == expected.snapshot_at
    assert (found.snapshots.int() - expected.snapshots.int()).abs().max() <= 1
    assert [(p.start, p.stop, p.kept, p.flops) for p in found.phases] == [
        (p.start, p.stop, p.kept, p.flops) for p in expected.phases
    ]


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_soft_targets_and_distilled_like_prefixes(semantics: Any) -> None:
    config = Config(**SHORT, semantics=semantics, learning_rate=0.05, eps=1e-4)
    soft = torch.softmax(torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    found, expected = both("reference", config, soft, reg_tokens=2)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)


def test_stepping_is_running() -> None:
    model = tiny(seed=3).double().to(DEVICE)
    config = Config(**PRUNED, best=True, best_every=3)
    whole = Inversion(fused(model, "reference"), [0, 1], config).run()
    steps = Inversion(fused(model, "reference"), [0, 1], config)
    while not steps.done:
        steps.step()
        assert steps.latest()["total"] == pytest.approx(float(steps.result().history["total"][-1]))
    assert torch.equal(whole.images, steps.result().images)


def test_frozen_patches_keep_every_bit() -> None:
    model = tiny(depth=1).to(DEVICE)
    config = Config(**SHORT, tv2=1e-2)
    inversion = Inversion(fused(model, "triton"), [0, 1], config)
    before = None
    while not inversion.done:
        kept = inversion.keep.shape[1]
        inversion.step()
        dead = ~torch.zeros(2, 16, dtype=torch.bool, device=DEVICE).scatter(1, inversion.keep, True)
        patches = inversion.images.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if before is not None and inversion.keep.shape[1] == kept:
            assert torch.equal(patches[dead], before[dead])
            assert (patches[~dead] != before[~dead]).flatten(1).any(1).all()
        before = patches.clone()


# --- objectives of the user's ---


def entropy(context: smi.Context) -> Tensor:
    return -(context.logits.softmax(1) * context.logits.log_softmax(1)).sum(1)


def darkness(context: smi.Context) -> Tensor:
    return (context.images + 1).square().mean()


def annealed(context: smi.Context) -> Tensor:
    return context.logits.square().mean() / (1 + context.step)


class Seen:
    """Weighs what the network saw by place, and notes which iterations had no augmentation."""

    def __init__(self) -> None:
        self.still: list[int] = []

    def __call__(self, context: smi.Context) -> Tensor:
        if context.offsets is None and torch.is_grad_enabled():  # without: `best` is looked for
            self.still.append(context.step)
        ramp = torch.linspace(-1, 1, 16, dtype=context.images.dtype, device=context.images.device)
        return (context.augmented * ramp).square().flatten(1).mean(1)


def own() -> list[Any]:
    return [
        smi.Objective(entropy, weight=0.2),
        smi.Objective(darkness, weight=0.5, name="dark"),
        annealed,
        smi.Objective(Seen(), weight=2.0),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"semantics": "strict", "tv1": 1e-2},
        {"semantics": "official", "l2": 1e-3},
        {"strategy": "dense", **UNPRUNED, "best": True, "best_every": 2},
        {"tolerance": 0.9, "patience": 2},
        {"cross_entropy": 0.0, "tv2": 0.0},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_objectives_of_ones_own_are_those_of_the_ordinary_loop(backend: str, changes: dict[str, Any]) -> None:
    if DEVICE == "cpu" and backend == "triton" and "tv1" not in changes:
        pytest.skip("one way through the interpreter is enough; on a GPU all are run")
    config = Config(**{**(SHORT if backend == "triton" else PRUNED), "learning_rate": 0.05, "eps": 1e-4, **changes})
    terms = own(), own()
    found, expected = both(backend, config, objectives=terms, depth=1)
    compare(found, expected)
    assert {"entropy", "dark", "annealed", "Seen"} < found.history.keys()
    still, as_expected = (several[3].function.still for several in terms)
    assert still == as_expected and bool(still) == (config.strategy != "dense")


def test_features_are_of_the_models_own_modules() -> None:
    model = tiny(depth=1).double().to(DEVICE)

    def calm(context: smi.Context) -> Tensor:
        return context.features["blocks.0"].square().mean((1, 2))

    config, results = Config(**SHORT, learning_rate=0.05, eps=1e-4), []
    for network in (fused(model, "triton"), SparseModel(model, backend="reference")):
        inversion = Inversion(network, [0, 1], config, objectives=[smi.Objective(calm, features=("blocks.0",))])
        assert not inversion.fused
        results.append(inversion.run())
    torch.testing.assert_close(results[0].images, results[1].images, rtol=0, atol=1e-6)


def in_graphs(inversion: Inversion, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if it ran on a GPU: the descent of the inversion with stand-ins for graphs."""
    descent = inversion._descent
    assert descent is not None
    inside = [value for value in vars(descent).values() if isinstance(value, Tensor)]
    Rehearsal.tensors = staticmethod(lambda: [*inside, *inversion._history.values()])
    monkeypatch.setattr(Rehearsal, "made", [])
    monkeypatch.setattr("smi_kernels.descent.Graph", Rehearsal)
    monkeypatch.setattr("smi.objectives.capturing", lambda: Rehearsal.capturing)
    descent.in_graphs, descent._unroll = True, 2
    return descent


def test_the_step_is_right_because_it_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(depth=1).double().to(DEVICE)
    config = Config(**PRUNED, learning_rate=0.05, eps=1e-4)
    expected = Inversion(fused(model, "reference"), [0, 1], config, objectives=own()).run()
    inversion = Inversion(fused(model, "reference"), [0, 1], config, objectives=own())
    descent = in_graphs(inversion, monkeypatch)
    with pytest.warns(UserWarning, match=r"RuntimeError: the loss reads context\.step"):
        found = inversion.run()
    assert "context.step" in descent.around_loss and set(Rehearsal.made) == {"feed", "move"}
    assert torch.equal(found.images, expected.images)
    for name, curve in expected.history.items():
        assert torch.equal(found.history[name], curve)


@pytest.mark.parametrize("capturable", [True, False])
def test_objectives_are_captured_if_they_may_be(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(depth=1).double().to(DEVICE)
    config = Config(**PRUNED, learning_rate=0.05, eps=1e-4)
    terms = [smi.Objective(entropy, capturable=capturable), darkness]
    expected = Inversion(fused(model, "reference"), [0, 1], config, objectives=terms).run()
    inversion = Inversion(fused(model, "reference"), [0, 1], config, objectives=terms)
    descent = in_graphs(inversion, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = inversion.run()
    assert set(Rehearsal.made) == ({"_unrolled"} if capturable else {"feed", "move"})
    assert descent.around_loss == ("" if capturable else "objective 'entropy' is not capturable")
    assert torch.equal(found.images, expected.images)
    for name, curve in expected.history.items():
        assert torch.equal(found.history[name], curve) and curve.isfinite().all()


def test_a_state_is_loaded_where_graphs_will_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose addresses graphs know are written, not replaced."""
    model = tiny(depth=1).double().to(DEVICE)
    config = Config(**PRUNED, learning_rate=0.05, eps=1e-4)
    expected = Inversion(fused(model, "reference"), [0, 1], config, objectives=[darkness]).run()
    first, second = (Inversion(fused(model, "reference"), [0, 1], config, objectives=[darkness]) for _ in range(2))
    in_graphs(first, monkeypatch)
    while first.iteration < 7:
        first._advance(first._stride())
    state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in first.state_dict().items()}
    descent = in_graphs(second, monkeypatch)
    places = [getattr(descent, name) for name in ("images", "exp_avg", "exp_avg_sq", "_sums", "priors", "_step")]
    before = [place.data_ptr() for place in places]
    second.load_state_dict(state)
    found = second.run()
    assert Rehearsal.made and before == [place.data_ptr() for place in places]
    assert torch.equal(found.images, expected.images)
    for name, curve in expected.history.items():
        assert torch.equal(found.history[name], curve) and curve.isfinite().all()


def test_an_objective_that_fails_in_a_long_stride_can_be_run_again() -> None:
    model = tiny(depth=1).double().to(DEVICE)
    config = Config(**PRUNED, learning_rate=0.05, eps=1e-4)
    calls: list[int] = []

    def failing(context: smi.Context) -> Tensor:
        calls.append(context.step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return context.logits.mean()

    inversion = Inversion(fused(model, "reference"), [0, 1], config, objectives=[failing])
    with pytest.raises(KeyboardInterrupt):
        inversion.run()
    assert inversion.iteration == 5
    again = inversion.run()
    assert calls == [0, 1, 2, 3, 4, 5, *range(5, 14)]
    at_once = Inversion(fused(model, "reference"), [0, 1], config, objectives=[failing]).run()
    assert torch.equal(again.images, at_once.images)


def test_a_fused_inversion_with_objectives_is_freed_at_once() -> None:
    inversion = Inversion(fused(tiny(depth=1), "reference"), [0], Config(**SHORT), objectives=[entropy])
    inversion.step()
    gone = weakref.ref(inversion._descent)
    gc.disable()
    try:
        del inversion
        assert gone() is None
    finally:
        gc.enable()


def test_groups_are_batches_run_together() -> None:
    """Norms over groups of two: the same bits, whether three groups share a launch or each runs alone."""
    model = tiny(depth=1).to(DEVICE)
    vit = SparseViT.from_timm(model, batch_invariant=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 16, 16, generator=generator).to(DEVICE)
    targets = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)
    table = torch.randint(-2, 3, (4, 5, 3), generator=generator).to(DEVICE)
    table[..., 2] = table[..., 2] > 0
    keep = torch.arange(0, 16, 2, device=DEVICE).repeat(5, 1)
    bounds = {"low": torch.full((3,), -2.0, device=DEVICE), "high": torch.full((3,), 2.0, device=DEVICE)}
    options = {**bounds, "tv1": 0.1, "tv2": 0.1, "l2": 0.1, "frozen": False}

    def descend(rows: slice, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        descent = PixelDescent(vit, images[rows], targets[rows], table[:, rows], **{**options, **more})
        descent.advance(1)
        descent.prune(keep[rows])
        descent.advance(2)
        return descent.images, descent.priors

    with use_backend("triton" if DEVICE == "cpu" else "auto"):
        together, priors = descend(slice(0, 5), group=2)
        for number, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
            alone, values = descend(rows, group=min(2, rows.stop - rows.start))
            assert torch.equal(together[rows], alone)
            assert torch.equal(priors[:3, number], values[:3, 0])
        in_parts, _ = descend(slice(0, 5), group=2, micro_batch=2)
    assert torch.equal(together, in_parts)


def test_launches_of_an_iteration() -> None:
    """At most 130 for 12 blocks and 250 for 24: ten a block, two more for the last, eight for all else."""
    for depth, limit in ((12, 130), (24, 250)):
        vit = SparseViT.from_timm(tiny(depth=depth), device="meta")
        images, bound = torch.empty(2, 3, 16, 16, device="meta"), torch.empty(3, device="meta")
        targets, table = (torch.empty(s, dtype=torch.int64, device="meta") for s in ((2,), (9, 2, 3)))
        with record_launches() as launches:
            descent = PixelDescent(vit, images, targets, table, low=bound, high=bound, tv2=0.1)
            descent.prune(torch.empty(2, 5, dtype=torch.int64, device="meta"))
            started = len(launches)
            descent.advance(1)
        assert len(launches) - started == 10 * depth + 10 <= limit


def test_asking_for_what_is_not_there_gives_every_reason() -> None:
    with pytest.raises(SmiError, match=r"backend is 'tritn'; expected one of .* Did you mean 'triton'"):
        SparseModel(tiny(), backend="tritn")
    with pytest.raises(SmiError, match=r"cannot run VisionTransformer: .*for GPUs, not for cpu.*Use reference or auto"):
        SparseModel(tiny(), backend="cuda")
    if DEVICE == "cpu":  # interpreted
        with pytest.raises(SmiError, match=r"pools by 'max'.*rank this model by class_attention, not by received_a"):
            SparseModel(tiny(global_pool="max"), backend="triton", ranking="received_attention")
        assert SparseModel(tiny()).backend == ("reference" if native.reasons_against() else "cpu")
        assert SparseModel(tiny(), backend="triton").backend == "triton"


def test_more_iterations_than_the_table_has_are_refused() -> None:
    vit = SparseViT.from_timm(tiny())
    bounds = {"low": torch.zeros(3), "high": torch.ones(3)}
    table = torch.zeros(3, 1, 3, dtype=torch.int64)
    descent = PixelDescent(vit, torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), table, **bounds)
    with pytest.raises(ValueError, match="4 iterations were asked for; expected 0 to 3"):
        descent.advance(4)
    with pytest.raises(ValueError, match=r"images are torch.float64; expected torch.float32"):
        PixelDescent(vit, torch.zeros(2, 3, 16, 16).double(), torch.tensor([0, 1]), table, **bounds)
    with pytest.raises(ValueError, match="group is 3; expected 1 to 2"):
        PixelDescent(vit, torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), table, **bounds, group=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": torch.zeros(2, 3, 16, 12)}, r"images have shape \(2, 3, 16, 12\); expected \(B, 3, 16, 16\)"),
        ({"targets": torch.tensor([0, 5])}, "targets are 0 to 5; expected 0 to 4"),
        ({"targets": torch.tensor([-1, 0])}, "targets are -1 to 0; expected 0 to 4"),
        ({"targets": torch.tensor([0])}, r"targets have shape \(1,\) and dtype torch.int64; expected \(2,\) int64"),
        ({"targets": torch.tensor([0, 1]).int()}, r"shape \(2,\) and dtype torch.int32; expected \(2,\) int64 classes"),
        ({"targets": torch.zeros(2, 4)}, r"targets have shape \(2, 4\).* or \(2, 5\) probabilities"),
        ({"table": torch.zeros(3, 3, 3, dtype=torch.int64)}, r"table has shape \(3, 3, 3\).*expected \(T, 2, 3\) or"),
        ({"table": torch.zeros(3, 2, 3)}, "table has shape .* and dtype torch.float32; expected .* int64"),
        ({"low": torch.zeros(1)}, r"low has shape \(1,\); expected \(3,\)"),
        ({"high": torch.zeros(3, device="meta")}, "high is on meta, the images are on cpu; move it there"),
    ],
)
def test_what_a_descent_would_read_beyond_the_end_of_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"images": torch.zeros(2, 3, 16, 16), "targets": torch.tensor([0, 1]), "low": torch.zeros(3)}
    right |= {"high": torch.ones(3), "table": torch.zeros(3, 1, 3, dtype=torch.int64)}
    descent = PixelDescent(SparseViT.from_timm(tiny()), **right)
    for keep in (torch.tensor([[1, 2]]), torch.ones(2, 3), torch.zeros(2, 17, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"keep has shape .*; expected \(2, K\) int64 with K from 1 to 16"):
            descent.prune(keep)
    with pytest.raises(ValueError, match=message):
        PixelDescent(descent.vit, **{**right, **wrong})


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_patches_are_chosen_than_were_fed(backend: str) -> None:
    for model in (tiny(depth=1), tiny(depth=1, class_token=False, global_pool="avg")):
        images, table = torch.zeros(2, 3, 16, 16, device=DEVICE), torch.zeros(1, 1, 3, dtype=torch.int64, device=DEVICE)
        targets, low = torch.tensor([0, 1], device=DEVICE), torch.zeros(3, device=DEVICE)
        descent = PixelDescent(SparseViT.from_timm(model.to(DEVICE)), images, targets, table, low=low, high=low + 1)
        descent.prune(torch.arange(15, device=DEVICE).repeat(2, 1))
        with use_backend(backend):
            for count in (16, 0, -1):
                with pytest.raises(ValueError, match=f"count is {count}; expected 1 to 15, the number of patches"):
                    descent.rank(count)
            assert descent.rank(15)[0].tolist() == [list(range(15))] * 2


# --- precisions of the kernels alone ---


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_of_the_fused_kernels(precision: Any) -> None:
    model, config = tiny(depth=1).to(DEVICE), Config(**SHORT, precision=precision, learning_rate=0.01)
    inversion = Inversion(model, [0, 1], config, backend="triton")
    assert inversion.fused and inversion.model.vit is not None and inversion.model.vit.precision == precision
    assert 0 < inversion.model.difference < 0.02 or (precision == "tf32" and DEVICE == "cpu")
    inversion.step()
    full = Inversion(model, [0, 1], config.replace(precision="fp32"), backend="reference")
    full.step()
    assert inversion.images.dtype == torch.float32 and inversion.images.isfinite().all()
    assert inversion.latest()["total"] == pytest.approx(full.latest()["total"], rel=0.02)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_need_kernels_say_why_there_are_none(precision: Any) -> None:
    model = tiny(depth=1)
    with pytest.raises(SmiError, match=rf"'{precision}' runs on the fused kernels alone.*asked for\. Use fp32 or bf16"):
        SparseModel(model, precision=precision, backend="reference")
    with pytest.raises(SmiError, match=r"pools by 'max'.* Use fp32 or bf16"):
        smi.invert(tiny(global_pool="max").to(DEVICE), [0], Config(**SHORT, precision=precision))
    if DEVICE == "cpu" and not native.reasons_against():
        with pytest.raises(SmiError, match=rf"compute in float32 and float64, not in {precision}\. Use fp32"):
            smi.invert(model, [0], Config(**SHORT, precision=precision))
    term = smi.Objective(entropy, features=("blocks.0",))
    with pytest.raises(SmiError, match=rf"modules, which do not run in {precision}; use fp32 or bf16"):
        Inversion(model.to(DEVICE), [0], Config(**SHORT, precision=precision), objectives=[term], backend="triton")


def test_an_inversion_that_watched_the_model_changes_no_bit_of_a_later_one() -> None:
    model, config = SparseModel(tiny(embed_dim=48, depth=4)), Config(**PRUNED)
    before = smi.invert(model, [0, 1], config)
    smi.invert(model, [0, 1], config, objectives=[smi.losses.embedding(torch.ones(48))])
    after = smi.invert(model, [0, 1], config)
    assert torch.equal(before.images, after.images) and torch.equal(before.logits, after.logits)
