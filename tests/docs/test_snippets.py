"""Every Python snippet of README and the docs runs, and every name of the package that they mention exists.

The snippets of a file run in order in one namespace, as a reader pastes them. One that cannot run everywhere says so
in its first line, `# needs a GPU` or `# needs a download`, or uses a name that the reader has to fill in
(PLACEHOLDERS). Of it, imports are executed, every other name has to be defined by something, and calls of `santa`
have to take the arguments that they are given.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "models").glob("*/README.md")])
MARKS = ("# needs a GPU", "# needs a download")
# Names of a page that stand for something of the reader's.
PLACEHOLDERS = {"docs/transformers.md": {"name", "text"}}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets_of(text: str) -> list[tuple[int, str]]:
    """(line, code) of each fenced block of Python."""
    blocks, start = [], None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip().startswith("```python"):
            start = number
        elif line.strip() == "```" and start is not None:
            blocks.append((start, textwrap.dedent("\n".join(lines[start : number - 1]))))
            start = None
    assert start is None, f"the block of line {start} has no end"
    return blocks


def loaded_names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def bound_names(tree: ast.AST) -> set[str]:
    """What the code itself gives a meaning to, wherever."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def resolve(node: ast.AST, namespace: dict[str, Any]) -> Any:
    """The object of a dotted name that starts with a module or something imported; None for anything else. Raises
    AttributeError where a module lacks it."""
    if isinstance(node, ast.Name):
        return namespace.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, namespace)
        return getattr(owner, node.attr) if isinstance(owner, types.ModuleType) else None
    return None


def check_call(function: Any, call: ast.Call) -> None:
    """That `function` takes the arguments. Of settings that are written out, that it takes their values as well."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in keywords or any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    if isinstance(function, type):
        try:
            values = [ast.literal_eval(argument) for argument in call.args]
            named = {name: ast.literal_eval(value) for name, value in keywords.items()}
        except ValueError:
            pass
        else:
            function(*values, **named)
            return
    inspect.signature(function).bind(*call.args, **keywords)


def check(code: str, namespace: dict[str, Any], known: set[str], filename: str) -> set[str]:
    """What can be said of code without running it. `namespace` gets its imports; returns the names that it binds."""
    tree = ast.parse(code, filename)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), filename, "exec"), namespace)
    bound = bound_names(tree)
    undefined = loaded_names(tree) - bound - known - set(namespace) - set(dir(builtins))
    assert not undefined, f"{filename}: nothing defines {sorted(undefined)}"
    for node in ast.walk(tree):
        resolve(node, namespace)
        function = resolve(node.func, namespace) if isinstance(node, ast.Call) else None
        if getattr(function, "__module__", "").split(".")[0] == "santa":
            check_call(function, node)
    return bound


def run_page(text: str, page: str) -> int:
    """Runs or checks each snippet; returns how many ran. Whatever is wrong raises."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    # What snippets that were not run would have defined.
    promised: set[str] = set()
    placeholders = PLACEHOLDERS.get(page, set())
    ran = 0
    for line, code in snippets_of(text):
        filename = f"{page}:{line}"
        needs = placeholders | promised
        cannot_run = code.startswith(MARKS) or loaded_names(ast.parse(code, filename)) & (needs - set(namespace))
        if cannot_run and not (code.startswith(MARKS[0]) and torch.cuda.is_available()):
            promised |= check(code, namespace, needs, filename)
        else:
            exec(compile(code, filename, "exec"), namespace)
            ran += 1
    return ran


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Paths in snippets are relative to the repository; nothing that a snippet seeds stays."""
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_run(page):
    run_page(page.read_text(), name_of(page))


def test_most_snippets_run():
    """The marks are for what cannot run, and pages with none are not all there is."""
    counts = {name_of(page): len(snippets_of(page.read_text())) for page in PAGES}
    assert counts["README.md"] >= 4 and sum(counts.values()) >= 10
    marked = [
        (page.name, line)
        for page in PAGES
        for line, code in snippets_of(page.read_text())
        if code.startswith(MARKS) or name_of(page) in PLACEHOLDERS
    ]
    assert len(marked) <= sum(counts.values()) / 2


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = undefined_name", NameError),
        ("# needs a GPU\nx = undefined_name", AssertionError),
        ("# needs a GPU\nimport santa\nsanta.no_such_function()", AttributeError),
        ("# needs a download\nimport santa\nsanta.decode(1, 2, 3, no_such_argument=4)", TypeError),
        ("# needs a download\nimport santa\nsanta.SantaConfig(no_such_field=4)", TypeError),
        ("# needs a download\nimport santa\nsanta.SantaConfig(num_samples=-4)", ValueError),
        ("# needs a download\nfrom santa import no_such_name", ImportError),
        ("# needs a GPU\nx = (", SyntaxError),
        ("import santa\nsanta.decode(1, 2, 3)", TypeError),
    ],
)
def test_a_wrong_snippet_is_found(code, error):
    if torch.cuda.is_available() and error is AssertionError:
        error = NameError
    with pytest.raises(error):
        run_page(f"text\n\n```python\n{code}\n```\n", "page.md")


def test_names_of_a_snippet_that_did_not_run_are_not_run_either():
    marked = "```python\n# needs a download\nx = 1\n```\n"
    assert run_page(marked + "```python\ny = x + 1\n```\n```python\nz = 2\n```\n", "page.md") == 1
    with pytest.raises(NameError):
        run_page(marked + "```python\ny = w\n```\n", "page.md")


def test_names_in_the_text_exist():
    """`santa.x` in the text is there after `import santa`: in a new process, where no other test imported more."""
    mentioned = {
        name: name_of(page) for page in PAGES for name in re.findall(r"`(santa(?:\.[A-Za-z_]\w*)+)", page.read_text())
    }
    assert {"santa.decode", "santa.prefill", "santa.padded_head_dim"} <= set(mentioned)
    code = (
        "import sys, operator, santa\n"
        "for name in sys.argv[1:]:\n"
        "    try: operator.attrgetter(name.removeprefix('santa.'))(santa)\n"
        "    except AttributeError: print(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *mentioned], capture_output=True, text=True, check=True)
    missing = [f"{name} ({mentioned[name]})" for name in result.stdout.split()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
