"""Installs a wheel into a new environment and decodes with it, away from the source tree.

Usage: python tools/check_wheel.py WHEEL [REQUIREMENT...], e.g. dist/santa-*.whl torch==2.13.0
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

DECODE = """
import torch, santa
assert "site-packages" in santa.__file__, santa.__file__
generator = torch.Generator().manual_seed(0)
q = torch.randn(2, 8, 64, generator=generator)
k, v = (torch.randn(2, 300, 2, 64, generator=generator) for _ in range(2))
exact, lse = santa.decode(q, k, v, num_samples=0)
keys, values = (x.repeat_interleave(4, dim=2).permute(0, 2, 1, 3) for x in (k, v))
expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]
torch.testing.assert_close(exact, expected)
sampled, sampled_lse = santa.decode(q, k, v, num_samples=64, min_sampled_len=0)
torch.testing.assert_close(sampled_lse, lse)
assert sampled.isfinite().all() and not torch.equal(sampled, exact)
print("decoded with", santa.__file__)
"""


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    wheel = str(Path(sys.argv[1]).resolve(strict=True))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "env"), with_pip=True, symlinks=True)
        python = Path(folder, "env", "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, wheel, *sys.argv[2:]], check=True, cwd=folder)
        subprocess.run([python, "-m", "santa"], check=True, cwd=folder)
        subprocess.run([python, "-c", DECODE], check=True, cwd=folder)


if __name__ == "__main__":
    main()
