"""What is built and shipped: wheel, source distribution, libraries, `python -m santa`. No GPU needed.

The wheel is built from the objects that the installed libraries came from, so it takes seconds; SANTA_WHEEL
names one that is already there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import check_kernels
import check_symbols
import pytest
import torch

from santa import _library

ROOT = Path(__file__).resolve().parents[2]
STATUS = _library.load()
HAS_CUDA_LIBRARY = STATUS.cuda_path.exists()


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def run_setup(**variables: str) -> subprocess.CompletedProcess:
    """`setup.py` up to the point where it knows what to build."""
    return run(sys.executable, ROOT / "setup.py", "--version", cwd=ROOT, env={**os.environ, **variables})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if os.environ.get("SANTA_WHEEL"):
        return Path(os.environ["SANTA_WHEEL"]).resolve(strict=True)
    folder = tmp_path_factory.mktemp("wheel")
    archs = ";".join(STATUS.build_info["cuda_archs"]).replace("sm_", "")
    variables = {"SANTA_CUDA": "1" if HAS_CUDA_LIBRARY else "0", "SANTA_CUDA_ARCHS": archs}
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ROOT,
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--no-cache-dir",
    )
    result = run(*pip, "--wheel-dir", folder, env={**os.environ, **variables})
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> tarfile.TarFile:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    result = run(sys.executable, "-c", build, folder, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        yield archive


def test_one_wheel_serves_every_python(wheel):
    version = importlib.metadata.version("santa")
    assert re.fullmatch(rf"santa-{re.escape(version)}-py3-none-[a-z0-9_]+\.whl", wheel.name)
    assert "-any" not in wheel.name


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "santa").rglob("*.py")}
    libraries = {"santa/_ops.so"} | ({"santa/_ops_cuda.so"} if HAS_CUDA_LIBRARY else set())
    typed = {"santa/py.typed"} if (ROOT / "santa" / "py.typed").exists() else set()
    assert shipped == sources | libraries | typed | {"santa/build_info.json"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_is_complete(sdist):
    names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for folder in ("csrc", "santa", "tests", "tools", "bench", "demo", "docs"):
        for path in (ROOT / folder).rglob("*"):
            built = path.suffix in (".so", ".pyc") or path.name in ("__pycache__", "build_info.json")
            if path.is_file() and not built:
                assert str(path.relative_to(ROOT)) in names
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "Makefile"):
        assert name in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "build_info.json"))]


@pytest.mark.parametrize("library", [STATUS.cpu_path, STATUS.cuda_path], ids=lambda path: path.name)
def test_library_needs_only_what_torch_2_10_has(library):
    if not library.exists():
        pytest.skip("built without CUDA")
    assert check_symbols.problems(library) == []


def test_symbol_check_finds_unstable_symbols():
    libtorch_python = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    found = "\n".join(check_symbols.problems(libtorch_python))
    assert "needs libc10.so" in found
    assert re.search(r"c10::.* has no stable ABI", found)
    assert "belongs to the Python API" in found


def test_spill_check_reads_usage(monkeypatch):
    text = (
        "arch = sm_90\n Function _Z4goodv:\n  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600\n"
        " Function _Z3badv:\n  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:600\n"
    )
    monkeypatch.setattr(check_kernels, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(check_kernels.subprocess, "check_output", lambda *_, **__: text)
    good, bad = check_kernels.usages(Path("library.so"))
    assert good == ("sm_90", "good", 32, 1024, 0, 0)
    assert (bad.kernel, bad.stack) == ("bad", 16)
    monkeypatch.setattr(sys, "argv", ["check_kernels.py", "library.so", "sm_90"])
    assert check_kernels.main() == 1


def test_kernel_check_finds_copies_to_nowhere(monkeypatch):
    copy = "  /*2f00*/  @P0 LDGSTS.E.BYPASS.128 [R75+UR0], desc[UR1][R24.64] ;  /* 0x0000000018457fae */\n"
    text = (
        "arch = sm_90\n  Function : _Z3badv\n" + copy + "  Function : _Z4goodv\n"
        "  /*0010*/  ULDC UR0, c[0x0][0x210] ;\n" + copy + "arch = sm_120\n  Function : _Z3badv\n" + copy + copy
    )
    monkeypatch.setattr(check_kernels, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(check_kernels.subprocess, "check_output", lambda *_, **__: text)
    assert check_kernels.broken_copies(Path("library.so")) == {("sm_90", "bad"): 1, ("sm_120", "bad"): 2}


def test_environment_report(tmp_path):
    result = run(sys.executable, "-m", "santa", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert importlib.metadata.version("santa") in result.stdout
    assert torch.__version__ in result.stdout
    assert re.search(r"CPU library +loaded from .*_ops\.so", result.stdout)
    assert re.search(r"CUDA library +(loaded from .*_ops_cuda\.so|not loaded: .+)", result.stdout)
    assert re.search(r"architectures +(none|(sm|compute)_\d+)", result.stdout)
    assert re.search(r"GPUs +(none|0: )", result.stdout)


def test_cuda_forced_without_nvcc_is_an_error(tmp_path):
    result = run_setup(SANTA_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "no nvcc" in result.stderr


def test_nvcc_missing_is_fine_unless_forced(tmp_path):
    assert run_setup(SANTA_CUDA="", CUDA_HOME=str(tmp_path)).returncode == 0


def test_bad_build_options_are_named():
    assert "SANTA_CUDA is 'yes'" in run_setup(SANTA_CUDA="yes").stderr
    if shutil.which("nvcc"):
        assert "SANTA_CUDA_ARCHS has '9.0'" in run_setup(SANTA_CUDA="1", SANTA_CUDA_ARCHS="89;9.0").stderr


DEFAULT_OF_THE_NVCC = ["sm_80", "sm_90"]


@pytest.mark.parametrize(
    ("answer", "santa_cuda", "archs"),
    [
        ("9.0\n8.9\n9.0\n", "", ["sm_89", "sm_90"]),
        ("12.0\n", "1", ["sm_120"]),
        ("9.0\n", "0", None),
        ("No devices were found\n", "", None),
        ("No devices were found\n", "1", DEFAULT_OF_THE_NVCC),
    ],
)
def test_native_means_the_gpus_that_are_there(tmp_path, answer, santa_cuda, archs):
    """None: the CUDA library is left out."""
    (tmp_path / "bin").mkdir()
    known = "\n".join(code.replace("sm_", "compute_") for code in DEFAULT_OF_THE_NVCC)
    for name, output in (("nvidia-smi", answer.rstrip()), ("nvcc", known)):
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\ncat <<END\n{output}\nEND\n")
        script.chmod(0o755)
    code = (
        "import runpy, sys; sys.argv[1:] = ['--version']; build = runpy.run_path('setup.py');"
        "print(build['ARCHS'] if build['CUDA_HOME'] else None)"
    )
    variables = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CUDA_HOME": str(tmp_path),
        "SANTA_CUDA": santa_cuda,
        "SANTA_CUDA_ARCHS": "native",
    }
    result = run(sys.executable, "-c", code, cwd=ROOT, env={**os.environ, **variables})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(archs)


def import_copy(folder: Path):
    """The loader of a copy of the package in `folder`."""
    spec = importlib.util.spec_from_file_location("santa_copy_library", folder / "_library.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_second_copy_in_a_process_is_refused(tmp_path):
    shutil.copy(_library.__file__, tmp_path)
    shutil.copy(STATUS.cpu_path, tmp_path)
    with pytest.raises(ImportError, match="another copy of santa"):
        import_copy(tmp_path).load()


def test_missing_library_says_what_to_do(tmp_path):
    shutil.copy(_library.__file__, tmp_path)
    with pytest.raises(ImportError, match=r"_ops\.so is missing.*pip install"):
        import_copy(tmp_path).load()


def test_cuda_library_that_does_not_load_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    broken = tmp_path / "_ops_cuda.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="santa has no CUDA kernels"):
        reason = _library._load_cuda(broken)
    assert "_ops_cuda.so does not load" in reason
    assert "built without CUDA" in _library._load_cuda(tmp_path / "absent.so")


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),  # same major version
        (["sm_89"], (8, 6), False),
        (["sm_89"], (9, 0), False),
        (["compute_89"], (9, 0), True),  # PTX serves later GPUs
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_120"], (12, 1), True),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_are_covered(archs, capability, covered):
    status = _library.LibraryStatus(Path(), Path(), False, "", {"cuda_archs": archs})
    assert status.covers(capability) is covered
