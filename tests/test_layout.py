"""What the layout promises: who imports whom, one door to each library, and names that resolve in this checkout."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import importlib
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli import STAGES

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "launcher", "trainer")
MAY_IMPORT = {"data": {"data"}, "trainer": {"trainer", "data"}, "launcher": {"launcher", "trainer", "data"}}
DOORS = {
    "deepspeed": {"trainer/engine.py"},
    "torch.distributed": {"trainer/distributed.py"},
    "webdataset": {"data/shards.py"},
    "wandb": {"trainer/monitor.py"},
    "wandb_workspaces": {"trainer/dashboard.py"},
    "tensorboard": {"trainer/events.py"},
    "torch.utils.tensorboard": {"trainer/events.py"},
    "omegaconf": {"launcher/config.py"},
    "faiss": {"trainer/approximate.py"},
    "starlette": {"trainer/searchpage.py"},
    "uvicorn": {"trainer/searchpage.py"},
    "plotly": {"trainer/reportpage.py"},
    "mteb": {"trainer/benchmark.py", "trainer/localtasks.py"},
    "sentence_transformers": {"trainer/evaluate.py", "trainer/export.py", "trainer/teacher.py"},
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
MODULES = sorted({stage.module for stage in STAGES.values()})
# import names that differ from the name of what is installed
DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "inf_cl": "inf-cl",
    "huggingface_hub": "huggingface-hub",
    "pytrec_eval": "pytrec-eval-terrier",
    "wandb_workspaces": "wandb-workspaces",
    "sentence_transformers": "sentence-transformers",
    "yaml": "pyyaml",
}


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports anywhere, function bodies included; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _attributes(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file uses: torch.distributed.barrier and all that stands before its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def _inside(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


def _module_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no function bodies, and not what only type checkers read."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    kept = [node for node in kept if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module(kept, [])


@pytest.mark.parametrize("file", TREES)
def test_imports_go_from_launcher_to_trainer_to_data(file: str) -> None:
    ours = {name.split(".")[0] for name in _imports(TREES[file])} & set(PACKAGES)
    assert ours <= MAY_IMPORT[file.split("/")[0]]


@pytest.mark.parametrize("library", DOORS)
def test_each_library_is_used_behind_one_door(library: str) -> None:
    users = {
        file
        for file, tree in TREES.items()
        if any(_inside(name, library) for name in [*_imports(tree), *_attributes(tree)])
    }
    assert users <= DOORS[library]


def test_launcher_imports_no_heavy_library_when_it_is_loaded() -> None:
    for file, tree in TREES.items():
        loaded = {name.split(".")[0] for name in _imports(_module_level(tree))}
        if file.startswith("launcher/"):
            assert not loaded & {"torch", "transformers", "deepspeed", "trainer", "numpy", "pyarrow"}, file


def test_the_three_names_resolve_in_this_checkout(tmp_path: Path) -> None:
    program = "import data, launcher, trainer; print(data.__file__, launcher.__file__, trainer.__file__, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == [str(ROOT / package / "__init__.py") for package in PACKAGES], result.stderr


def test_nothing_in_the_tests_shadows_the_packages() -> None:
    assert not [name for name in (*PACKAGES, "__init__.py") if (ROOT / "tests" / name).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_no_source() -> None:
    names = [f"{package}/new.py" for package in (*PACKAGES, "tests", "configs", "docs", "benchmarks", "slurm")]
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_module_exposes_its_config_and_run(name: str) -> None:
    module = importlib.import_module(name)
    assert dataclasses.is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    sections = {section.__name__ for section in _sections(module.Config) if section.__module__ == name}
    assert set(_public_names(TREES[f"{name.replace('.', '/')}.py"])) == {"Config", "run"} | sections


def _sections(config_class: type) -> Iterator[type]:
    """The dataclasses nested in a Config."""
    for wanted in typing.get_type_hints(config_class).values():
        if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
            yield wanted
            yield from _sections(wanted)


def _public_names(tree: ast.Module) -> Iterator[str]:
    """What a module defines without a leading underscore; imported names are not its own."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_needs_no_heavy_library(name: str) -> None:
    blocked = ["torch", "transformers", "deepspeed", "sentence_transformers", "pyarrow", "webdataset", "wandb"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        f"from launcher.cli import main; sys.exit(main([{name!r}, '--help']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Example: " in result.stdout


@pytest.mark.parametrize("file", TREES)
def test_no_code_out_of_files_and_no_shell(file: str) -> None:
    tree = TREES[file]
    assert not {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"} & set(_imports(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{file}:{node.lineno}: {called}"
        assert called not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), where
        assert words.get("shell", "False") == "False", where
        assert words.get("trust_remote_code", "False") == "False", where
        assert words.get("allow_pickle", "False") == "False", where
        assert called != "torch.load" or words.get("weights_only") == "True", where


@pytest.mark.parametrize("file", TREES)
def test_no_function_is_longer_than_sixty_lines(file: str) -> None:
    functions = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef)]
    long = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_every_library_that_is_imported_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {name: _declared(libraries) for name, libraries in setup["options.extras_require"].items()}
    development = extras.pop("dev")
    needed = _declared(setup["options"]["install_requires"]).union(*extras.values())
    development |= needed
    for path in [*SOURCES, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]:
        libraries = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
        libraries -= {
            *sys.stdlib_module_names,
            *PACKAGES,
            "benchmarks",
            *(file.stem for file in ROOT.glob("tests/*.py")),
        }
        declared = needed if path in SOURCES else development
        assert {DISTRIBUTIONS.get(library, library) for library in libraries} <= declared, path


def test_every_library_that_is_declared_is_pinned_to_a_version_within_its_bound() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    bounds = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)$", bounds, re.MULTILINE):
        assert _version(tested[name]) >= _version(bound), name


def _declared(text: str) -> set[str]:
    return set(re.findall(r"^([\w-]+)>=", text, re.MULTILINE))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
