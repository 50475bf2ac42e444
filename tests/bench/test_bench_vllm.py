"""The arithmetic of bench/bench_vllm.py and bench_transformers.py, which need a GPU and models to run."""

from __future__ import annotations

from typing import Any

import bench_vllm
import pytest


def test_kinds_of_kernels() -> None:
    kernels = {
        "void santa::cuda::one_pass_kernel<...>": "attention",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
        "prepare_varlen_num_blocks_kernel": "attention",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "matrix products",
        "triton_red_fused_add_mean_mul_pow_rsqrt_0": "rest",
        "void vllm::reshape_and_cache_flash_kernel<...>": "attention",
        "void santa::cuda::append_proposal_kernel<__nv_bfloat16>(...)": "attention",
    }
    assert {name: bench_vllm.kind_of(name) for name in kernels} == kernels


def test_report_compares_equal_batches_of_the_same_cache() -> None:
    def row(engine: str, cache: str, batch: int, ms: float) -> dict[str, Any]:
        kinds = dict.fromkeys([*bench_vllm.KINDS, "rest"], 1.0)
        return {
            "engine": engine,
            "cache": cache,
            "shape": "8x32768",
            "batch": batch,
            "ms": ms,
            "tokens_per_s": 1,
        } | kinds

    rows = [row("dense", "bf16", 8, 14.0), row("santa", "bf16", 8, 7.0), row("santa", "fp8", 8, 5.0)]
    rows.append(row("proposal", "bf16", 8, 4.0))
    lines = bench_vllm.report([*rows, row("santa", "bf16", 6, 6.0)]).splitlines()
    by_time = {line.split()[4]: line for line in lines[1:]}
    assert "2.00x" in by_time["7.00"] and "1.25x" in by_time["7.00"]
    assert "1.30x" in by_time["5.00"] and "x " not in by_time["5.00"].replace("1.30x", "")
    assert by_time["6.00"].split()[6] == "-"
    assert "3.50x" in by_time["4.00"] and "1.50x" in by_time["4.00"]


@pytest.mark.parametrize("shapes", [["8"], ["8x"], ["0x4096"], ["8x50"]])
def test_shapes_are_checked(shapes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_vllm.parse(["--shapes", *shapes])
    assert f"--shapes has {shapes[0]}" in capsys.readouterr().err


def test_a_rows_keys_are_those_of_its_shape() -> None:
    assert bench_vllm.sizes_of("16x32768") == (16, 32768)
    assert set(bench_vllm.TARGETS["santa"]) == set(bench_vllm.SHAPES) > set(bench_vllm.TARGETS["proposal"])
    assert set(bench_vllm.TARGETS) < set(bench_vllm.ENGINES)


@pytest.mark.parametrize("kernels", [True, False])
def test_transformers_report(kernels: bool) -> None:
    bench_transformers = pytest.importorskip("bench_transformers", reason="needs transformers and tqdm")
    rows: list[dict[str, Any]] = [
        {"shape": "1x128", "engine": e, "ms": ms} for e, ms in (("sdpa", 8.0), ("santa", 4.0))
    ]
    if kernels:
        rows = [row | {"attention": 1.0, "matrix products": 2.0, "rest": 0.5} for row in rows]
    last = bench_transformers.report(rows).splitlines()[-1]
    assert "2.00 x sdpa" in last and ("idle 0.50" in last) == kernels
