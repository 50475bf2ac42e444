"""``python -m santa`` prints the environment: paste it into a bug report."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from santa._library import LibraryStatus, load


def gpu_lines(status: LibraryStatus) -> list[str]:
    if not torch.cuda.is_available():
        return ["none visible to torch"]
    lines = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        covered = "covered" if status.covers(capability) else "NOT covered by the compiled architectures"
        name = torch.cuda.get_device_name(index)
        lines.append(f"{index}: {name}, compute capability {capability[0]}.{capability[1]}, {covered}")
    return lines


def report() -> str:
    status = load()
    info = status.build_info
    cuda_library = f"loaded from {status.cuda_path}" if status.cuda_loaded else f"not loaded: {status.cuda_reason}"
    rows = [
        ("santa", [version("santa")]),
        ("Python", [f"{platform.python_version()} on {platform.system()} {platform.machine()}"]),
        ("torch", [f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"]),
        ("built with", [f"torch {info.get('torch', '?')}, nvcc {info.get('nvcc') or 'none'}"]),
        ("CPU library", [f"loaded from {status.cpu_path}"]),
        ("CUDA library", [cuda_library]),
        ("architectures", [" ".join(info.get("cuda_archs", [])) or "none"]),
        ("GPUs", gpu_lines(status)),
    ]
    return "\n".join(f"{name if i == 0 else '':14}{line}" for name, lines in rows for i, line in enumerate(lines))


if __name__ == "__main__":
    print(report())
