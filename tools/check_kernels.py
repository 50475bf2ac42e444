"""Prints what each kernel uses, and fails if one spills or is broken: python tools/check_kernels.py LIBRARY [ARCH...]

A kernel may use neither stack nor local memory on the given architectures (default: sm_89 and sm_90), and on none may
it have a copy to shared memory at an address that nothing computes: ptxas 13.0 makes those where it would have to name
a uniform register from UR16 on, and a GPU stops at them with an illegal instruction. Read with cuobjdump, from PATH or
from the nvidia-cuda-cuobjdump package.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    arch: str
    kernel: str
    registers: int
    shared: int
    stack: int
    local: int


def spills(usage: Usage) -> bool:
    return usage.stack > 0 or usage.local > 0


def find_cuobjdump() -> str:
    packaged = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/cuobjdump")]
    found = shutil.which("cuobjdump") or next(iter(packaged), None)
    if found is None:
        sys.exit("there is no cuobjdump: install the CUDA toolkit's, or the package nvidia-cuda-cuobjdump")
    return str(found)


def kernel_name(mangled: str) -> str:
    """Without the parameter list and the namespace, which say little in a table."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\((?!anonymous)[^<>]*\)$", "", name)
    return re.sub(r"^void |santa::|\(anonymous namespace\)::", "", name)


def usages(library: Path) -> list[Usage]:
    text = subprocess.check_output([find_cuobjdump(), "--dump-resource-usage", library], text=True)
    found, arch, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif kernel and "REG:" in line:
            value = dict(re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line))
            used = [int(value[name]) for name in ("REG", "SHARED", "STACK", "LOCAL")]
            found.append(Usage(arch, kernel_name(kernel), *used))
            kernel = ""
    return found


def broken_copies(library: Path) -> dict[tuple[str, str], int]:
    """How many copies of a kernel, by architecture and name, are relative to UR0 where nothing ever sets it."""
    text = subprocess.check_output([find_cuobjdump(), "--dump-sass", library], text=True)
    found, arch = {}, ""
    for part in re.split(r"(?=Function : |^arch = )", text, flags=re.MULTILINE):
        if match := re.match(r"arch = (\S+)", part):
            arch = match[1]
        elif match := re.match(r"Function : (\S+)", part):
            copies = len(re.findall(r"LDGSTS\S* \[R\d+\+UR0\b", part))
            if copies and not re.search(r"^\s*/\*\w+\*/\s+(@\S+ )?U?[A-Z0-9.]+ (UP\w+, )*UR0\b", part, re.MULTILINE):
                found[arch, kernel_name(match[1])] = copies
    return found


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    archs = sys.argv[2:] or ["sm_89", "sm_90"]
    checked = sorted(usage for usage in usages(Path(sys.argv[1])) if usage.arch in archs)
    absent = set(archs) - {usage.arch for usage in checked}
    if absent:
        sys.exit(f"{sys.argv[1]} has no kernels for {', '.join(sorted(absent))}")
    print(f"{'arch':6} {'regs':>4} {'smem':>6} {'stack':>5} {'local':>5}  kernel")
    for usage in checked:
        mark = "  <-- SPILLS" if spills(usage) else ""
        print(
            f"{usage.arch:6} {usage.registers:4} {usage.shared:6} {usage.stack:5} {usage.local:5}  {usage.kernel}{mark}"
        )
    spilling = sum(map(spills, checked))
    print(f"{len(checked)} kernels, {spilling} of them spill")
    broken = broken_copies(Path(sys.argv[1]))
    for (arch, kernel), copies in sorted(broken.items()):
        print(f"{arch} {kernel}: {copies} copies are no instructions")
    return int(spilling > 0 or bool(broken))


if __name__ == "__main__":
    sys.exit(main())
