"""Every source file says what it is, says it briefly, keeps to its layer's libraries and leaves nothing for later."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lorica"
FILES = sorted(PACKAGE.rglob("*.py"))
LATER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """Top-level names of everything imported anywhere in a module, also by `importlib.import_module("x")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(arg.value).partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant))


def test_every_module_begins_with_a_docstring_of_at_most_ten_lines():
    silent, long = [], []
    for path in FILES:
        lines = (ast.get_docstring(parsed(path), clean=False) or "").strip().splitlines()
        silent += [] if lines else [path]
        long += [path] if len(lines) > 10 and path.name != "errors.py" else []  # whose header is the tree of classes
    assert silent == [], "say in a docstring what goes in, what comes out, and what the module refuses to know"
    assert long == []


def test_only_models_and_data_import_transformers():
    wrong = [
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] not in ("models", "data") and "transformers" in imported(parsed(path))
    ]
    assert wrong == []


def test_torch_is_the_only_heavy_library_that_is_needed():
    declared = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "yaml", "click", "rich"}
    declared |= {"matplotlib", "jinja2", "huggingface_hub", "pydantic_core", "lorica", "__future__"}
    optional = {"bitsandbytes", "nevergrad", "peft", "pyarrow", "sklearn", "wandb", "trackio", "tensorboard"}
    serve = {"alembic", "fastapi", "fsspec", "google", "httpx", "msgspec", "prometheus_client", "psycopg"}
    optional |= serve | {"sqlalchemy", "zstandard", "sse_starlette", "starlette", "tinker", "uvicorn"}
    import sys

    strange = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in FILES
        for name in imported(parsed(path))
        if name not in declared | optional and name not in sys.stdlib_module_names
    }
    assert strange == set()


def test_nothing_is_left_for_later():
    found = []
    for path in [*FILES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        found += [f"{path}: {match}" for match in LATER.findall(text)]
        found += [
            f"{path}:{node.lineno}: raises NotImplementedError"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
        ]
    assert found == []


def test_no_source_is_monkeypatching_or_running_code_from_strings():
    calls = {"exec", "eval"}
    found = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls
    ]
    assert found == []
