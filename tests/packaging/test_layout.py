"""The package's layout and its traps: links, bare names, the wheel, the order of the rooms."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "isoflop"
LINKED = ("methods", "kernels", "dashboards", "sweeps")


def tracked() -> list[Path]:
    """Files of the repository: tracked, or new and not ignored."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).exists()]


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with the current folder on its path, as ``python -m`` and notebooks have it."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_platform_is_no_package() -> None:
    """It would shadow the standard library's ``platform`` for everything that is started in the root."""
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKED)
def test_the_parts_are_relative_links(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    assert link.resolve() == ROOT / name
    assert (link / "__init__.py").is_file()


def test_nothing_else_is_a_link() -> None:
    assert {p.name for p in PACKAGE.rglob("*") if p.is_symlink()} == set(LINKED)


@pytest.mark.parametrize("name", ["methods", "dashboards", "sweeps"])
def test_a_part_cannot_be_loaded_a_second_time_under_its_bare_name(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: import isoflop.{name}, not {name}" in done.stderr


def test_the_bare_name_kernels_is_empty_and_does_not_break_transformers() -> None:
    """transformers asks for a package of this name; it must find nothing it could use, and go on."""
    code = "import kernels; print([n for n in dir(kernels) if not n.startswith('_')]); import transformers.models.llama.modeling_llama as m; print(m.LlamaModel.__name__)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "LlamaModel"]


def test_importing_isoflop_is_light() -> None:
    """``isoflop --help`` must not wait for torch."""
    done = python(
        "import sys, isoflop, isoflop.cli; print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_part_of_the_public_api_resolves() -> None:
    done = python(
        "import isoflop; print(all(getattr(isoflop, n) for n in isoflop.__all__), set(isoflop.__all__) <= set(dir(isoflop)))",
        Path("/"),
    )
    assert done.stdout.strip() == "True True", done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        target = folder / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if done.returncode:
        pytest.skip("no pip in this environment")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-w",
        str(folder / "out"),
        str(folder / "source"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if built.returncode and "setuptools" in built.stderr and "No module named" in built.stderr:
        pytest.skip("no setuptools in this environment")
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "out").glob("isoflop-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_everything_as_real_files(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for path in tracked():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in LINKED and path.suffix in (".py", ".yaml", ".json", ".csv", ".ipynb"):
            assert f"isoflop/{relative}" in names
        elif (
            relative.parts[:2] == ("platform", "isoflop") and path.suffix in (".py", ".typed") and not path.is_symlink()
        ):
            assert str(relative.relative_to("platform")) in names
    assert "isoflop/py.typed" in names
    assert "isoflop/sweeps/quickstart.yaml" in names
    assert "isoflop/sweeps/published/inference_optimal_vlms.csv" in names
    assert not any(stat_is_link(info) for info in wheel.infolist())
    assert not [n for n in names if n.startswith(("platform/", "tests/", "methods/"))]
    entry = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "isoflop = isoflop.cli:main" in entry
    assert any(n.endswith("LICENSE") for n in names)


def stat_is_link(info: zipfile.ZipInfo) -> bool:
    return (info.external_attr >> 16) & 0o170000 == 0o120000


def test_packaged_sweeps_are_found_as_resources() -> None:
    code = "from importlib.resources import files; p = files('isoflop.sweeps'); print((p / 'quickstart.yaml').is_file(), (p / 'published').is_dir())"
    assert python(code, Path("/")).stdout.strip() == "True True"


def test_no_file_names_this_machine() -> None:
    own = {str(ROOT), sys.prefix, str(Path.home())} - {"/", "/usr", "/usr/local", "/root"}
    pattern = re.compile("|".join([*map(re.escape, sorted(own)), r"/home/\w+/", r"/Users/\w+/", r"/root/\w"]))
    this = Path(__file__).resolve()
    found = []
    for path in tracked():
        if path.is_symlink() or path.resolve() == this or path.suffix in (".png", ".jpg"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, found


# the order of the rooms

RANKS = {
    "core": 0,
    "kernels": 1,
    "models": 2,
    "methods": 3, "tasks": 3, "fetch": 3,
    "laws": 4, "frontier": 4, "costs": 4,
    "jobs": 5, "stages": 5, "ledger": 5,
    "search": 6, "execute": 6, "track": 6,
    "sweep": 7,
    "cli": 8, "bench": 8, "dashboards": 8, "testing": 8, "sweeps": 8,
}  # fmt: skip
STRANGERS = {"search", "execute", "track"}  # each wraps one engine; they do not know each other
ENGINES = {"ray": "execute", "optuna": "search", "mlflow": "track"}
FREE = {"bench"}  # measures the engines against each other
PLOTTING = {"plotly", "matplotlib", "seaborn", "altair", "bokeh"}


def modules() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module of the package; modules at the top have the room ``""``."""
    for path in sorted(PACKAGE.glob("*.py")):
        yield "", path
    for room in sorted(p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"):
        for path in sorted(room.rglob("*.py")):
            yield room.name, path


def imports(path: Path, types: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, with lines; what stands under TYPE_CHECKING only where ``types`` asks for it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield node.module or "", node.lineno
            if node.module == "isoflop":
                for alias in node.names:
                    yield f"isoflop.{alias.name}", node.lineno


def test_every_room_has_its_place() -> None:
    assert {room for room, _ in modules()} - {""} <= set(RANKS)


def test_imports_between_rooms_run_downward_only() -> None:
    wrong = []
    for room, path in modules():
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] != "isoflop" or len(parts) < 2 or parts[1] not in RANKS or not room or parts[1] == room:
                continue
            strangers = room in STRANGERS and parts[1] in STRANGERS
            if RANKS[parts[1]] > RANKS[room] or strangers:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {name}")
    assert not wrong, wrong


def test_models_know_no_methods() -> None:
    """Nor tasks; not even as a type, or inside a function."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for room, path in modules()
        for name, line in imports(path, types=True)
        if room == "models" and name.startswith(("isoflop.methods", "isoflop.tasks"))
    ]
    assert not wrong, wrong


def test_no_circle_of_files_crosses_rooms() -> None:
    """Types and late imports included: files that need each other lie in one room."""
    files = {}
    for room, path in modules():
        parts = [*path.relative_to(PACKAGE).with_suffix("").parts]
        files[".".join(["isoflop", *(parts[:-1] if parts[-1] == "__init__" else parts)])] = room, path
    needs = {name: {n for n, _ in imports(path, types=True) if n in files} for name, (_, path) in files.items()}
    behind: dict[str, set[str]] = {}
    for name in files:
        seen, waiting = set(), [name]
        while waiting:
            for wanted in needs[waiting.pop()] - seen:
                seen.add(wanted)
                waiting.append(wanted)
        behind[name] = seen
    wrong = sorted(
        {tuple(sorted((a, b))) for a in files for b in behind[a] if a in behind[b] and files[a][0] != files[b][0]}
    )
    assert not wrong, wrong


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_is_known_in_one_room_only(engine: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for room, path in modules()
        for name, line in imports(path)
        if name.split(".")[0] == engine and room not in {ENGINES[engine], *FREE}
    ]
    assert not wrong, wrong


def test_only_what_people_touch_draws() -> None:
    """Laws, frontiers and sweeps give arrays and tables; not even a type or a late import names a plotting library."""
    wrong = []
    for room, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if room != "dashboards" and {name.split(".")[0] for name in names} & PLOTTING:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {', '.join(names)}")
    assert not wrong, wrong


def test_one_module_names_colours() -> None:
    """Figures, the report and the notebooks take theirs from dashboards/palette.py."""
    named = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b(?!\w)|\brgba?\(\s*\d")
    files = [path for _, path in modules()] + [
        *(PACKAGE / "dashboards").rglob("*.css"),
        *(PACKAGE / "dashboards").rglob("*.js"),
    ]
    files += (PACKAGE / "dashboards").rglob("*.ipynb")
    wrong = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()[:80]}"
        for path in files
        if path != PACKAGE / "dashboards" / "palette.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if named.search(line)
    ]
    assert not wrong, wrong


def test_laws_touch_no_files_and_no_engines() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for room, path in modules()
        if room in ("laws", "frontier", "costs")
        for name, line in imports(path)
        if name.split(".")[0] in ("os", "shutil", "tempfile", "fsspec", "ray", "mlflow", "optuna")
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("room", ["search", "sweep"])
def test_no_files_of_a_room_import_each_other_in_a_circle(room: str) -> None:
    """Not even inside functions: such a pair can only be read together."""
    files = {
        ".".join(("isoflop", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for owner, path in modules()
        if owner == room and path.name != "__init__.py"
    }
    needs = {name: {n for n, _ in imports(path) if n in files} for name, path in files.items()}
    while free := [name for name, wanted in needs.items() if not wanted]:
        for name in free:
            del needs[name]
        for wanted in needs.values():
            wanted -= set(free)
    assert not needs, sorted(needs)  # a circle, or what stands on one
