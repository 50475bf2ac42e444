"""The benchmark's own arithmetic, on the CPU: what it would print about a run is right."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_decode
import competitors
import harness
import k_stream
import profile_decode
import pytest
import report
import roofline
import targets
import torch
from helpers.bench_rows import MEASURED, case

import santa


def test_ratios_are_to_the_fastest_16_bit_kernel_and_to_each() -> None:
    row = case("table", "1x32768", MEASURED)[-1]
    assert row["speedup"] == 36 / 20
    assert row["share"] == 16 / 20
    assert row["k_gbps"] == pytest.approx(32768 * 2048 / 20e-6 / 1e9)
    assert row["ratios"] == {
        "torch SDPA": 2.0,
        "FlashInfer": 1.8,
        "FlashInfer fp8": 1.5,
        "FlashInfer XQA": 1.9,
        "FlashInfer XQA fp8": 1.4,
    }


def test_share_is_of_the_stream_that_reads_the_same_bytes() -> None:
    rows = case("fp8", "1x32768", {"K stream, K in 8 bits": ("stream", 9.0)}, k_bytes=100)
    rows += case("fp8", "1x32768", MEASURED | {"santa grouped S=128, K fp8": ("santa", 12.0)})
    rows[-1]["k_bytes"] = 100
    report.derive(rows)
    assert rows[-1]["share"] == 9 / 12
    assert rows[1]["share"] == 16 / 40


def test_a_competitor_without_a_result_is_shown_and_does_not_count() -> None:
    rows = case("table", "1x32768", MEASURED)
    failed = rows[1]
    del failed["us"]
    failed["note"] = "failed: RuntimeError: wrong result: relative error 1, expected below 0.02"
    report.derive(rows)
    assert rows[-1]["speedup"] == 1.9
    lines = report.case_lines(rows)
    assert "best dense: FlashInfer XQA" in lines[0]
    assert any("FlashInfer " in line and "wrong result" in line for line in lines)


def test_lines_fit_the_width_and_columns_align() -> None:
    slow = {"FlashAttention-3": ("dense", 1234.5), "santa multinomial S=128 proportional": ("santa", 1234.5)}
    rows = case("table", "8x131072", MEASURED | slow)
    lines = report.case_lines(rows)
    assert all(len(line) <= report.WIDTH for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize("shape", ["4", "x8", "0x8", "4x", "4x8x2", "-1x8"])
def test_bad_shapes_are_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="4x32768"):
        report.parse_shape(shape)


def test_variants_are_compared_with_the_base() -> None:
    times = {"torch SDPA": ("dense", 180.0), "santa grouped S=128": ("santa", 100.0)}
    rows = case("variants", targets.VARIANT_SHAPE, times, case=targets.VARIANT_BASE)
    rows += case("variants", targets.VARIANT_SHAPE, times | {"torch SDPA": ("dense", 171.0)}, case="head_dim 64")
    assert "1.71 (0.95)" in report.variant_lines(rows)[2]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = case("table", "1x32768", MEASURED) + case("table", "4x32768", MEASURED)
    report.plot(rows, tmp_path / "deep" / "plot.png", "a GPU")
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_default_arguments_are_the_table_of_targets() -> None:
    arguments = bench_decode.parse([])
    assert arguments.table
    assert set(arguments.shapes) == {*targets.SAMPLED, *targets.SHORT}
    assert tuple(arguments.samples) == targets.SAMPLES
    assert {"sdpa", "flashinfer", "xqa", "fa3", "flashinfer-fp8", "xqa-fp8"} == set(arguments.competitors)
    settings = bench_decode.settings_of(arguments, 4, 32768)
    assert [s.name for s in settings] == [
        "santa exact",
        "santa grouped S=128",
        "santa systematic S=128",
        "santa grouped S=2048 uniform",
        "santa systematic S=2048 uniform",
    ]
    # A row shorter than min_sampled_len would be exact.
    assert not any(s.budget == "uniform" for s in bench_decode.settings_of(arguments, 4, 8192))


def test_quick_and_modes() -> None:
    quick = bench_decode.parse(["--quick"])
    assert quick.shapes == ["1x32768", "4x32768"]
    assert [s.name for s in bench_decode.settings_of(quick, 4, 32768)] == ["santa exact", "santa grouped S=128"]
    assert not bench_decode.parse(["--fp8"]).table
    assert bench_decode.parse(["--fp8", "--table"]).table
    assert bench_decode.parse(["--device", "cpu"]).competitors == ["sdpa"]


@pytest.mark.parametrize(
    "argv", [["--shapes", "4"], ["--device", "cpu", "--competitors", "fa3"], ["--mixed", "--plot", "x.png"]]
)
def test_bad_arguments_end_the_program(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.parse(argv)


def test_k_alone_exceeds_the_cache() -> None:
    cache = 60 << 20
    for k_bytes in (1 << 20, 16 << 20, 64 << 20, 2 << 30):
        assert harness.num_copies(k_bytes, cache) * k_bytes >= 4 * cache
        assert harness.num_copies(k_bytes, cache) >= 2


def test_geometric_lens() -> None:
    lens = harness.geometric_lens(16, 1024, 131072)
    assert (lens[0], lens[-1], len(lens)) == (131072, 1024, 16)
    ratios = [b / a for a, b in itertools.pairwise(lens)]
    assert max(ratios) - min(ratios) < 1e-3


def small_problem(
    layout: str = "HND", kv_lens: list[int] | None = None, dtype: torch.dtype = torch.float32, kv_len: int = 48
) -> harness.Problem:
    return harness.make_problem(
        3,
        kv_len,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=64,
        dtype=dtype,
        layout=layout,
        kv_lens=kv_lens,
        device="cpu",
    )


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_lens", [None, [48, 33, 5]])
def test_the_oracle_accepts_the_result_and_refuses_a_wrong_one(layout: str, kv_lens: list[int] | None) -> None:
    problem = small_problem(layout, kv_lens)
    q, k, v = problem.sets[0]
    oracle = harness.Oracle(problem, q, k, v)
    out, _ = santa.decode(q, k, v, kv_lens=problem.kv_lens, kv_layout=layout, num_samples=0)
    assert oracle.error(out) < 1e-5 < oracle.bound(0)
    for row in (0, 2):
        wrong = out.clone()
        wrong[row] *= 1.05
        assert oracle.error(wrong) > oracle.bound(0)
    wrong = out.clone()
    wrong[1, 0, 0] = float("nan")
    assert not oracle.error(wrong) < float("inf")
    sampled, _ = santa.decode(
        q, k, v, kv_lens=problem.kv_lens, kv_layout=layout, num_samples=8, sampler="multinomial", min_sampled_len=0
    )
    assert oracle.bound(0) < oracle.error(sampled) < oracle.bound(8)
    assert oracle.bound(8, min_sampled_len=49) == oracle.bound(0)


def test_the_oracle_scales_8_bit_values() -> None:
    problem = small_problem()
    setting = bench_decode.Setting(0, storage="KV fp8")
    (q, k8, v8), (_, k, v) = setting.sets(problem)[0], problem.sets[0]
    assert k8.dtype == v8.dtype == torch.float8_e4m3fn
    scales = {"k_scale": bench_decode.K_SCALE, "v_scale": bench_decode.V_SCALE}
    oracle = harness.Oracle(problem, q, k8, v8, **scales)
    dense, _ = santa.decode(
        q, k8.float() * scales["k_scale"], v8.float() * scales["v_scale"], kv_layout="HND", num_samples=0
    )
    assert oracle.error(dense) < 1e-5
    unquantised, _ = santa.decode(q, k, v, kv_layout="HND", num_samples=0)
    assert oracle.error(unquantised) > 1e-3
    options = setting.options(problem)
    assert options["k_scale"].shape == options["v_scale"].shape == (2,)
    assert "v_scale" not in bench_decode.Setting(0, storage="K fp8").options(problem)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_lens", [None, [48, 33, 5]])
def test_pages_hold_the_rows(layout: str, kv_lens: list[int] | None) -> None:
    """Attention through FlashInfer's page table finds the keys of each row, in order."""
    problem = small_problem(layout, kv_lens)
    _, k, _ = problem.sets[0]
    pages = competitors.to_pages(k, layout, problem.row_lens)
    indptr, indices, last_page_len = competitors.page_table(problem.row_lens)
    assert len(indices) == len(pages)
    for b, length in enumerate(problem.row_lens):
        row = pages[indices[indptr[b] : indptr[b + 1]].long()].flatten(0, 1)
        assert (indptr[b + 1] - indptr[b] - 1) * competitors.PAGE_SIZE + last_page_len[b] == length
        assert torch.equal(row[:length], competitors.as_nhd(k, layout)[b, :length])


@pytest.mark.parametrize("page_size", [16, 64])
def test_the_block_table_lists_the_pages_of_each_row(page_size: int) -> None:
    problem = small_problem("NHD", [48, 33, 5])
    _, k, _ = problem.sets[0]
    pages = competitors.to_pages(k, "NHD", problem.row_lens, page_size)
    table = competitors.block_table(problem.row_lens, page_size)
    assert table.dtype == torch.int32 and table.shape == (3, -(-48 // page_size))
    for b, length in enumerate(problem.row_lens):
        assert torch.equal(pages[table[b].long()].flatten(0, 1)[:length], k[b, :length])


class FakeXqa:
    """flashinfer.xqa.xqa by its documentation: attention through the page table, in float32, into `output`."""

    def __init__(self) -> None:
        self.buffers: set[tuple[int, int]] = set()

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        output: torch.Tensor,
        workspace_buffer: torch.Tensor,
        semaphores: torch.Tensor,
        num_kv_heads: int,
        page_size: int,
        *,
        kv_layout: str,
    ) -> None:
        batch, beams, _, head_dim = q.shape
        assert beams == 1 and output.shape == q.shape and output.dtype == q.dtype
        assert k_cache.shape == v_cache.shape == (len(k_cache), num_kv_heads, page_size, head_dim)
        assert kv_layout == "HND" and page_size in (16, 32, 64, 128)
        assert k_cache.is_contiguous() and v_cache.is_contiguous()
        assert k_cache.dtype == v_cache.dtype and k_cache.dtype in (q.dtype, torch.float8_e4m3fn)
        assert page_table.dtype == torch.int32 and len(page_table) == batch
        assert seq_lens.dtype == torch.uint32 and seq_lens.shape == (batch, 1)
        assert workspace_buffer.dtype == torch.uint8 and semaphores.dtype == torch.uint32
        assert not semaphores.view(torch.int32).any()
        self.buffers.add((workspace_buffer.data_ptr(), semaphores.data_ptr()))
        for b, length in enumerate(seq_lens.view(torch.int32).flatten().tolist()):
            k, v = (
                x[page_table[b].long()].float().transpose(0, 1).flatten(1, 2)[:, :length] for x in (k_cache, v_cache)
            )
            heads = q[b, 0].float().unflatten(0, (num_kv_heads, -1))
            p = (heads @ k.mT * head_dim**-0.5).softmax(-1)
            output[b, 0] = (p @ v).flatten(0, 1).to(output.dtype)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_lens", [None, [150, 64, 5]])
@pytest.mark.parametrize("name", ["xqa", "xqa-fp8"])
def test_xqa_is_called_as_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, layout: str, kv_lens: list[int] | None, name: str
) -> None:
    xqa = FakeXqa()
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__="0.6.6", xqa=xqa))
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", SimpleNamespace(xqa=xqa))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (competitor,), missing = competitors.load([name], None)
    assert not missing and competitor.compiles and competitor.version == "0.6.6"
    for dtype in (torch.bfloat16, torch.float16):
        problem = small_problem(layout, kv_lens, dtype, kv_len=150 if kv_lens else 128)
        calls = competitor.calls(problem)
        competitor.semaphores[0] = 3  # of a launch that failed
        calls = competitor.calls(problem)
        assert len(calls) == len(problem.sets)
        for call, (q, k, v) in zip(calls, problem.sets, strict=True):
            storage = competitor.storage or dtype
            oracle = harness.Oracle(problem, q, k.to(storage), v.to(storage))
            out = call()
            assert out.shape == q.shape and out.dtype == dtype
            assert oracle.error(out) < harness.ROUNDING <= competitor.tolerance
    assert len(xqa.buffers) == 1  # shared by all calls
    with pytest.raises(competitors.Unsupported, match="float32"):
        competitor.calls(small_problem(layout, kv_lens, kv_len=150))


def test_what_compiles_for_each_shape_is_left_out_of_the_variants() -> None:
    kinds = (competitors.FlashInfer, competitors.FlashInferFp8, competitors.FlashInferXqa, competitors.FlashInferXqaFp8)
    assert all(kind.compiles for kind in kinds)
    assert not competitors.Sdpa.compiles and not competitors.FlashAttention3.compiles


def test_sdpa_agrees_with_the_oracle_and_refuses_lengths() -> None:
    problem = small_problem("NHD")
    oracle = harness.Oracle(problem, *problem.sets[0])
    assert oracle.error(competitors.Sdpa().calls(problem)[0]()) < 1e-5
    with pytest.raises(competitors.Unsupported):
        competitors.Sdpa().calls(small_problem("NHD", [48, 33, 5]))


def test_a_competitor_that_cannot_load_is_named_with_its_reason(tmp_path: Path) -> None:
    loaded, missing = competitors.load(["sdpa", "fa3"], tmp_path)
    assert [c.name for c in loaded] == ["torch SDPA"]
    assert "does not exist" in missing["fa3"]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_the_stream_of_mixed_lengths_covers_the_valid_part(layout: str) -> None:
    lens = [48, 0, 5]
    problem = small_problem(layout, lens)
    _, k, _ = problem.sets[0]
    touched = torch.zeros_like(k.flatten(), dtype=torch.bool)
    spans = k_stream.kv_spans(k, layout, lens)
    for start, size in spans:
        assert start % k_stream.UNIT == size % k_stream.UNIT == 0
        assert not touched[start // 4 : (start + size) // 4].any()
        touched[start // 4 : (start + size) // 4] = True
    rows = competitors.as_nhd(touched.reshape(k.shape), layout)
    for b, length in enumerate(lens):
        assert rows[b, :length].all()
        assert not rows[b, length:].any()
    assert sum(size for _, size in spans) == problem.k_bytes
    table = k_stream.descriptors(spans, 1 << 40)
    assert table[-1, 1] * k_stream.UNIT == problem.k_bytes
    assert table[0, 0] == (1 << 40) + spans[0][0]


def test_the_stream_compiles(tmp_path: Path) -> None:
    if k_stream.find_nvcc() is None:
        pytest.skip("needs nvcc")
    library = k_stream.build((9, 0), tmp_path)
    assert library == k_stream.build((9, 0), tmp_path)
    symbols = library.read_bytes()
    assert all(name in symbols for name in (b"k_stream_read\0", b"k_stream_read_spans\0", b"k_stream_error\0"))


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NCU = {
    "ID": ("", "0", "1"),
    "Process ID": ("", "7", "7"),
    "Kernel Name": (
        "",
        "void santa::cuda::<unnamed>::score_tiles<__nv_bfloat16, 128>(santa::DecodeParams)",
        "santa::bench::read_only(const uint4 *, long, unsigned int *)",
    ),
    "gpu__time_duration.sum": ("ns", "71,600", "62,000"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "81.25", "92.50"),
    "dram__bytes_read.sum": ("byte", "281,000,000", "268,435,456"),
    "dram__bytes_write.sum": ("byte", "3,000,000", "1,024"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.9", "99.0"),
    "launch__registers_per_thread": ("register/thread", "168", "18"),
    "launch__shared_mem_per_block_static": ("byte/block", "1,024", "0"),
    "launch__shared_mem_per_block_dynamic": ("byte/block", "204,800", "0"),
    "launch__grid_size": ("", "132", "1,056"),
    "launch__block_size": ("", "512", "256"),
    STALLED.format("long_scoreboard"): ("inst", "4.5", "30"),
    STALLED.format("barrier"): ("inst", "0.5", "n/a"),
    STALLED.format("short_scoreboard"): ("inst", "2.25", "0"),
    STALLED.format("wait"): ("inst", "1.5", "1"),
    STALLED.format("selected"): ("inst", "9", "1"),
}


def ncu_table() -> str:
    lines = [",".join(f'"{cell}"' for cell in line) for line in [NCU, *zip(*NCU.values(), strict=True)]]
    return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected from process 7"])


def test_ncu_table_is_read() -> None:
    kernels = profile_decode.parse(ncu_table())
    assert [profile_decode.short_name(kernel) for kernel in kernels] == ["score_tiles", "read_only"]
    assert profile_decode.number(kernels[0], "gpu__time_duration.sum") == 71600
    assert profile_decode.stalls(kernels[0]) == "long_scoreboard 4.5, short_scoreboard 2.2, wait 1.5"
    assert profile_decode.stalls(kernels[1]) == "long_scoreboard 30.0, wait 1.0"
    lines = profile_decode.summary(kernels, 268435456)
    assert lines[1].split()[:12] == [
        *("score_tiles", "71.6", "81.2", "3925", "281.0", "3.0", "1.047"),
        *("24.9", "168", "201.0", "132", "512"),
    ]
    assert lines[-1].startswith("1 kernels of one call: 71.6 us") and "(1.047 of K's 268.4 MB)" in lines[-1]


def test_a_metric_that_ncu_lacks_is_nan() -> None:
    (kernel, _) = profile_decode.parse(ncu_table())
    del kernel["dram__bytes_write.sum"]
    assert "nan" in profile_decode.summary([kernel], 1)[1]
    assert profile_decode.parse("==ERROR== nothing") == []


def test_ncu_that_refuses_is_explained(tmp_path: Path) -> None:
    fake = tmp_path / "ncu"
    fake.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit, match="may not read the hardware counters"):
        profile_decode.run(str(fake), ["true"], "all")
    with pytest.raises(SystemExit, match="install Nsight Compute"):
        profile_decode.find_ncu(str(tmp_path / "absent"))


def test_ncu_is_asked_for_the_log_that_is_read(tmp_path: Path) -> None:
    fake, table = tmp_path / "ncu", tmp_path / "table.csv"
    table.write_text(ncu_table())
    fake.write_text(f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp {table} "$2"\necho noise\n')
    fake.chmod(0o755)
    assert len(profile_decode.parse(profile_decode.run(str(fake), ["true"], "all"))) == 2


def test_roofline_arithmetic() -> None:
    k_bytes = 32768 * 2048
    rows = case(
        "table", "1x32768", {"torch SDPA": ("dense", 40.0), "santa grouped S=128": ("santa", 25.0)}, k_bytes=k_bytes
    )
    # At 4,000 of 5,000 GB/s, K alone takes k_bytes / 4e6 us.
    rows += case("table", "16x32768", {"K stream": ("stream", 16 * k_bytes / 4e6)}, k_bytes=16 * k_bytes)
    target = roofline.Gpu("half as fast", 2500.0, 100, 1)
    (prediction,) = roofline.predict(rows, 5000.0, target)
    moved = k_bytes + 8 * 400 * 128 * 2
    assert prediction.dense_us == pytest.approx(2 * k_bytes / 2e6 + 40 - 2 * k_bytes / 4e6)
    assert prediction.santa_us == pytest.approx(moved / 2e6 + 25 - moved / 4e6)
    (doubled,) = roofline.predict(rows, 5000.0, target, overheads=2.0)
    assert doubled.santa_us - prediction.santa_us == pytest.approx(25 - moved / 4e6)
    (scratch,) = roofline.predict(rows, 5000.0, target, workspace_bytes=1e6)
    assert scratch.santa_us == pytest.approx(prediction.santa_us + 1e6 / 2e6 - 1e6 / 4e6)
    with pytest.raises(ValueError, match="no K stream"):
        roofline.predict(rows[:-1], 5000.0, target)


def test_roofline_prints_that_it_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"environment": {"device": "NVIDIA H200"}, "rows": case("table", "1x32768", MEASURED)}
    (tmp_path / "decode.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(tmp_path / "decode.json")])
    roofline.main()
    text = capsys.readouterr().out
    assert text.startswith("Predicted, not measured: RTX 6000 Ada")
    assert "1.50x" in text and "santa grouped S=128" in text


def test_the_benchmark_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "decode.json"
    options = "--shapes 1x64 1x8192 --num-qo-heads 2 --num-kv-heads 1 --head-dim 64 --samples 16 --targets"
    monkeypatch.setattr(harness, "CPU_CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(
        sys, "argv", ["bench_decode.py", "--device", "cpu", "--dtype", "float32", "--json", str(path), *options.split()]
    )
    bench_decode.main()
    assert "not run: 1x8192" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows[4:]] == [
        "torch SDPA",
        "santa exact",
        "santa grouped S=16",
        "santa systematic S=16",
    ]
    assert all(row["us"] > 0 and row["error"] >= 0 and "note" not in row for row in rows)
    assert rows[3]["v_rows"] == 64 and 0 < rows[7]["v_rows"] < 64
    assert rows[6]["speedup"] == rows[4]["us"] / rows[6]["us"]


def test_the_other_modes_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decode.json"
    for name, value in {"MIXED_SHAPE": "3x96", "MIXED_SHORTEST": 8, "VARIANT_SHAPE": "1x32"}.items():
        monkeypatch.setattr(targets, name, value)
    monkeypatch.setattr(harness, "CPU_CACHE_BYTES", 0)
    monkeypatch.setattr(bench_decode, "time_cpu_us", lambda calls: float(len([call() for call in calls])))
    options = "--device cpu --variants --mixed --samples 128 --samplers grouped --targets --json"
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *options.split(), str(path)])
    bench_decode.main()
    text = capsys.readouterr().out
    assert "not run: it takes no lengths" in text  # SDPA
    assert "not measured: FlashInfer has no figure" in text
    rows = json.loads(path.read_text())["rows"]
    assert sum(row["kind"] == "santa" for row in rows) == 2 * 8 + 2
    assert all("us" in row for row in rows if row["kind"] == "santa")
    assert rows[-1]["k_bytes"] == sum(harness.geometric_lens(3, 8, 96)) * 2048
    assert len(report.variant_lines(rows)) == 10
