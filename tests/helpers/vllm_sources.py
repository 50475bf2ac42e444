"""Python files of vLLM's wheels, without the rest of them: a few hundred kilobytes of as many megabytes."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "vllm_sources"

# Reads the wheel's index and some of its files where pip can, over ranges of bytes. What it uses is pip's own and may
# change; then the whole wheel is downloaded.
_LAZY = """
import sys, zipfile
from pip._internal.commands import create_command
from pip._internal.cli.cmdoptions import make_target_python
from pip._internal.models.link import Link
from pip._internal.network.lazy_wheel import LazyZipOverHTTP
version, folder, *names = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(
    ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "-d", folder]
    + [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 31, 35)] + ["vllm"]
)
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session, make_target_python(options))
    found = [c for c in finder.find_all_candidates("vllm") if str(c.version) == version and "x86_64" in c.link.filename]
    wheel = zipfile.ZipFile(LazyZipOverHTTP(found[0].link.url, session))
    for name in names:
        if name in wheel.namelist():
            wheel.extract(name, folder)
"""
_DOWNLOAD = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]


class Unreachable(Exception):
    """No wheel could be had."""


def fetch(version: str, names: tuple[str, ...]) -> Path:
    """A folder with those files of vLLM `version` that are in `names`, kept between runs.

    A file that the wheel does not have is not there.

    Raises:
        Unreachable: there is no network, or no wheel.
    """
    folder = CACHE / version
    if (done := folder / ".done").exists() and done.read_text() == repr(names):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lazy = subprocess.run([sys.executable, "-c", _LAZY, version, folder, *names], capture_output=True, text=True)
    if lazy.returncode != 0:
        with tempfile.TemporaryDirectory() as wheels:
            platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 31, 35)]
            command = [sys.executable, "-m", "pip", *_DOWNLOAD, *platforms, "-d", wheels, f"vllm=={version}"]
            if (plain := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
                raise Unreachable(f"{lazy.stderr.strip()[-300:]}; {plain.stderr.strip()[-300:]}")
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                for name in set(names) & set(wheel.namelist()):
                    wheel.extract(name, folder)
    done.write_text(repr(names))
    return folder


class Source:
    """The classes and functions of one module, as they are written."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text())

    @functools.cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}

    @functools.cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}

    def methods(self, name: str) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in self.classes[name].body if isinstance(node, ast.FunctionDef)}

    def attributes(self, name: str) -> set[str]:
        """Names that the body of a class sets or declares."""
        found = set()
        for node in self.classes[name].body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        return found


def decorators(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(node) for node in function.decorator_list}


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters that have one, in their order; without self and cls."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def takes_any(function: ast.FunctionDef) -> bool:
    return function.args.vararg is not None or function.args.kwarg is not None
