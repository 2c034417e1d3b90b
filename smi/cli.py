"""The command line: thin commands over the library, one line for every error a user can mend."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from smi._version import __version__
from smi.cli_compare import CompareOptions, compare
from smi.cli_losses import losses
from smi.cli_options import (
    EMBEDDED_TEACHER,
    InvertOptions,
    Judge,
    JudgeCheckpoint,
    ModelOptions,
    check_judge,
    command_options,
    load_judge,
)
from smi.cli_plan import PlanOptions, plan, show_plan
from smi.cli_pool import pool_app
from smi.cli_profile import ProfileOptions, profile
from smi.cli_progress import duration, emit, make_reporter, size
from smi.cli_quantize import EvaluateOptions, QuantizeOptions, evaluate, quantize
from smi.cli_schedule import schedule
from smi.cli_transfer import TransferOptions, transfer
from smi.cli_words import command_line, parse_duration, parse_shard
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.config import Config
    from smi.inversion import Inversion
    from smi.run import RunSummary
    from smi.state import ModelInfo, Result

# timm's modules whose models have the patch_drop slot on an embedding that can be taken apart.
_TIMM_MODULES = ("vision_transformer", "deit", "eva")
_MENDABLE = (errno.ENOSPC, errno.EROFS, errno.EACCES)


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP, all on the careful way out of Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.number = number


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_GO_ON = ("compare", "invert", "transfer")  # commands that keep what they have finished


class _Commands(TyperGroup):
    """Turns what a user can mend into one line on stderr and an exit code: 2 error, 128 + n for signal n."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _stoppable():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            again = "to go on" if ctx.invoked_subcommand in _GO_ON else "to begin again"
            said = "interrupted" if number == signal.SIGINT else "stopped"
            _fail(f"{said}; run the same command again {again}", 128 + number, "")
        except (SmiError, OSError, RuntimeError) as error:
            line = _one_line(error)
            if line is None or ctx.params.get("debug"):
                raise
            _fail(line, 2)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """The first signal is an exception, which leaves all in order; a second one, should that take long, kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: a shell's jobs in the background, and nohup.
    before = {n: old for n in _SIGNALS if (old := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def stop(number: int, _: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _fail(line: str, code: int, prefix: str = "error: ") -> NoReturn:
    print(f"{prefix}{line}", file=sys.stderr)
    raise typer.Exit(code)


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None for what is not the user's to mend."""
    if isinstance(error, SmiError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror}." if error.errno in _MENDABLE else None
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU has too little memory; use a smaller --batch-size, or --precision bf16."
    return None


app = typer.Typer(
    name="smi",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training-like images out of a frozen Vision Transformer, from fewer and fewer of its patches.",
    epilog="Start with [bold]smi invert[/bold]: it needs no data, no download and no GPU.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"smi {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SMI_DEBUG", help="Show the traceback of an error (or SMI_DEBUG=1).")
    ] = False,
) -> None:
    pass


def invert(options: InvertOptions) -> None:
    """Invert a model: make images of its classes, with the patches that matter, in a pool on disk.

    Stop at any time and run the same command again to go on: what is done of a batch is kept, too.

    [bold]Examples[/bold]

      smi invert

      smi invert deit_base_patch16_224.fb_in1k -n 64

      smi invert embedded:teacher --classes cat,dog --per-class 8

      smi invert vit_small_patch16_224 --preset fast --time-budget 30m

      smi invert deit_tiny_patch16_224 --prune-at 50,100 --prune-ratio .3,.3

      smi invert embedded:teacher --loss margin:weight=0.5 --loss low_pass:cutoff=0.3,weight=0.1
    """
    if options.dry_run:
        show_plan(options)
        return
    _invert(options)


def _invert(options: InvertOptions) -> None:
    config = options.make_config()
    model = options.load(config)
    config = options.fit_schedule(config, model)
    objectives = options.make_objectives(model)
    plan = options.make_plan(model.info, config)
    out = options.pool(config)

    from smi.run import run

    reporter = make_reporter(options.json, model, plan, config)

    def opened(missing: list[int]) -> None:
        reporter.open(missing)
        log.open(missing)
        if options.json:
            emit(
                "start",
                out=str(out),
                model=asdict(model.info),
                config=config.to_dict(),
                objectives=[term.identity for term in objectives],
                device=model.where,
                images=len(plan.targets),
                batches=plan.num_batches,
                missing=missing,
            )

    def iterated(batch: int, loop: Inversion) -> None:
        reporter.iteration(batch, loop)
        log.iteration(batch, loop)

    def written(batch: int, result: Result, seconds: float) -> None:
        reporter.batch(batch, result, seconds)
        log.batch(batch, result, seconds)

    with options.make_log(reporter.left) as log, reporter:
        done = run(
            model,
            plan,
            config,
            out,
            overwrite=options.overwrite,
            join=options.joins,
            shard=None if options.shard is None else parse_shard(options.shard),
            time_budget=None if options.time_budget is None else parse_duration(options.time_budget),
            objectives=objectives,
            time_left=reporter.left,
            on_open=opened,
            on_iteration=iterated,
            on_batch=written,
        )
    _conclude(options, done)


def _conclude(options: InvertOptions, done: RunSummary) -> None:
    from smi.report import summary

    facts = summary(done.path) if done.images_done or done.images_found else None
    if options.json:
        emit("done", run={**asdict(done), "path": str(done.path)}, pool=facts)
        return
    if done.batches_done:
        print(f"{done.images_done} images in {duration(done.seconds)}, pictures in {done.path / 'png'}")
    elif done.complete:
        print(f"nothing to do: the pool {done.path} is complete ({done.images_found} images)")
    else:
        print(f"no batch was finished in {duration(done.seconds)}")
    if facts is not None:
        _print_agreement(facts)
    if not done.complete:
        begun = f", {done.batches_begun} of them begun" if done.batches_begun else ""
        left = f"{done.images_left} images in {done.batches_left} batches are left{begun}"
        print(f"{left}; run the same command again to go on")
    if facts is not None:
        print(f"next: {command_line('smi', 'report', done.path)}")


def _print_agreement(facts: dict[str, Any]) -> None:
    print(f"teacher agrees on {facts['teacher_agreement']:.1%} of the images")
    judged = facts.get("judge_agreement")
    if judged:
        ways = ", ".join(f"{share:.1%} ({fill})" for fill, share in judged.items())
        print(f"an independent network agrees on {ways}")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(ModelOptions):
    """What `smi doctor` takes."""

    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False


def doctor(options: DoctorOptions) -> None:
    """Examine a model and this installation: can it be inverted, and with what?

    Exit code 1 if the model is not supported.

    [bold]Examples[/bold]

      smi doctor

      smi doctor resnet50 --no-pretrained
    """
    from smi.devices import resolve_device
    from smi.doctor import doctor as examine

    device = str(resolve_device(options.device))
    found = examine(options.build(seed=0), name=options.model, device=device, backend=options.backend)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        print(f"{found.name}: {'supported' if found.supported else 'not supported'}")
        if found.reason:
            print(f"  {found.reason}")
        for label, value in found.facts.items():
            print(f"  {label:<30}{_plain(label, value)}")
        print("backends")
        for backend in found.backends:
            print(f"  {backend.name:<10}{'live' if backend.live else 'not live':<10}{backend.reason}")
    if not found.supported:
        raise typer.Exit(1)


def _plain(label: str, value: Any) -> str:
    if "bytes" in label:
        return size(value)
    if isinstance(value, list):
        return (" x " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value)) or "nothing"
    if isinstance(value, float):
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


_WITH_OPTIONS = (
    (invert, InvertOptions),
    (plan, PlanOptions),
    (schedule, InvertOptions),
    (doctor, DoctorOptions),
    (quantize, QuantizeOptions),
    (transfer, TransferOptions),
    (evaluate, EvaluateOptions),
    (profile, ProfileOptions),
    (compare, CompareOptions),
)
app.add_typer(pool_app, name="pool")
app.command()(losses)
for _command_function, _options_class in _WITH_OPTIONS:
    app.command()(command_options(_options_class)(_command_function))


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.", show_default=False)] = False,
) -> None:
    """List the models that can be inverted, with the tags of their published weights.

    [bold]Examples[/bold]

      smi models deit3

      smi models "*patch16_224*"
    """
    import timm

    pattern = pattern if "*" in pattern else f"*{pattern}*"
    every = {EMBEDDED_TEACHER: ["trained, inside the package"]}
    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            if _whole_patches(name):
                every[name] = []
    for tagged in timm.list_models(pretrained=True):
        name, _, tag = tagged.partition(".")
        if name in every:
            every[name].append(tag)

    from fnmatch import fnmatch

    found = {name: tags for name, tags in every.items() if fnmatch(name, pattern)}
    if as_json:
        print(json.dumps([{"name": name, "weights": tags} for name, tags in found.items()]))
        return
    if not found:
        raise SmiError(f"no supported model matches {pattern!r}; `smi models` lists all {len(every)}.")
    width = max(map(len, found)) + 2
    for name, tags in found.items():
        print(f"{name:<{width}}{', '.join(tags) or '-'}")


def _whole_patches(name: str) -> bool:
    """False for the few architectures whose default image is not a whole number of patches (384 pixels of 14)."""
    import re

    match = re.search(r"patch(\d+)_.*?(\d{3})$", name)
    return match is None or int(match[2]) % int(match[1]) == 0


_Pool = Annotated[
    Path, typer.Argument(metavar="POOL", help="Folder that smi invert or smi pool pack has filled.", show_default=False)
]


@app.command()
def report(
    pool: _Pool,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML file. Default: POOL/report/report.html.", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option("--images", help="How many images to show.")] = 16,
    judge: Judge = None,
    judge_checkpoint: JudgeCheckpoint = None,
) -> None:
    """Write one HTML page about a pool: images, masks, agreement, cost.

    [bold]Examples[/bold]

      smi report pools/embedded-teacher-sparse

      smi report pools/deit-b --judge resnet50
    """
    from smi.packed import open_pool
    from smi.report import write_report

    check_judge(judge, judge_checkpoint)
    network = None if judge is None else load_judge(judge, judge_checkpoint, open_pool(pool).info)
    print(write_report(pool, out, judge=network, max_images=images))


@app.command()
def export(
    pool: _Pool,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="imagefolder or npy.")] = "imagefolder",
    fill: Annotated[
        str, typer.Option("--fill", help="What dropped patches show: as-is, black, mean or noise.")
    ] = "as-is",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.", show_default=False)
    ] = False,
) -> None:
    """Export a pool for other programs: class folders of PNG files, or NumPy arrays.

    [bold]Example[/bold]

      smi export pools/embedded-teacher-sparse images --fill mean
    """
    from smi.export import export_pool

    print(export_pool(pool, out, format, fill=fill, overwrite=overwrite))  # type: ignore[arg-type]


@app.command()
def info(
    pool: _Pool,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False,
) -> None:
    """Show what a pool is, how much of it is done and how far the teacher agrees."""
    from smi.packed import open_pool
    from smi.report import summary

    opened = open_pool(pool)
    facts = summary(pool) if len(opened) else None
    begun = opened.begun
    if as_json:
        progress = {"batches_done": opened.batches, "batches_begun": begun}
        print(json.dumps({**opened.manifest, **progress, "summary": facts}))
        return
    manifest, config = opened.manifest, opened.config
    done, batches = len(opened.batches), opened.plan.num_batches
    half = f", {len(begun)} begun" if begun else ""
    print(f"{pool}: {len(opened)} of {len(opened.plan.targets)} images, {done} of {batches} batches{half}")
    rows = {
        "model": f"{opened.info.name} ({opened.info.weights_sha256[:12]})",
        "made": f"{manifest['created']} on {manifest['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "method": f"{config.strategy}, {config.semantics}, {config.iterations} iterations, seed {config.seed}",
        "losses": ", ".join(["those of the config", *opened.objectives]),
        "schedule": ", ".join(_stages(config, opened.info)),
        "classes": f"{len(set(opened.plan.targets))} of {opened.info.num_classes}",
    }
    for label, value in rows.items():
        print(f"  {label:<10}{value}")
    if facts:
        peak = facts["peak_memory_bytes"]
        print(f"  {'memory':<10}{'not measured' if peak is None else f'{size(peak)} at the peak'}")
        _print_agreement(facts)


def _stages(config: Config, info: ModelInfo) -> list[str]:
    """What is fed from which iteration on, and what becomes of the rest, in words."""
    stages = [f"all {info.num_patches} patches"]
    stages += [f"{kept} from {t}" for t, kept in config.schedule(info.num_patches).items()]
    if config.strategy == "fusion":
        stages.append(f"merged inside the network to {config.merge_to:g} of them")
    if config.strategy == "rebirth":
        stages.append(f"{config.division} images of each trajectory")
    if config.strategy in ("sparse", "rebirth"):
        stages.append(f"ranked by {info.ranking if config.ranking == 'auto' else config.ranking}")
    return stages


def main() -> None:
    """Entry point of the ``smi`` command."""
    app(prog_name="smi")


if __name__ == "__main__":
    main()
