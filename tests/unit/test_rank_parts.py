"""How work is divided among ranks, and sums that do not depend on their number; test_ranks.py has real processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.errors import ConfigError, RankError
from pocketllm.ranks import SOLO, Ranks, joined, launched


def test_the_most_expensive_jobs_are_given_away_first() -> None:
    assert Ranks(0, 2).split([1, 5, 2, 3]) == [0, 0, 1, 1]
    assert Ranks(0, 3).split([2, 2]) == [0, 1]
    assert Ranks(0, 4).split([]) == []


@given(st.lists(st.integers(0, 9)), st.integers(1, 6))
def test_every_job_is_done_once(costs: list[int], size: int) -> None:
    shares = [Ranks(rank, size).mine(range(len(costs)), lambda n: costs[n]) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: got 'x', wanted a number from 1; launch with torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: got '2', wanted a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT: got 'nothing'"),
    ],
)
def test_variables_that_no_launcher_sets(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        launched()


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined() as ranks:
        assert ranks is SOLO
    assert ranks.map([lambda: 1, lambda: 2], [1, 1]) == [1, 2] and ranks.from_first(lambda: 3) == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launched() == (3, 4)


def test_an_exchange_that_breaks_off() -> None:
    with (
        pytest.raises(RankError, match=r"the connection to the other ranks broke off \(reset\)"),
        Ranks(0, 2)._exchange(),
    ):
        raise RuntimeError("reset")


def test_sums_of_one_process() -> None:
    sums, x = WindowSums(), torch.randn(5, 3).bfloat16().float()  # no sum rounds it
    for part in x.split(2):
        sums.add_square("a", part)
        sums.share("b", "a")
        sums.add_value("rows", part.sum())
        sums.add_item("parts", part)
        sums.end_round()
    shared = sums.shared()
    assert torch.allclose(shared["a"], x.T @ x, atol=1e-5) and shared["b"] is shared["a"]
    assert sums.rows == {"a": 5, "b": 5} and len(sums.items["parts"]) == 3
    assert float(sums.values["rows"]) == pytest.approx(float(x.sum()), abs=1e-5)
