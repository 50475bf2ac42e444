"""Builds the two shared libraries of the package; everything else is in pyproject.toml.

Environment variables:
  SANTA_CUDA        1 builds the CUDA library or fails, 0 leaves it out; unset: built if nvcc is found.
  SANTA_CUDA_ARCHS  what to compile for, e.g. "89;90". "compute_89" is PTX alone, which later GPUs compile; "native" is
                    the GPUs that are there. If there is none, the CUDA library is left out, or built for the default
                    with SANTA_CUDA=1.
  MAX_JOBS          number of parallel compilations (torch.utils.cpp_extension).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
PACKAGE = "santa"
TORCH_TARGET = (2, 10)  # oldest torch the libraries run on
DEFAULT_CUDA_ARCHS = "80;89;90;100;120;compute_120"  # sm_86 and sm_87 run the code of sm_80

COMMON_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02X}{TORCH_TARGET[1]:02X}000000000000",
]
# No contraction: a sampling decision must not depend on which multiply-adds the compiler chose to fuse.
CPU_FLAGS = [
    *("-fPIC", "-g0", "-Wall"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "-fopenmp-simd",  # the pragmas for vector loops alone: threads are torch's
]


def sources(*patterns: str) -> list[str]:
    """Paths relative to the project root, sorted so that builds are reproducible."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_cuda_home() -> Path | None:
    """The toolkit that holds nvcc. torch looks for it too, but not when torch itself has no CUDA."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) if Path(os.environ[variable], "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda") if Path("/usr/local/cuda/bin/nvcc").exists() else None
    # The one on PATH can be a wrapper script outside the toolkit, so ask it where it lives.
    dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    here = re.search(r"_HERE_=(.+)", dryrun.stderr)
    return Path(here.group(1).strip() if here else Path(nvcc).parent).resolve().parent


def wants_native_archs() -> bool:
    return os.environ.get("SANTA_CUDA_ARCHS", "").strip("; ") == "native"


def cuda_home_to_use() -> Path | None:
    choice = os.environ.get("SANTA_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"SANTA_CUDA is {choice!r}; it must be 0, 1 or unset")
    if choice == "0" or (choice == "" and wants_native_archs() and not native_archs()):
        return None
    home = find_cuda_home()
    if home is None and choice == "1":
        sys.exit("SANTA_CUDA=1, but there is no nvcc: put it on PATH, set CUDA_HOME, or use SANTA_CUDA=0")
    return home


def nvcc_version(cuda_home: Path) -> str:
    output = subprocess.check_output([cuda_home / "bin" / "nvcc", "--version"], text=True)
    return re.search(r"release (\d+\.\d+)", output).group(1)


def native_archs() -> str:
    """The architectures of the GPUs that are there, as SANTA_CUDA_ARCHS has them; empty without a GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    query = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    found = re.findall(r"^(\d+)\.(\d)$", query.stdout, re.MULTILINE) if query.returncode == 0 else []
    return ";".join(sorted({major + minor for major, minor in found}, key=int))


def cuda_archs(cuda_home: Path) -> list[str]:
    """Code names as nvcc has them: sm_90 is machine code, compute_90 is PTX."""
    chosen = os.environ.get("SANTA_CUDA_ARCHS", "").strip("; ")
    if wants_native_archs():
        chosen = native_archs()
    names = re.split(r"[;,\s]+", chosen or DEFAULT_CUDA_ARCHS)
    for name in names:
        if not re.fullmatch(r"(compute_)?\d{2,3}a?", name):
            sys.exit(f"SANTA_CUDA_ARCHS has {name!r}; entries look like 90, 90a or compute_90, or it is native alone")
    codes = [name if name.startswith("compute_") else f"sm_{name}" for name in names]
    if chosen:
        return codes
    known = subprocess.check_output([cuda_home / "bin" / "nvcc", "--list-gpu-arch"], text=True).split()
    return [code for code in codes if code.replace("sm_", "compute_") in known]


def gencode(code: str) -> str:
    return f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}"


def library(name: str, paths: list[str], flags: dict[str, list[str]], link: list[str]):
    extension = cpp_extension.CppExtension(
        f"{PACKAGE}.{name}",
        paths,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )
    # Only what `link` names: libc10 has no stable ABI.
    extension.libraries = []
    return extension


# An environment that is used without being activated has its ninja beside Python, not on PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])

CUDA_HOME = cuda_home_to_use()
ARCHS = cuda_archs(CUDA_HOME) if CUDA_HOME else []

extensions = [
    library(
        "_ops",
        sources("csrc/ops.cpp", "csrc/api/*.cpp", "csrc/cpu/*.cpp"),
        {"cxx": COMMON_FLAGS + CPU_FLAGS},
        ["-Wl,--as-needed", "-ltorch_cpu", "-Wl,-z,defs"],
    )
]
if CUDA_HOME:
    nvcc_flags = [
        *[flag for flag in COMMON_FLAGS if not flag.startswith("-fvisibility")],
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-DUSE_CUDA",
        "--threads=2",
        *map(gencode, ARCHS),
    ]
    extensions.append(
        library(
            "_ops_cuda",
            sources("csrc/cuda/**/*.cu"),
            {"nvcc": nvcc_flags},
            # libtorch brings in libtorch_cuda and the CUDA runtime of the torch that loads the library.
            ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"],
        )
    )


class BuildLibraries(cpp_extension.BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=True)):
    def finalize_options(self):
        super().finalize_options()
        # One place for objects, so that editable installs and wheels build incrementally and share them.
        self.build_temp = str(ROOT / "build" / "objects")

    def run(self):
        folders = [Path(self.build_lib, PACKAGE), *([ROOT / PACKAGE] if self.inplace else [])]
        for folder in folders:  # an earlier build may have left a CUDA library that is not wanted now
            (folder / "_ops_cuda.so").unlink(missing_ok=True)
        super().run()
        info = {
            "torch": torch.__version__,
            "nvcc": nvcc_version(CUDA_HOME) if CUDA_HOME else None,
            "cuda_archs": ARCHS,
        }
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build_extensions(self):
        # Python's own link command may carry the rpath of the machine that built Python.
        link = [cpp_extension.get_cxx_compiler(), "-shared", *os.environ.get("LDFLAGS", "").split()]
        self.compiler.set_executables(linker_so=link, linker_so_cxx=link)
        if not CUDA_HOME:
            return super().build_extensions()
        # The libraries do not depend on torch's own CUDA. What matters is the nvcc in use: with these two
        # values torch finds it, and writes header dependencies for .cu files even if it has no CUDA itself.
        with (
            mock.patch.object(cpp_extension, "CUDA_HOME", str(CUDA_HOME)),
            mock.patch.object(torch.version, "cuda", nvcc_version(CUDA_HOME)),
        ):
            super().build_extensions()


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        # No Python C API: one wheel serves every Python 3.
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
