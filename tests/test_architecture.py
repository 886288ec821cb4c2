"""The rules of the code, read from the source: imports point down, nothing happens at import, functions stay short."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from launching import TIMEOUT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinyllama_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

# The layers of the package, from the bottom: a module imports packages of lower layers and its own, never upwards.
LAYERS = [
    {"errors", "numbers", "text_table"},
    {"bars", "files", "inputs", "page", "hardware", "shipped"},
    {"outputs", "layout", "model"},
    {"config", "distributed", "fault_injection"},
    {"data"},
    {"evaluation", "hf"},
    {"checkpoint", "launch", "report"},
    {"run"},
    {"health"},
    {"train"},
    {"benchmark", "ladder", "planning", "preference", "speculative"},
    {"commands"},
    {"cli", "rank"},
]
MAY_IMPORT_DEEPSPEED = {"train", "checkpoint", "health", "benchmark", "run"}
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
HEAVY = {"torch", "deepspeed", "transformers", "tokenizers", "matplotlib", "tensorboard", "pyarrow", "sentencepiece"}
MAX_LINES, MAX_PARAMETERS, MAX_FILES = 50, 6, 15
# Private attributes of libraries that the package uses, each with its reason and its place upstream; at most five.
PRIVATE_API = {
    "deepspeed.ops.__compatible_ops__": (
        "on CPUs DeepSpeed compiles a shared-memory all-reduce that only inference uses, and no option turns it off;"
        " deepspeed/comm/torch.py: build_shm_op"
    ),
}
OF_PYTHON = {"_exit", "_actions", "_replace"}  # os, argparse, namedtuple
DUNDERS = {
    "__annotations__", "__cause__", "__context__", "__doc__", "__file__", "__getitem__", "__module__", "__name__",
    "__setattr__", "__version__",
}  # fmt: skip


def package_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def top_level_imports(path: Path) -> set[str]:
    statements = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for statement in statements for name in imported_modules(statement)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return
    for module in imported_modules(ast.parse(path.read_text())):
        if module == "deepspeed" or module.startswith("deepspeed."):
            assert package in MAY_IMPORT_DEEPSPEED, f"{path} imports deepspeed"
        if module.startswith("tinyllama_ds."):
            other = module.split(".")[1]
            assert other == package or LAYER_OF[other] < LAYER_OF[package], f"{path} imports {module}"


def test_preparing_data_needs_no_torch() -> None:
    """A machine that only prepares data has no torch: importing and parsing the command line must not ask for it."""
    for path in (PACKAGE / "data").rglob("*.py"):
        assert "torch" not in imported_modules(ast.parse(path.read_text())), path


def test_command_line_parses_without_heavy_imports() -> None:
    for path in (PACKAGE / "cli.py", *(PACKAGE / "commands").glob("*.py")):
        assert not top_level_imports(path) & HEAVY, path


def test_every_module_imports_without_side_effects(tmp_path: Path) -> None:
    """All modules import in a fresh process without a word, a file, a logger or a process group."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.name != "__main__.py"
    ]
    program = f"""
import importlib, logging, sys
for name in {modules!r}:
    importlib.import_module(name)
import torch
assert "deepspeed" not in sys.modules
assert "torch._dynamo" not in sys.modules  # a second of every command; only compilation needs it
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert not logging.getLogger().handlers
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr
    assert not list(tmp_path.iterdir())


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{path.relative_to(PACKAGE)}:{node.name}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_functions_are_short_and_take_few_parameters() -> None:
    for name, node in functions():
        lines = node.end_lineno - node.lineno + 1 if node.end_lineno else 0
        assert lines <= MAX_LINES, f"{name} has {lines} lines"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(parameters) <= MAX_PARAMETERS, f"{name} has {len(parameters)} parameters"


def test_directories_have_few_files() -> None:
    for folder in {path.parent for path in FILES}:
        assert len([path for path in folder.iterdir() if path.is_file()]) <= MAX_FILES, folder


def test_no_modules_import_each_other() -> None:
    """Neither at the top, nor within functions or for types alone."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    sorter: TopologicalSorter = TopologicalSorter()
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                found |= submodules or {node.module} & names.keys()
        sorter.add(name, *(found - {name}))
    sorter.prepare()  # raises CycleError with the modules of a cycle


def test_private_attributes_of_libraries_are_few_and_explained() -> None:
    trees = [ast.parse(path.read_text()) for path in FILES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_self(node.value)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not is_self(node.value):
            if node.attr not in ours | OF_PYTHON | DUNDERS:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_") and name.value not in DUNDERS:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("tinyllama_ds"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(part.startswith("_") for part in parts if node.module != "__future__"):
                found.add(ast.unparse(node))
    assert found == PRIVATE_API.keys()
    assert len(PRIVATE_API) <= 5


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_public_functions_say_what_they_do() -> None:
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                trivial = isinstance(node, ast.ClassDef) and "NamedTuple" in ast.dump(node)
                documented = ast.get_docstring(node) or (isinstance(node, ast.ClassDef) and is_plain_dataclass(node))
                assert documented or trivial, f"{path}: {node.name} has no docstring"


def is_plain_dataclass(node: ast.ClassDef) -> bool:
    return bool(node.decorator_list) and not any(isinstance(child, ast.FunctionDef) for child in node.body)


def test_nothing_depends_on_the_clock_on_the_wall() -> None:
    """It jumps, and differs between hosts; run.json's history has a date, and doctor compares clocks."""
    wall_clocks = ("time.time()", "datetime.now", "datetime.utcnow", "create_time", "localtime", "strftime", "getmtime")
    found = [f"{path.name}: {clock}" for path in FILES for clock in wall_clocks if clock in path.read_text()]
    assert sorted(found) == ["doctor.py: time.time()", "probe.py: time.time()", "run_file.py: datetime.now"]
