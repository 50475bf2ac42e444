"""Checks that the libraries run on the oldest supported torch: python tools/check_symbols.py LIBRARY...

Every LibTorch function they call must be a stable one that torch 2.10 has (tests/packaging/abi_2.10.txt), and they
must need neither C++ symbols of LibTorch, nor the Python API, nor a CUDA runtime of their own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ABI_LIST = Path(__file__).resolve().parent.parent / "tests" / "packaging" / "abi_2.10.txt"
# CUDA's runtime is not among them: it comes with the torch that loads the library.
ALLOWED_NEEDED = re.compile(r"(libtorch|libtorch_cpu|libstdc\+\+|libgcc_s|libm|libc|ld-linux-[\w-]+)\.so")
FORBIDDEN = {
    "has no stable ABI": re.compile(r"(?:(?:vtable|typeinfo|typeinfo name) for )?(?:c10|at|torch|caffe2)::"),
    "belongs to the Python API": re.compile(r"_?Py[A-Z]\w+$"),
}


def problems(library: Path) -> list[str]:
    dynamic = subprocess.check_output(["readelf", "-dW", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    found = [f"needs {name}" for name in needed if not ALLOWED_NEEDED.match(name)]
    found += [f"has a {kind} of the machine that built it" for kind in re.findall(r"\((R\w*PATH)\)", dynamic)]

    available = set(ABI_LIST.read_text().split())
    for line in subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True).splitlines():
        symbol = line.split(maxsplit=1)[1].split("@")[0]
        if symbol.startswith(("aoti_", "torch_")) and symbol not in available:
            found.append(f"{symbol} does not exist in torch 2.10")
        found += [f"{symbol} {reason}" for reason, pattern in FORBIDDEN.items() if pattern.match(symbol)]
    return found


def main() -> int:
    libraries = [Path(argument) for argument in sys.argv[1:]]
    if not libraries:
        sys.exit(__doc__)
    found = {library: problems(library) for library in libraries}
    for library, reasons in found.items():
        print(f"{library}:", *(reasons or ["ok"]), sep="\n  ")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
