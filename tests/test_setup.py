"""The set-up: one truth in three files, and a Makefile that explains itself."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minidsv3.gpu.compile import BUILT_FOR

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = (("linux", "posix"), ("darwin", "posix"), ("win32", "nt"))
NAMED = {"numpy", "torch", "numba", "jupyter-book", "matplotlib", "pytest"}

PINS: dict[str, list[Requirement]] = {}
for _line in CONSTRAINTS.splitlines():
    if _line and not _line.startswith("#"):
        _pin = Requirement(_line)
        PINS.setdefault(canonicalize_name(_pin.name), []).append(_pin)


def version_of(pin: Requirement) -> str:
    """The version in `name==version`."""
    (only,) = pin.specifier
    assert only.operator == "==", f"{pin} is not one version"
    return only.version


def named(requirements: list[str]) -> list[Requirement]:
    """What a list of requirements names, without minidsv3 itself and its options."""
    parsed = [Requirement(line) for line in requirements if line[0] not in "-."]
    return [item for item in parsed if item.name != "minidsv3"]


DIRECT = named([*PROJECT["dependencies"], *sum(EXTRAS.values(), [])])
LEFT_TO_TORCH = re.compile("nvidia-|cuda-|triton")


# --- one truth in three files ----------------------------------------------------


@pytest.mark.parametrize("wanted", DIRECT, ids=lambda wanted: wanted.name)
def test_every_requirement_is_pinned_once(wanted):
    """In constraints.txt, and for NVIDIA's tools, which follow torch, in pyproject."""
    pins = PINS.get(canonicalize_name(wanted.name), [])
    if LEFT_TO_TORCH.match(wanted.name):
        assert wanted.specifier
        assert not pins
    else:
        assert pins, f"run `make lock`: constraints.txt does not know {wanted.name}"
        for pin in pins:
            assert wanted.specifier.contains(version_of(pin))


def test_constraints_give_each_package_one_version_everywhere():
    for python in PYTHONS:
        for system, name in PLATFORMS:
            where = {
                "python_version": python,
                "python_full_version": f"{python}.9",
                "sys_platform": system,
                "os_name": name,
            }
            for pins in PINS.values():
                markers = [pin.marker or Marker("os_name != ''") for pin in pins]
                assert sum(marker.evaluate(where) for marker in markers) <= 1, pins


def test_constraints_hold_no_address_and_nothing_of_nvidia():
    assert "://" not in CONSTRAINTS
    assert "@" not in CONSTRAINTS
    assert not [name for name in PINS if LEFT_TO_TORCH.match(name)]


def test_environment_names_the_same_versions():
    *conda, pip = CONDA["dependencies"]
    pinned = named(pip["pip"])
    assert {item.name for item in pinned} >= NAMED
    for item in pinned:
        here = [version_of(pin) for pin in PINS[canonicalize_name(item.name)]]
        assert [version_of(item)] == here
    (python,) = (line for line in conda if line.startswith("python="))
    assert python.removeprefix("python=") in PYTHONS


def test_environment_installs_the_project_with_known_extras():
    lines = CONDA["dependencies"][-1]["pip"]
    assert "--constraint constraints.txt" in lines
    (editable,) = (line for line in lines if line.startswith("--editable"))
    extras = re.fullmatch(r"--editable \.\[(.*)\]", editable)[1].split(",")
    assert {"book", "test", "lab"} == set(extras)
    assert set(extras) < set(EXTRAS)


@pytest.mark.network
def test_environment_can_be_installed(tmp_path):
    """pip takes the section as conda hands it over: a file beside environment.yml."""
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "minidsv3", tmp_path / "minidsv3")
    section = tmp_path / "condaenv.requirements.txt"
    section.write_text("\n".join(CONDA["dependencies"][-1]["pip"]))
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "-r", section.name],
        cwd=tmp_path,
        env=os.environ | {"PIP_RETRIES": "0", "PIP_TIMEOUT": "20"},
        capture_output=True,
        text=True,
    )
    if ran.returncode and "connection broken" in ran.stderr and "CI" not in os.environ:
        pytest.skip("the package index cannot be reached from here")
    assert ran.returncode == 0, ran.stderr


def test_what_is_installed_is_what_is_pinned():
    """Whatever of it is installed: each command installs only what it needs."""
    here = {d.name: d.version for d in importlib.metadata.distributions()}
    installed = {canonicalize_name(name): version for name, version in here.items()}
    wrong = [
        f"{name} {installed[name]} is not {pin}"
        for name in {canonicalize_name(item.name) for item in DIRECT} & installed.keys()
        for pin in PINS.get(name, [])
        if (pin.marker is None or pin.marker.evaluate())
        and not pin.specifier.contains(installed[name], prereleases=True)
    ]
    assert {"numpy", "pytest"} <= installed.keys()
    assert not wrong


def test_the_compiler_is_built_for_the_pinned_numba_cuda():
    assert [version_of(pin) for pin in PINS["numba-cuda"]] == [BUILT_FOR]


def test_version_and_licence_are_told_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert importlib.metadata.version("minidsv3") == PROJECT["version"]


# --- the Makefile ----------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
PHONY = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
TARGETS = set(PHONY[0].split())
CARD = set("book open test test-cuda grade lab bench clean help".split())
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


def make(folder: Path, *arguments: str, **environment: str):
    """`make` in a folder, untouched by a make that may be running these tests."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def clone(tmp_path):
    """A fresh clone, as far as the Makefile can see."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def ready(clone):
    """A clone whose set-up is complete."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamps = clone / ".venv" / ".stamps"
    stamps.mkdir()
    (stamps / "venv").write_text(str(clone))
    for number, name in enumerate(["venv", "torch", "book", "test", "lab", "cuda"]):
        (stamps / name).touch()
        later = (clone / "Makefile").stat().st_mtime + number + 1
        os.utime(stamps / name, (later, later))
    return clone


@needs_make
def test_help_is_the_default_and_lists_every_command(clone):
    said = make(clone).stdout
    assert said == make(clone, "help").stdout
    assert set(re.findall(r"^  make ([a-z-]+)  +\S", said, re.MULTILINE)) == TARGETS
    assert CARD <= TARGETS
    assert not (clone / ".venv").exists()


def test_readme_names_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    code = re.findall(r"(?s:```.*?```)|`[^`\n]+`|^ {4}.*", readme, re.MULTILINE)
    commands = {name for c in code for name in re.findall(r"\bmake ([a-z-]+)", c)}
    assert {"book", "test"} <= commands <= TARGETS


@needs_make
@pytest.mark.parametrize("target", ["book", "test", "lint", "setup", "check-book"])
def test_second_use_installs_nothing(ready, target):
    assert "pip" not in make(ready, "-n", target).stdout


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(ready, name):
    later = (ready / ".venv" / ".stamps" / "cuda").stat().st_mtime + 1
    os.utime(ready / name, (later, later))
    plan = make(ready, "-n", "setup").stdout
    assert '--editable ".[test]"' in plan
    assert "-m venv" not in plan


def cut_off_while_installing(venv: Path) -> None:
    log = "2026-11-23T10:00:00,123 Installing collected packages: six\n"
    (venv / ".pip.log").write_text(log)


DAMAGE = {
    "creation cut off": lambda venv: (venv / ".unfinished").touch(),
    "pip cut off": cut_off_while_installing,
    "moved": lambda venv: (venv / ".stamps" / "venv").write_text("/elsewhere"),
    "Python gone": lambda venv: (venv / "bin" / "python").unlink(),
}


@needs_make
@pytest.mark.parametrize("damage", DAMAGE)
def test_half_a_set_up_is_begun_anew(ready, damage):
    DAMAGE[damage](ready / ".venv")
    plan = make(ready, "-n", "setup").stdout
    assert "-m venv" in plan
    assert '--editable ".[test]"' in plan


@needs_make
def test_download_cut_off_goes_on(ready):
    """pip was stopped before it put a file in place: what is there is sound."""
    log = (
        "2026-11-23T10:00:00,123 Collecting six\n"
        "2026-11-23T10:00:01,456   Installing collected packages: hatchling\n"
    )
    (ready / ".venv" / ".pip.log").write_text(log)
    (ready / ".venv" / ".stamps" / "test").unlink()
    plan = make(ready, "-n", "setup").stdout
    assert "-m venv" not in plan
    assert '--editable ".[test]"' in plan


OLD = f"""#!/bin/sh
exec {sys.executable} -c 'import sys
sys.version, sys.version_info = "3.9.2 (old)", (3, 9, 2)
exec(sys.argv[2])' "$@"
"""


@needs_make
def test_missing_python_is_explained(clone):
    (clone / "old").write_text(OLD)
    (clone / "old").chmod(0o755)
    for python, found in {"/no/python": "missing", "./old": "3.9.2"}.items():
        ran = make(clone, "test", f"PYTHON={python}")
        assert ran.returncode
        for words in (f"{python} ({found}", "Needed: Python 3.11", "To do:"):
            assert words in ran.stderr
        assert not (clone / ".venv").exists()


@needs_make
def test_missing_network_is_explained(clone):
    """A port where nobody listens stands for the package index."""
    ran = make(
        clone,
        "test",
        f"PYTHON={sys.executable}",
        "TORCH=plain",
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
    )
    assert ran.returncode
    for words in ("no answer from the package index", "Needed: a network", "To do:"):
        assert words in ran.stderr
    stamps = {stamp.name for stamp in (clone / ".venv" / ".stamps").iterdir()}
    assert stamps == {"venv"}
    assert "-m venv" not in make(clone, "-n", "setup").stdout


@needs_make
@pytest.mark.parametrize("target", ["grade", "lab", "bench", "test-cuda"])
def test_what_is_not_there_yet_is_said(clone, target):
    ran = make(clone, target)
    assert ran.returncode == 0
    assert ran.stdout.startswith("There ")
    assert not (clone / ".venv").exists()


def test_cuda_tests_are_run_by_name_only(tmp_path):
    """Nobody without the cuda extra meets them, not even as skipped."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("test_a.py", "cuda/test_b.py", "benchmarks/test_c.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).write_text("def test_it(): pass\n")

    def collected(*arguments: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return set(re.findall(r"^tests/.*(?=::)", said.stdout, re.MULTILINE))

    assert collected() == {"tests/test_a.py"}
    assert collected("tests/cuda") == {"tests/cuda/test_b.py"}


@needs_make
def test_only_cuda_tests_install_the_cuda_extra(ready):
    (ready / "tests" / "cuda").mkdir(parents=True)
    (ready / "tests" / "cuda" / "test_a.py").touch()
    assert "pip" not in make(ready, "-n", "test-cuda").stdout
    (ready / ".venv" / ".stamps" / "cuda").unlink()
    plan = make(ready, "-n", "test-cuda").stdout
    assert '--editable ".[cuda]"' in plan
    assert "pytest tests/cuda -n logical" in plan.splitlines()[-1]
    for target in TARGETS - {"test-cuda", "bench-gpu", "help", "lock"}:
        assert "[cuda]" not in make(ready, "-n", target).stdout, target


def test_the_gate_runs_without_the_cuda_extra_first():
    gate = (ROOT / ".ci" / "run").read_text()
    stages = re.findall(r'^stage ".*" make (?:--\S+ )?(\S+)$', gate, re.MULTILINE)
    assert stages == ["setup", "test", "book", "check-book", "test-cuda"]


@needs_make
def test_clean_leaves_answers_and_runs(clone):
    kept = ["runs/a/model.safetensors", "exercises/a.ipynb", ".venv/__pycache__/a.pyc"]
    gone = ["book/_build/html/index.html", "minidsv3/__pycache__/a.pyc"]
    for name in kept + gone:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    assert make(clone, "clean").returncode == 0
    assert [name for name in kept + gone if (clone / name).exists()] == kept
