"""The shape of the repository: who imports whom, what importing costs, locks, versions, sizes."""

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rad_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rad_jax", "configs", "launch", "data", "evaluation")
TOP_LEVEL = {
    *PACKAGES,
    *(
        "tests",
        ".ci",
        ".gitignore",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-serve.txt",
    ),
    *("README.md", "LICENSE", "NOTICE", "CHANGELOG.md"),
}
FRAMEWORKS = {"torch", "torchvision", "tensorflow"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}
# What the PyTorch side may use of the library: pixels, prompts and the errors they raise.
SERVING_USES = {
    f"rad_jax.{name}" for name in ("serving", "images", "prompts", "errors", "__version__", "FORMAT_VERSION")
}
MEGABYTE = 1_000_000


class Import(NamedTuple):
    """One imported module; `eager` where importing the file imports it too."""

    module: str
    eager: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def tracked_files() -> list[Path]:
    """What git holds or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({Path(name) for name in listed if name and (ROOT / name).is_file()})


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports of a module in `package`; `from a import b` gives a.b, since b may be a module."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(name.name, eager, node.lineno) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (Import(f"{base}.{name.name}", eager, node.lineno) for name in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield Import(name, eager, node.lineno)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                eager = False
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                eager = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager)

    yield from visit(ast.parse(source), True)


def forbidden(path: str, found: Import) -> str | None:
    """Why the file at `path` (relative to the root) may not have this import, or None."""
    module, top, home = found.module, found.top, path.partition("/")[0]
    serving = path.startswith("rad_jax/serving/")
    if top == "tensorflow":
        return "nothing needs TensorFlow"
    if top in FRAMEWORKS and found.eager and not serving:
        return "torch is imported inside the functions that need it"
    if serving and top in JAX:
        return "the PyTorch side runs without jax"
    if (
        serving
        and module.startswith("rad_jax.")
        and not any(f"{module}.".startswith(f"{use}.") for use in SERVING_USES)
    ):
        return "jax code of the library"
    allowed = {
        "rad_jax": {"rad_jax"},
        "data": {"data", "rad_jax"},
        "evaluation": {"evaluation", "rad_jax"},
        "launch": set(PACKAGES),
        "configs": {"configs"},
    }[home]
    if top in {*PACKAGES, "tests"} and top not in allowed:
        return f"{home} may not use {top}"
    if home == "configs" and top not in {"configs", "ml_collections"} and top not in sys.stdlib_module_names:
        return "configs use ml_collections alone"
    return None


def run_python(code: str) -> str:
    """Runs `code` in a fresh interpreter in the root and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(modules: list[str], watched: set[str]) -> str:
    """Which of the `watched` packages a fresh interpreter has loaded after importing `modules`."""
    lines = [
        "import sys",
        *(f"import {module}" for module in modules),
        f"print(sorted({watched!r} & sys.modules.keys()))",
    ]
    return run_python("\n".join(lines))


def library_modules() -> list[str]:
    """Dotted names of rad_jax's modules, the PyTorch side left out."""
    paths = [p.relative_to(ROOT) for p in (ROOT / "rad_jax").rglob("*.py")]
    names = {".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths}
    return sorted(name for name in names if not name.startswith("rad_jax.serving"))


@pytest.mark.parametrize("package", PACKAGES)
def test_import_directions(package: str):
    broken = []
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        for found in imports(file.read_text(encoding="utf-8"), ".".join(Path(path).parent.parts)):
            if reason := forbidden(path, found):
                broken.append(f"{path}:{found.line} imports {found.module}: {reason}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("rad_jax/train.py", "from rad_jax import state", True),
        ("rad_jax/train.py", "from . import state", True),
        ("rad_jax/models/vit.py", "from ..launch import train", True),  # rad_jax.launch, were there one
        ("rad_jax/train.py", "def f():\n    from data.phantom import parser", False),
        ("rad_jax/train.py", "import evaluation.report", False),
        ("rad_jax/train.py", "import importlib\nimportlib.import_module('configs.phantom')", False),
        ("rad_jax/train.py", "def f():\n    import torch", True),
        ("rad_jax/train.py", "try:\n    import torch\nexcept ImportError:\n    torch = None", False),
        ("rad_jax/train.py", "if TYPE_CHECKING:\n    import torch", True),
        ("rad_jax/train.py", "def f():\n    import tensorflow as tf", False),
        ("rad_jax/train.py", "import tensorflow_datasets as tfds", True),
        ("rad_jax/serving/model.py", "import torch", True),
        ("rad_jax/serving/model.py", "from rad_jax import FORMAT_VERSION, images, prompts", True),
        ("rad_jax/serving/model.py", "from rad_jax import generate", False),
        ("rad_jax/serving/model.py", "from rad_jax.models.llama import Llama", False),
        ("rad_jax/serving/model.py", "def f():\n    import jax.numpy as jnp", False),
        ("configs/phantom.py", "from ml_collections import ConfigDict\nfrom configs import hardware", True),
        ("configs/phantom.py", "import numpy as np", False),
        ("configs/phantom.py", "from rad_jax.models import vit", False),
        ("data/records.py", "from rad_jax import images", True),
        ("data/records.py", "from evaluation import report", False),
        ("evaluation/report.py", "from data.phantom import parser", False),
        ("launch/evaluate.py", "from data.phantom import parser\nfrom evaluation import report", True),
    ],
)
def test_import_rules_see_what_they_should(path: str, source: str, allowed: bool):
    reasons = [forbidden(path, found) for found in imports(source, ".".join(Path(path).parent.parts))]
    assert any(reasons) != allowed


def test_importing_rad_jax_is_light():
    assert loaded_by(["rad_jax"], JAX | FRAMEWORKS | {"numpy", "PIL", "absl"}) == "[]"


def test_serving_finds_no_jax_in_what_it_shares():
    assert loaded_by(["rad_jax.images", "rad_jax.prompts", "rad_jax.errors"], JAX | FRAMEWORKS) == "[]"


def test_training_loads_neither_torch_nor_tensorflow():
    modules = library_modules()
    assert "rad_jax.models.llava" in modules
    assert loaded_by(modules, FRAMEWORKS) == "[]"


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "launch").glob("*.py") if p.stem != "__init__"))
def test_command_explains_itself(name: str):
    command = [sys.executable, "-m", f"launch.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"launch.{name}" in done.stdout


def test_top_level_names():
    assert {path.parts[0] for path in tracked_files()} == TOP_LEVEL


def test_no_large_file():
    assert [str(path) for path in tracked_files() if (ROOT / path).stat().st_size > MEGABYTE] == []


def test_no_package_shadows_ours():
    """tests/data as a package, or a package of that name in the environment, would hide data/."""
    assert [str(path) for path in tracked_files() if path.parts[0] == "tests" and path.name == "__init__.py"] == []
    for package in PACKAGES:
        found = run_python(f"import {package}; print(list({package}.__path__)[0])")
        assert Path(found).resolve() == ROOT / package


def test_ci_script_can_be_started():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    return given


def test_version(distribution: dict[str, Any]):
    assert distribution["version"] == rad_jax.__version__
    assert f"## {rad_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert isinstance(rad_jax.FORMAT_VERSION, int)


def test_wheel_holds_the_library_whole_and_alone(distribution: dict[str, Any]):
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "rad_jax").rglob("*.py")}
    assert set(distribution["packages"]) == folders
    extras = {"tpu", "cuda", "torch", "data", "pack", "beam", "eval", "serve", "dev"}
    assert distribution["extras_require"].keys() == extras


def lock(name: str) -> dict[str, str]:
    """Package to version of a lock file; every line must pin exactly one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!-]+)", line) for line in text.splitlines() if not line.startswith("#")]
    assert all(pins)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_locks_agree():
    """The tests judge the versions that users install; torch alone differs."""
    library, tests = lock("requirements.txt"), lock("requirements-dev.txt")
    assert {package for package in library if tests.get(package) != library[package]} == {"torch"}
    assert "torchvision" not in library
    assert "tensorflow" not in {*library, *tests}


def test_lock_of_the_server():
    """It holds the versions that the tests judge, what the server imports, and none of the packages that it does without."""
    server, library, tests = (lock(f"requirements{name}.txt") for name in ("-serve", "", "-dev"))
    assert {package for package in server if library.get(package, server[package]) != server[package]} == set()
    assert {package for package in server if tests.get(package, server[package]) != server[package]} == {"torch"}
    assert not {*JAX, "absl-py", "transformers", "tensorflow-datasets", "openai"} & server.keys()
    used = {"torch", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus-client", "pydicom", "numpy", "pillow"}
    assert used | {"python-multipart", "python-gdcm", "safetensors", "tokenizers", "tqdm"} <= server.keys()


def test_locks_meet_what_setup_asks_for(distribution: dict[str, Any]):
    pins = {**lock("requirements-dev.txt"), "torch": lock("requirements.txt")["torch"]}
    wanted = [
        *distribution["install_requires"],
        # Beam wants an older protobuf than TFDS's and an environment of its own, which has no lock.
        *(r for name, extra in distribution["extras_require"].items() if name != "beam" for r in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_libtpu_is_the_one_that_jax_asks_for():
    requirements = map(Requirement, metadata.requires("jax") or [])
    asked = [r for r in requirements if r.name == "libtpu" and r.marker and r.marker.evaluate({"extra": "tpu"})]
    assert metadata.version("jax") == lock("requirements.txt")["jax"]
    assert len(asked) == 1
    assert asked[0].specifier.contains(lock("requirements-dev.txt")["libtpu"])
