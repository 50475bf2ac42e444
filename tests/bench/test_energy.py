"""The energy benchmark without a GPU: its estimate, its reading of a counter, and what it would measure."""

from __future__ import annotations

import itertools
import json

import energy
import harness
import pytest
import torch


def test_dense_work_is_two_products_for_each_head_key_and_feature():
    work = energy.dense_stage(1000, 4, 64) + energy.dense_stage(1000, 4, 64)
    assert work == energy.Work(512_000, 512_000, 2 * 1000 * 64 * 2)
    assert work * 3 == energy.Work(3 * 512_000, 3 * 512_000, 3 * 256_000)
    assert work.arithmetic_mj == pytest.approx(512_000 * (1.1 + 0.9) * 1e-9)
    assert work.dram_mj == pytest.approx(256_000 * 1300 / 8 * 1e-9)


def test_counted_values_multiply_only_to_divide_by_s():
    assert energy.counted_value_stage(10_000, 4, 64, 32) == energy.Work(4 * 64, 4 * 32 * 64, 128 * 64 * 2)
    assert energy.grouped_value_stage(10_000, 4, 64, 32) == energy.Work(4 * 128 * 64, 4 * 128 * 64, 128 * 64 * 2)
    # No more rows are read than there are.
    assert energy.counted_value_stage(100, 4, 64, 32).dram_bytes == 100 * 64 * 2


def test_bernoulli_scores_multiply_once_for_each_score():
    work = energy.bernoulli_score_stage(1000, 4, 64, num_draws=3, mean_probability=0.25, features_read=0.5)
    assert work == energy.Work(4 * 1000, 4 * 1000 * 3 * 16, 64_000)


def test_shares_of_gaussian_queries_are_those_of_drawn_ones():
    """Against drawing them: 2,000 groups of 4 heads, with a standard error of the mean below 0.001."""
    shares = energy.gaussian_query_shares(4, 64, 2)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2000, 4, 64, generator=generator).abs()
    p = q / q.amax(-1, keepdim=True)
    own = torch.rand(2, *p.shape, generator=generator) < p
    common = torch.rand(2, len(p), 1, 64, generator=generator) < p
    assert abs(float(own.double().mean()) - shares["entries"]) < 0.005
    assert abs(float(own.any(0).any(1).double().mean()) - shares["independent"]) < 0.005
    assert abs(float(common.any(0).any(1).double().mean()) - shares["shared"]) < 0.005
    assert shares["shared"] < shares["independent"]


def test_energy_is_taken_between_steps_of_the_counter():
    """A counter that moves every 0.1 s under 100 W, read every 0.03 s, 6 calls in between."""
    found = [
        energy.Reading(0.03 * i, 100_000 * int(0.3 * i + 1e-9) // 10, 6 * i)
        for i in range(1, 101)  # 3 s
    ]
    measured = energy.between_steps(found)
    assert measured.us == pytest.approx(0.03 / 6 * 1e6)
    # Both ends are found within one reading: 0.03 of 2.9 seconds.
    assert measured.watts == pytest.approx(100, rel=0.011)
    assert measured.mj == pytest.approx(100 * 0.03 / 6 * 1e3, rel=0.011)


def test_a_counter_that_hardly_moves_is_no_measurement():
    with pytest.raises(RuntimeError, match="moved 4 times, expected 5 or more"):
        energy.between_steps([energy.Reading(float(i), i // 20, i) for i in range(1, 100)])


def test_the_next_calls_are_queued_before_the_last_are_waited_for():
    log: list[str] = []
    names, times = itertools.count(), itertools.count(0.0, 1.0)

    def launch():
        name = next(names)
        log.append(f"launch {name}")
        return lambda: log.append(f"wait {name}")

    found = energy.readings(launch, 5, lambda: 7, seconds=4.0, clock=lambda: next(times))
    assert log[:4] == ["launch 0", "launch 1", "wait 0", "launch 2"]
    assert [x for x in log if x.startswith("wait")] == [f"wait {i}" for i in range(len(found) + 1)]
    assert [reading.calls for reading in found] == [5 * (i + 1) for i in range(len(found))]
    assert all(reading.millijoules == 7 for reading in found)


def test_a_machine_without_nvml_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match=r"libnone\.so of the NVIDIA driver does not load"):
        energy.EnergyMeter("GPU-0", "libnone.so")


def test_everything_that_would_be_measured_passes_its_check():
    problem = harness.make_problem(2, 700, num_qo_heads=8, num_kv_heads=2, head_dim=64, device="cpu")
    problem = harness.Problem(**vars(problem) | {"sets": problem.sets[:1]})
    found = list(energy.methods(problem, 64, 4, ["independent", "systematic", "shared"]))
    assert [m.name for m in found][:4] == ["torch SDPA", "santa exact", "santa S=64", "santa S=64, K fp8"]
    for method in found:
        assert method.error < method.bound, method
    dense, exact, sampled, fp8, *bernoulli = found
    assert (dense.k_read, dense.v_read, exact.k_read, exact.v_read) == (1, 1, 1, 1)
    assert fp8.k_read == 0.5 and 0 < sampled.v_read < 1
    independent, _, shared = (method.k_read for method in bernoulli)
    assert shared < independent <= 1
    # The check of Bernoulli scores would not pass for the queries themselves.
    exactly = harness.Oracle(problem, *problem.sets[0])
    assert exactly.error(bernoulli[0].calls[0]()) > bernoulli[0].bound


def test_ratios_are_to_dense_attention():
    rows = [{"what": name, "us": 10.0, "mj": mj, "watts": 500.0, "k_read": 1.0, "v_read": 0.015} for name, mj in
            (("torch SDPA", 50.0), ("santa S=64", 20.0))]  # fmt: skip
    assert energy.measured_line(rows[1], rows) == "| santa S=64 | 10.0 | 20.0 | 0.40 | 500 | 100.0% | 1.5% |"
    assert "| 20.0 |  | 500 |" in energy.measured_line(rows[1], rows[1:])
    assert {x.count("|") for x in energy.MEASURED_HEAD.splitlines()} == {energy.measured_line(rows[0], rows).count("|")}


def test_program_without_a_gpu(tmp_path, capsys, monkeypatch):
    assert energy.main(["--estimate", "--json", str(tmp_path / "energy.json")]) == 0
    out = capsys.readouterr().out
    assert "An estimate, not a measurement" in out and "| dense |" in out
    content = json.loads((tmp_path / "energy.json").read_text())
    assert content["measured"] == [] and content["estimate"]["dense"]["dram_bytes"] == 2 * 16 * 32768 * 8 * 128 * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.main([]) == 1
    assert "--estimate needs none" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_counter_moves_under_load():
    meter = energy.EnergyMeter("GPU-" + str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-"))
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    measured = energy.measure([lambda: x @ x], meter, 3.0)
    assert 20 < measured.watts < 2000 and measured.mj == pytest.approx(measured.watts * measured.us / 1e3)
