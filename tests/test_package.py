"""The package as a whole: lean imports, the arrows between its parts, one version, documents that name what exists."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.core import TyperGroup
from typer.main import get_command

import smi_kernels
from smi._version import __version__
from smi.cli import app
from smi_kernels import backends, native, native_cuda

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = ("smi", "smi_kernels")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)


def fresh(code: str, **environment: str) -> str:
    """What `code` prints in a new interpreter at the root of the project, in which Triton cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['triton'] = None\n{code}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_documents_say_of_smi_is_there_after_importing_it() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", *PAGES))
    said = {tuple(words.split(".")) for words in re.findall(r"(?<![\w/.-])smi\.([A-Za-z_][\w.]*\w)", text)} - {("cli",)}
    assert ("export", "CalibrationReader") in said
    code = f"import functools, smi\nfor words in {sorted(said)}: functools.reduce(getattr, words, smi)"
    assert fresh(code) == ""


# --- lean imports ---


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_fast_and_leaves_torch_and_triton_alone(package: str) -> None:
    code = f"""
import json, time
began = time.perf_counter()
import {package}
seconds = time.perf_counter() - began
dir({package})
print(json.dumps([seconds, [name for name in ("torch", "timm", "numpy", "triton") if sys.modules.get(name)]]))
"""
    seconds, loaded = zip(*(json.loads(fresh(code)) for _ in range(3)), strict=True)
    assert min(seconds) < 1  # the best of three: a busy machine is not the package's fault
    assert loaded == ([], [], [])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves_without_triton_and_without_cuda(package: str) -> None:
    code = f"""
import {package}
for name in {package}.__all__:
    getattr({package}, name)
import torch
print(torch.cuda.is_initialized())
"""
    assert fresh(code) == "False\n"


def test_unknown_name_is_an_attribute_error() -> None:
    for package in PACKAGES:
        code = f"import {package}\ntry: {package}.no_such_name\nexcept AttributeError as error: print(error)"
        assert "no_such_name" in fresh(code)


# --- arrows ---


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names imported anywhere in `source`, the text of `module`; ``from a import b`` gives ``a.b``."""
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def forbidden(module: str, imported: str) -> bool:
    """Whether `module` must not import the dotted name `imported`."""
    origin, target = module.split("."), imported.split(".")
    if origin[0] == "smi_kernels":
        reference_to_kernels = origin[-1] == "reference" and (target[0] == "triton" or "kernels" in target)
        own = origin[1] if len(origin) > 2 else None
        another_ops = own is not None and len(target) > 2 and target[1] != own and target[2].endswith("kernels")
        return target[0] == "smi" or reference_to_kernels or (target[0] == "smi_kernels" and another_ops)
    if target[0] == "smi_kernels" and len(target) > 1:
        return len(target) > 2 or target[1] not in (*smi_kernels.__all__, "backends")
    return target[0] == "triton"


def module_name(path: Path) -> str:
    """Dotted name; a package's own file ends in ``__init__``, so that relative imports resolve alike for both."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_forbidden_import(path: Path) -> None:
    module = module_name(path)
    assert [name for name in imports(path.read_text(), module) if forbidden(module, name)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("smi.a", "import triton"),
        ("smi.a", "def f():\n    from triton import language"),
        ("smi.a", "import importlib\nimportlib.import_module('triton.language')"),
        ("smi.a", "import smi_kernels.token_select.reference"),
        ("smi.a", "from smi_kernels.token_select import reference"),
        ("smi.a", "from smi_kernels.token_select.reference import select_tokens"),
        ("smi.a", "from smi_kernels import token_select"),
        ("smi_kernels.a.b", "from smi.errors import SmiError"),
        ("smi_kernels.a.b", "import smi"),
        ("smi_kernels.a.reference", "import triton.language as tl"),
        ("smi_kernels.a.reference", "from .kernels import launch"),
        ("smi_kernels.a.reference", "from . import kernels"),
        ("smi_kernels.a.kernels", "from smi_kernels.b.kernels import helper"),
        ("smi_kernels.a.cpu", "from ..b import class_kernels"),
    ],
)
def test_forbidden_imports_are_found(module: str, line: str) -> None:
    assert any(forbidden(module, name) for name in imports(line, module))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("smi.a", "import smi_kernels"),
        ("smi.a", "from smi_kernels import select_tokens, augment"),
        ("smi.a", "from smi_kernels import backends"),
        ("smi.a", "from . import errors"),
        ("smi_kernels.a.kernels", "import triton"),
        ("smi_kernels.a.kernels", "from .reference import select_tokens"),
        ("smi_kernels.a.kernels", "from smi_kernels.a.class_kernels import class_attention"),
        ("smi_kernels.a.kernels", "from smi_kernels.b.addressing import wrap"),
        ("smi_kernels.ops", "from smi_kernels.a.kernels import select_tokens"),
    ],
)
def test_allowed_imports_pass(module: str, line: str) -> None:
    assert not any(forbidden(module, name) for name in imports(line, module))


# --- packaging ---


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "smi._version.__version__"}
    assert fresh("import smi; print(smi.__version__)").strip() == __version__
    elsewhere = [p for p in SOURCES if p.name != "_version.py" and f'"{__version__}"' in p.read_text()]
    assert elsewhere == []
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_version_is_this_one() -> None:
    try:
        installed = importlib.metadata.version("sparse-model-inversion")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed here; `make test` installs it")
    assert installed == __version__, "installed before the version changed; touch pyproject.toml and run make"


def test_every_folder_with_code_is_a_package_and_typed() -> None:
    assert {p.parent for p in SOURCES if not (p.parent / "__init__.py").exists()} == set()
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


# --- backends ---


def test_backends_say_what_is_live_and_why_not() -> None:
    reference, triton, cpu, cuda = backends.status()
    assert (reference.name, reference.live) == ("reference", True)
    assert (triton.name, triton.live) == ("triton", True)  # on a GPU, or interpreted
    assert triton.reason.startswith("triton ") and ("interpreted" in triton.reason) is backends.interpreted()
    assert (cpu.name, cpu.live) == ("cpu", not native.reasons_against())
    assert not cpu.live or re.match(r"(default|avx2|avx512), compiled by \S", cpu.reason)
    assert (cuda.name, cuda.live) == ("cuda", not native_cuda.reasons_against() and torch.cuda.is_available())
    assert not cuda.live or re.match(r"compiled by nvcc_\S+; all else triton ", cuda.reason)


def test_backend_is_chosen_openly() -> None:
    cpu = torch.device("cpu")
    auto = "reference" if native.reasons_against() else "cpu"
    assert backends.choose(cpu) == auto
    with backends.use_backend("reference"):
        assert backends.choose(torch.device("cuda", 0)) == "reference"
    if backends.interpreted():
        with backends.use_backend("triton"):
            assert backends.choose(cpu) == "triton"
            with backends.use_backend("auto"):
                assert backends.choose(cpu) == auto
            assert backends.choose(cpu) == "triton"
    if reasons := backends.reasons_against("cuda"):
        with pytest.raises(ValueError, match=f"'cuda' cannot run here: {re.escape('; '.join(reasons))}"):
            backends.use_backend("cuda").__enter__()
    assert "its operators are for GPUs, not for cpu" in backends.reasons_against("cuda", cpu)
    with pytest.raises(ValueError, match="'tritn'; expected 'auto' or one of"):
        backends.use_backend("tritn").__enter__()


def test_nothing_falls_back_unasked() -> None:
    code = """
import torch, smi_kernels
try:
    smi_kernels.use_backend("triton").__enter__()
except ValueError as error:
    print(error)
scores, keep = torch.rand(1, 4), torch.arange(4)[None]
print(smi_kernels.select_tokens(scores, keep, 2).shape)
"""
    complaint, shape = fresh(code, CUDA_VISIBLE_DEVICES="").splitlines()
    assert "'triton' cannot run here: triton is not installed; " in complaint
    assert shape == "torch.Size([1, 2])"


def test_backends_give_all_reasons(tmp_path: Path) -> None:
    code = """
from smi_kernels import backends
assert "torch" not in sys.modules
for backend in backends.status(): print(backend.reason)
import torch
assert not torch.cuda.is_initialized()
"""
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CXX": "", "CUDA_VISIBLE_DEVICES": ""}
    _, triton, cpu, cuda = fresh(code, **nowhere, SMI_NATIVE_LIBRARIES=str(tmp_path)).splitlines()
    assert "triton is not installed" in triton
    assert re.match(r"cpu_\w+\.so was not built", cpu) and "no C++ compiler" in cpu
    assert cuda.startswith("cuda.so was not built") and f"no nvcc on PATH or in {tmp_path}" in cuda
    assert "triton is not installed" in cuda
    for reason in (triton, cuda):
        assert "no CUDA GPU is visible" in reason or "built without GPU support" in reason


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), "3.9.0", "has compute capability 7.5; the kernels need 8.0"),
        ((9, 0), "3.6.0", None),
        ((10, 0), "3.6.0", "has compute capability 10.0, for which Triton 3.6 fails"),
        ((10, 0), "3.7.0", None),
    ],
)
def test_kernels_say_which_gpus_they_are_not_for(
    capability: tuple[int, int], triton: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SMI_PDL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: triton)
    found = backends.reasons_against("triton", torch.device("cuda"))
    assert len(found) == (reason is not None) and (reason is None or reason in found[0])


@pytest.mark.parametrize("dependent", [False, True])
def test_on_amd_kernels_run_without_what_is_nvidias(dependent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from smi_kernels import launch, tuning

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SMI_PDL", str(int(dependent)))
    monkeypatch.setattr(torch.version, "hip", "7.2.0")
    found = backends.reasons_against("triton", torch.device("cuda"))
    assert len(found) == dependent and all("AMD" in reason for reason in found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))  # of an MI250
    assert tuning.capability(torch.device("cuda")) is None
    with launch.record_launches() as launches:
        launch.launch(None, (1,), {}, max_registers=128)
        monkeypatch.setattr(torch.version, "hip", None)
        launch.launch(None, (1,), {}, max_registers=128)
    assert ["maxnreg" in seen.options for seen in launches] == [False, True]


def test_backends_command_prints_a_row_each() -> None:
    command = [sys.executable, "-m", "smi_kernels.backends"]
    plain = {**os.environ, "TRITON_INTERPRET": "0"}
    cuda_live = torch.cuda.is_available() and not native_cuda.reasons_against()
    said = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout.splitlines()
    *rows, tiles, dependent = said
    assert dependent.startswith("dependent launch of Triton kernels: off")
    assert tiles.startswith("tiles of Triton's matrix kernels: ")
    assert [row.split()[0] for row in rows] == ["reference", "triton", "cpu", "cuda"]
    assert [" not live " in row for row in rows] == [False, True, bool(native.reasons_against()), not cuda_live]


# --- documents ---


def code_spans(text: str) -> str:
    """Fenced blocks and inline code of a Markdown text, one a line: where names are meant literally."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join(fenced + inline)


def links(text: str) -> list[str]:
    """Relative targets of Markdown links and images, without their #fragments."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.split("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_what_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    code = code_spans(text)
    paths = re.findall(r"(?<![\w./:-])[\w.*-]+(?:/[\w.*-]+)+\.(?:py|md|toml)\b", code)
    modules = re.findall(rf"python -m ((?:{'|'.join(PACKAGES)}|benchmarks)(?:\.\w+)*)\b", code)
    targets = re.findall(r"\bmake +([a-z][\w-]*)", code)
    rules = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets or document in PAGES, "the patterns above no longer fit the document"
    missing = [path for path in paths if not any(ROOT.glob(path))]
    missing += [link for link in links(text) if not (ROOT / document).parent.joinpath(link).exists()]
    for module in modules:
        place = ROOT.joinpath(*module.split("."))
        missing += [] if place.with_suffix(".py").exists() or (place / "__main__.py").exists() else [module]
    missing += [f"make {target}" for target in targets if target not in rules]
    assert missing == []


def test_document_checks_see_paths_modules_and_targets() -> None:
    text = "make up `a/b.py`\n```bash\nmake demo  # c/d.py\n```\n[x](e/f.md#g) [y](https://h/i.py) `make test`"
    assert code_spans(text).split("\n") == ["make demo  # c/d.py", "", "a/b.py", "make test"]
    assert links(text) == ["e/f.md"]


def test_every_page_is_found_from_the_readme() -> None:
    assert {link for link in links((ROOT / "README.md").read_text()) if link.startswith("docs/")} >= set(PAGES)


def test_documents_call_smi_with_options_that_it_has() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    fenced = "".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    called = set()
    for line in fenced.replace("\\\n", " ").splitlines():
        if not (found := re.search(r"(?:^|-m )smi ([a-z].*)", line.split(" #")[0])):
            continue
        words = found[1].split()
        command = commands[words[0]]
        if isinstance(command, TyperGroup):
            command = command.commands[words[1]]
        called.add(command.name)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line
    assert called >= {"invert", "quantize", "transfer", "compare", "verify"}, "the pattern no longer fits"


def test_continuous_integration_can_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
