"""What the house allows, as functions of a root folder that return what is wrong.

Each check takes the root of a tree like this repository and returns one line a problem,
``file:line: what``, or nothing. `test_layout` runs them here and on small bad trees.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

PACKAGE = "minidsv3"
# A room imports itself and rooms on lower floors. Files beside the rooms are ground.
FLOORS = {
    "gpu": 1,
    "primitives": 2,
    **dict.fromkeys(("mtp", "moe", "mla"), 3),
    "model": 4,
    **dict.fromkeys(("training", "generation"), 5),
    "__main__": 6,
}
GROUND = 0
HEAVY = {
    "numpy_ref": {"torch", "numba"},
    "torch_port": {"numba"},
    "cuda_kernels": {"numba"},
}
# What the kernels stand on must load where there is no numba-cuda, but for one module,
# and only the compiler, when it is asked to, loads that.
GPU = f"{PACKAGE}/gpu/"
PTX, COMPILER, LAUNCHER = (f"{GPU}{name}.py" for name in ("ptx", "compile", "launch"))
CODE_LINES, FUNCTION_LINES, KERNEL_LINES, COLUMNS = 300, 60, 150, 88
Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- the files --------------------------------------------------------------------


def git(root: Path, *words: str) -> str:
    """What a git command prints; nothing where there is no repository."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "-c", "core.quotePath=false", "-C", str(root), *words]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout


def files(root: Path) -> list[str]:
    """Names of the tree's files: what git tracks or would, else all but hidden ones."""
    if listed := git(root, "ls-files", "-co", "--exclude-standard", "-z"):
        names = [name for name in listed.split("\0") if (root / name).is_file()]
    else:
        found = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
        names = [file.as_posix() for file in found if file.parts[0] not in (".venv",)]
    return sorted(set(names))


def sources(root: Path, folder: str = "") -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and tree of each Python file below `folder`."""
    for name in files(root):
        if name.endswith(".py") and name.startswith(folder):
            text = (root / name).read_text(encoding="utf-8")
            yield name, text, ast.parse(text)


def library(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """The Python files of the package."""
    return sources(root, f"{PACKAGE}/")


# --- imports ----------------------------------------------------------------------


def imports(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever it stands."""
    package = PurePosixPath(name).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*up, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def dotted(name: str) -> str:
    """The module that a file is."""
    return name.removesuffix(".py").replace("/", ".")


def room(module: str) -> str:
    """The room of a module of ours: ``minidsv3.model.numpy_ref`` is in ``model``."""
    return (module.split(".") + [""])[1]


def imports_upwards(root: Path) -> list[str]:
    """Imports that do not point one way: from a higher floor, or between siblings."""
    wrong = []
    for name, _, tree in library(root):
        here = room(dotted(name))
        for line, target in imports(tree, name):
            if target.split(".")[0] != PACKAGE or (there := room(target)) == here:
                continue
            below = FLOORS.get(there, GROUND) < FLOORS.get(here, GROUND)
            both_ground = here not in FLOORS and there not in FLOORS
            kernel_matter = there == "gpu" and "cuda_kernels" not in name
            if kernel_matter or not (below or both_ground):
                wrong.append(f"{name}:{line}: {here} must not import {target}")
    return wrong


def unknown_rooms(root: Path) -> list[str]:
    """Folders of the package that no floor is known of."""
    folders = {name.split("/")[1] for name, *_ in library(root) if name.count("/") > 1}
    return [f"{PACKAGE}/{name}: on no floor" for name in sorted(folders - set(FLOORS))]


def heavy_imports(root: Path) -> list[str]:
    """A numpy_ref that names torch or numba, a torch_port that names numba.

    And anything but the compiler that names the module which cannot do without it.
    """
    wrong = []
    for name, _, tree in library(root):
        for line, target in imports(tree, name):
            if f"{target}.".startswith(f"{dotted(PTX)}.") and name != COMPILER:
                wrong.append(f"{name}:{line}: must not import {target}")
        for kind, heavy in HEAVY.items():
            if not name.endswith(f"{kind}.py"):
                continue
            for line, target in imports(tree, name):
                parts = set(target.split("."))
                if parts & heavy or (kind == "numpy_ref" and "torch_port" in parts):
                    wrong.append(f"{name}:{line}: must not import {target}")
    return wrong


def loads(root: Path, *modules: str) -> set[str]:
    """Top-level names that a fresh Python has loaded after importing the modules."""
    program = (
        "import sys; before = set(sys.modules)\n"
        f"for name in {modules!r}: __import__(name)\n"
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


def heavy_loads(root: Path) -> list[str]:
    """What importing does load, by way of others too: see `heavy_imports`."""
    wrong = []
    if extra := loads(root, PACKAGE) - {PACKAGE}:
        wrong.append(f"{PACKAGE}/__init__.py: loads {', '.join(sorted(extra))}")
    every = [name for name, *_ in library(root)]
    kinds = {
        kind: ([n for n in every if n.endswith(f"{kind}.py")], heavy)
        for kind, heavy in HEAVY.items()
    }
    light = [n for n in every if n.startswith(GPU) and n not in (PTX, LAUNCHER)]
    kinds["gpu"] = (light, {"torch", "numba"})
    kinds["launch"] = ([n for n in every if n == LAUNCHER], {"numba"})
    for kind, (names, heavy) in kinds.items():
        modules = [dotted(name).removesuffix(".__init__") for name in names]
        if modules and (extra := loads(root, *modules) & heavy):
            wrong.append(f"{kind}: {', '.join(modules)} load {', '.join(extra)}")
    return wrong


def shadows(root: Path) -> list[str]:
    """Files and folders with the name of a package that we import or might."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"].get("optional-dependencies", {}).values()
    lines = [*project["project"].get("dependencies", []), *sum(extras, [])]
    wanted = {re.split(r"[^\w.-]", line)[0].lower() for line in lines} - {PACKAGE}
    taken = {name.replace("-", "_") for name in wanted} | sys.stdlib_module_names
    for package, homes in metadata.packages_distributions().items():
        if wanted & {home.lower() for home in homes}:
            taken.add(package)
    names = set(files(root))
    folders = {str(p) for name in names for p in PurePosixPath(name).parents}
    modules = {name.removesuffix(".py"): name for name in names if name.endswith(".py")}
    paths = modules | {folder: f"{folder}/" for folder in folders}
    wrong = [path for stem, path in paths.items() if PurePosixPath(stem).name in taken]
    return [f"{path}: hides the package of that name" for path in sorted(wrong)]


# --- size and form ----------------------------------------------------------------


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines with code: no blank ones, comments or docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    layout |= {tokenize.INDENT, tokenize.DEDENT}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if (said := docstring(node)) is not None:
            code -= set(range(said.lineno, said.end_lineno + 1))
    return code


def docstring(node: ast.AST) -> ast.Expr | None:
    """The statement that is a node's docstring."""
    has_body = isinstance(node, ast.Module | ast.ClassDef | Function)
    if has_body and node.body and isinstance(node.body[0], ast.Expr):
        value = node.body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return node.body[0]
    return None


def too_long(root: Path) -> list[str]:
    """Modules, functions and lines beyond the house's limits."""
    wrong = []
    for name, text, tree in sources(root):
        for number, line in enumerate(text.splitlines(), start=1):
            line = re.sub(r"\s+# noqa: \w+$", "", line)  # ruff does not count it either
            if len(line) > COLUMNS:
                wrong.append(f"{name}:{number}: {len(line)} columns, over {COLUMNS}")
        code = code_lines(text, tree)
        if len(code) > CODE_LINES and not name.startswith("tests/"):
            wrong.append(f"{name}: {len(code)} lines of code, over {CODE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, Function):
                kernel = node.name.startswith("_") and node.name.endswith("_body")
                most = KERNEL_LINES if kernel else FUNCTION_LINES
                own = code & set(range(node.lineno, node.end_lineno + 1))
                if len(own) > most:
                    what = f"{node.name} has {len(own)} lines, over {most}"
                    wrong.append(f"{name}:{node.lineno}: {what}")
    return wrong


def empty_modules(root: Path) -> list[str]:
    """Python files with nothing in them. The tests' package files may be empty."""
    return [
        f"{name}: empty"
        for name, _, tree in sources(root)
        if not tree.body and not re.fullmatch(r"tests/(.*/)?__init__\.py", name)
    ]


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """The classes and functions that a reader may use, methods with their class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and node.name[0] != "_":
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function):
                        yield f"{node.name}.{inner.name}", inner


def undocumented(root: Path) -> list[str]:
    """Modules, public classes and public functions without a docstring."""
    wrong = []
    for name, _, tree in library(root):
        if docstring(tree) is None:
            wrong.append(f"{name}:1: the module has no docstring")
        for known_as, node in public(tree):
            if not node.name.startswith("_") and docstring(node) is None:
                wrong.append(f"{name}:{node.lineno}: {known_as} has no docstring")
    return wrong


def unannotated(root: Path) -> list[str]:
    """Public functions with an argument or a result of unsaid type."""
    wrong = []
    for name, _, tree in library(root):
        for known_as, node in public(tree):
            if isinstance(node, ast.ClassDef):
                continue
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            method = "." in known_as and "staticmethod" not in ast.dump(node)
            bare = [x.arg for x in given[method:] if x and x.annotation is None]
            bare += ["the result"] if node.returns is None else []
            if bare:
                what = f"{known_as} does not say the type of {', '.join(bare)}"
                wrong.append(f"{name}:{node.lineno}: {what}")
    return wrong


class _Renamed(ast.NodeTransformer):
    """Arguments and local names become numbers, so that a renamed copy is a copy."""

    def __init__(self, function: Function) -> None:
        stored = [n for n in ast.walk(function) if isinstance(n, ast.Name | ast.arg)]
        own = [
            getattr(node, "id", getattr(node, "arg", ""))
            for node in stored
            if isinstance(node, ast.arg) or isinstance(node.ctx, ast.Store)
        ]
        self.numbers = {name: f"_{i}" for i, name in enumerate(dict.fromkeys(own))}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.numbers.get(node.id, node.id), ast.Load())

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self.numbers[node.arg])


def duplicates(root: Path) -> list[str]:
    """Functions of three statements or more with the same body, whatever the names."""
    homes: dict[str, list[str]] = {}
    for name, _, tree in library(root):
        for node in ast.walk(tree):
            if not isinstance(node, Function):
                continue
            body = node.body[docstring(node) is not None :]
            if sum(isinstance(n, ast.stmt) for s in body for n in ast.walk(s)) >= 3:
                place = f"{name}:{node.lineno}: {node.name}"
                homes.setdefault(_plain(node), []).append(place)
    pairs = [places for places in homes.values() if len(places) > 1]
    return [f"{places[1]} is a copy of {places[0]}" for places in pairs]


def _plain(function: Function) -> str:
    """A function's body without its names and its docstring."""
    copy = ast.parse(ast.unparse(function)).body[0]
    body = copy.body[docstring(copy) is not None :]
    renamed = _Renamed(copy)
    return "\n".join(ast.dump(renamed.visit(statement)) for statement in body)


# --- what is said and what is committed -------------------------------------------


def untrue_map(root: Path) -> list[str]:
    """Modules that the map in the package's docstring leaves out or invents."""
    home = f"{PACKAGE}/__init__.py"
    text = ast.get_docstring(ast.parse((root / home).read_text("utf-8")), clean=False)
    line = r"^ {4}(\w+)(.*(?:\n {5,}.*)*)$"  # deeper lines continue it
    block = re.findall(line, text or "", re.MULTILINE)
    names = [name.split("/")[1:] for name, *_ in library(root)]
    there = {parts[0].removesuffix(".py") for parts in names} - {"__init__"}
    said = [first for first, _ in block]
    wrong = [f"the map does not name {name}" for name in sorted(there - set(said))]
    wrong += [
        f"the map names {name} twice" for name in set(said) if said.count(name) > 1
    ]
    for first, rest in block:
        if first not in there:
            wrong.append(f"the map names {first}, which does not exist")
        inside = {p[1].removesuffix(".py") for p in names if p[0] == first}
        inside -= {"__init__"}
        words = set(re.findall(r"\w+", rest)) if inside else set()
        wrong += [f"the map does not name {first}/{n}" for n in sorted(inside - words)]
        wrong += [f"the map invents {first}/{n}" for n in sorted(words - inside)]
    return [f"{home}: {what}" for what in wrong]


def committed_outputs(root: Path) -> list[str]:
    """Notebooks that were committed with outputs, and built or cached folders.

    What counts is git's copy: a learner's own notebooks may be full of answers.
    """
    wrong = []
    for name in filter(None, git(root, "ls-files", "-z").split("\0")):
        if {"_build", ".jupyter_cache", "__pycache__"} & set(name.split("/")):
            wrong.append(f"{name}: made by a build, not to be committed")
        if not name.endswith(".ipynb"):
            continue
        for number, cell in enumerate(
            json.loads(git(root, "show", f":{name}"))["cells"]
        ):
            if cell.get("outputs") or cell.get("execution_count"):
                wrong.append(f"{name}: cell {number} has outputs")
    return wrong


MACHINE = re.compile(
    r"(?<![\w.}>/~-])/(?:home|Users|root|work|tmp|mnt|var/folders)/[\w.][\w./-]*"
    r"|\b[A-Z]:\\+Users\\+\w+"
)


def machine_paths(root: Path) -> list[str]:
    """Paths of somebody's machine in committed text."""
    wrong = []
    for name in filter(None, git(root, "ls-files", "-z").split("\0")):
        try:
            lines = (root / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        for number, line in enumerate(lines, start=1):
            wrong += [f"{name}:{number}: {m[0]}" for m in MACHINE.finditer(line)]
    return wrong


CHECKS = [
    imports_upwards,
    unknown_rooms,
    heavy_imports,
    heavy_loads,
    shadows,
    too_long,
    empty_modules,
    undocumented,
    unannotated,
    duplicates,
    untrue_map,
    committed_outputs,
    machine_paths,
]
