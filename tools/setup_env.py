"""Prepares the virtual environment that `make` uses: python tools/setup_env.py VENV GROUP...

A group is "package" (the package's own dependencies), an extra or a dependency group of pyproject.toml. What
is already there is never downloaded again. Without --torch, a suitable torch that the running Python already
has is used together with everything beside it, so that a machine without network can build and test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)

# Runs in the environment itself: prints those of the given requirements that it does not satisfy.
FIND_MISSING = """
import json, sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement
def missing(text):
    requirement = Requirement(text)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return True
    return not requirement.specifier.contains(version, prereleases=True)
print(json.dumps([text for text in json.loads(sys.argv[1]) if missing(text)]))
"""


def read_groups() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {
        "package": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
        **project["dependency-groups"],
    }


def create(folder: Path) -> Path:
    """Create the environment, without pip, unless it exists; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"creating {folder} with {sys.executable}")
        venv.create(folder, symlinks=True)
    return python


def provide_pip(python: Path) -> None:
    if subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0:
        return
    if subprocess.run([python, "-m", "ensurepip"], stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit(
            f"{sys.executable} cannot put pip into a virtual environment: `ensurepip` does not work. "
            "Install your system's venv package (python3-venv on Debian), or choose another: make PYTHON=..."
        )


def own_torch_is_suitable() -> bool:
    try:
        numbers = metadata.version("torch").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return tuple(map(int, numbers)) >= OLDEST_TORCH


def expose_own_packages(python: Path, expose: bool) -> None:
    """Let the environment see the packages of the running Python, after its own.

    --system-site-packages would not do: it shows those of the base installation, and the running Python may
    itself belong to a virtual environment.
    """
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(subprocess.check_output([python, "-c", query], text=True).strip())
    link = site_packages / "parent_packages.pth"
    if not expose:
        link.unlink(missing_ok=True)
        return
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    link.write_text("\n".join(folders) + "\n")
    print(f"using torch {metadata.version('torch')} of {sys.executable}")


def install(python: Path, requirements: list[str], pip_options: list[str]) -> bool:
    output = subprocess.check_output([python, "-c", FIND_MISSING, json.dumps(requirements)], text=True)
    missing = json.loads(output)
    if not missing:
        return True
    print("installing", *missing, flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    return subprocess.run([*pip, *pip_options, *missing]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path, metavar="VENV")
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--torch", default="", metavar="SPEC", help="install this torch, e.g. torch==2.13.0")
    parser.add_argument("--optional", action="append", default=[], metavar="GROUP", help="go on without it")
    parser.add_argument("--no-deps", action="store_true", help="install the named packages alone")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"Python >= 3.10 is needed; {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")

    groups = read_groups()
    python = create(arguments.venv)
    if "package" in arguments.groups and Path(sys.prefix) != arguments.venv.resolve():
        expose_own_packages(python, not arguments.torch and own_torch_is_suitable())
    provide_pip(python)

    requirements = [text for group in arguments.groups for text in groups[group]]
    if arguments.torch:
        requirements.append(arguments.torch)
    options = ["--no-deps"] if arguments.no_deps else []
    if not install(python, requirements, options):
        sys.exit("the requirements could not be installed; see pip's message above")
    for group in arguments.optional:
        if not install(python, groups[group], options):
            print(f"going on without {', '.join(groups[group])}: what needs them will say so")


if __name__ == "__main__":
    main()
