"""The one file reads like a book: its map is true, and a part uses only what is its own or above it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import loadmanager

SOURCE = Path(loadmanager.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
RULERS = [
    (int(number), name, SOURCE[: match.start()].count("\n") + 1)
    for match in re.finditer(r"^# (\d+)\. ([A-Z ]+) - ", SOURCE, re.M)
    for number, name in [match.groups()]
]

PARTS = [SOURCE[: match.start()].count("\n") + 1 for match in re.finditer(r"^# PART ", SOURCE, re.M)]


def test_map_in_the_docstring_is_the_rulers():
    mapped = re.findall(r"^ ?(\d+)\. ([A-Z ]+?)  ", loadmanager.__doc__, re.M)
    assert [(int(number), name) for number, name in mapped] == [(number, name) for number, name, _ in RULERS]


def test_no_name_is_defined_twice():
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def part_of(line: int) -> int:
    return max((number for number, start in enumerate(PARTS, 1) if start <= line), default=0)


def test_map_in_the_docstring_has_the_six_parts():
    assert re.findall(r"^PART [IV]+ +([A-Z]+): (.*)", loadmanager.__doc__, re.M) == re.findall(
        r"^# PART [IV]+: ([A-Z]+) - (.*)", SOURCE, re.M
    )
    assert len(PARTS) == 6


def test_parts_use_only_names_of_their_own_and_from_above():
    defined: dict[str, int] = {}
    for node in TREE.body:
        for name in _names_defined_by(node):
            defined.setdefault(name, node.lineno)
    below = []
    for top in TREE.body:
        local = {node.arg for node in ast.walk(top) if isinstance(node, ast.arg)}
        local |= {
            node.id
            for node in ast.walk(top)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(top):
            if isinstance(node, ast.Name) and node.id in defined and node.id not in local:
                if part_of(defined[node.id]) > part_of(node.lineno):
                    below.append(f"line {node.lineno}: {node.id} of part {part_of(defined[node.id])}")
    assert not below, "\n".join(below)


def _names_defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [
        name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def test_imports_are_the_standard_library_and_the_three_allowed_packages():
    roots = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").partition(".")[0])
    assert roots - set(sys.stdlib_module_names) - {"yaml", "psycopg", "jwt"} == set()


def test_optional_packages_are_not_imported_before_they_are_needed():
    top = {alias.name for node in TREE.body if isinstance(node, ast.Import) for alias in node.names}
    assert not top & {"yaml", "psycopg", "jwt", "ssl", "sqlite3", "argparse"}


def test_no_function_is_longer_than_fifty_lines():
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1})"
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert not long, long


def test_status_changes_in_one_place_only():
    changing = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "replace"
        and any(k.arg == "status" for k in node.keywords)
    ]
    lines = SOURCE.splitlines()
    assert all(
        "status=to" in lines[line - 1] or "RunStatus.RUNNING, started_at" in lines[line - 1]
        for line in changing
    ), changing


def _classes():
    return [node for node in TREE.body if isinstance(node, ast.ClassDef)]


def _thread_names() -> set[str]:
    """Of every place that starts a thread, how its name begins."""
    given = []
    for node in ast.walk(TREE):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "start_thread":
            given.append(node.args[0])
        elif called.endswith(".in_thread"):
            given.append(node.args[1])
        elif called == "WorkerPool":
            given.append(node.args[0])
        elif called == "super().__init__":
            given += [keyword.value for keyword in node.keywords if keyword.arg == "name"]
    texts = [node.values[0] if isinstance(node, ast.JoinedStr) else node for node in given]
    return {node.value.strip() for node in texts if isinstance(node, ast.Constant)}


def test_table_of_threads_has_every_thread_that_is_started():
    table = loadmanager.__doc__.split("\nthread  ")[1].split("\n\n")[0]
    listed = {name.strip() for row in table.splitlines()[1:] for name in row[:19].split(",")}
    started = {"accept" if name == "accept-callbacks" else name for name in _thread_names()}
    assert listed == started, f"not listed: {started - listed}; not started: {listed - started}"


def test_tables_of_locks_have_every_lock():
    kinds = ("Lock", "RLock", "Condition", "BoundedSemaphore")
    made = {
        f"{cls.name}.{ast.unparse(node.targets[0]).removeprefix('self.')}"
        for cls in _classes()
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in {f"threading.{kind}" for kind in kinds}
    }
    listed = set(re.findall(r"\b(\w+\._?[a-z_]+)\b", loadmanager.__doc__.split("\nLocks, in")[1]))
    assert listed == made, f"not listed: {made - listed}; not there: {listed - made}"


def test_no_class_is_longer_than_four_hundred_lines():
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in classes}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
