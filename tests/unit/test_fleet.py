"""The simulated fleet obeys queueing theory, and loses no request."""

import statistics

import pytest
from fleet import POLICIES, Machine, Scenario, Simulation, Work

ONE_BY_ONE = Machine(per_token=0.001, budget=10**9, rows=1)
BATCHING = Machine(per_token=3e-5, weights=0.006, overhead=0.003, kv=100_000)
WORKS = [Work(100), Work(200), Work(400), Work(150, passes=40)]


@pytest.mark.parametrize(("use", "tokens"), [(0.5, (10,)), (0.8, (10,)), (0.5, (2, 2, 2, 34))])
def test_the_mean_wait_before_one_server_is_that_of_pollaczek_and_khinchine(
    use: float, tokens: tuple[int, ...]
) -> None:
    times = [size * ONE_BY_ONE.per_token for size in tokens]
    mean, square = statistics.mean(times), statistics.mean(time**2 for time in times)
    rate = use / mean
    result = Simulation(ONE_BY_ONE, [Work(size) for size in tokens], Scenario(rate, 1, again=0.0, seconds=150)).run()
    wait = statistics.mean(result.latencies) - mean
    assert wait == pytest.approx(rate * square / (2 * (1 - use)), rel=0.1)
    assert result.use == pytest.approx(use, rel=0.05)


def test_an_answer_that_is_written_alone_takes_a_step_for_its_prompt_and_one_for_each_pass() -> None:
    result = Simulation(BATCHING, [Work(150, passes=40)], Scenario(0.5, 1, again=0.0, seconds=40)).run()
    alone = BATCHING.step(150, 0, 0) + 40 * BATCHING.step(0, 1, 150)
    assert result.percentile(0.5) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("event", ["", "drains", "dies"])
def test_every_request_ends_once_whatever_happens_to_a_server(policy: str, event: str) -> None:
    result = Simulation(BATCHING, WORKS, Scenario(200, 3, policy, burst=2.0, routers=4, event=event, seconds=4)).run()
    assert len(result.latencies) == pytest.approx(800, rel=0.2)
    assert min(result.latencies) > 0
    assert (result.resent > 0) == (event == "dies")
    assert (max(result.latencies) > 1) == (event == "dies")


def test_prefix_affinity_finds_prompts_that_were_read_before() -> None:
    found = {
        policy: Simulation(BATCHING, WORKS, Scenario(400, 8, policy, again=0.3, seconds=4)).run().cached
        for policy in ("random", "least loaded, prefix affinity")
    }
    assert found["random"] < 0.1
    assert found["least loaded, prefix affinity"] > 0.25


def test_keys_and_values_bound_what_runs_together() -> None:
    tight, wide = (
        Simulation(Machine(1e-5, 0.005, kv=kv), [Work(100, passes=50)], Scenario(20, 1, again=0.0, seconds=10)).run()
        for kv in (160, 100_000)
    )
    assert tight.percentile(0.5) > 5 * wide.percentile(0.5)
