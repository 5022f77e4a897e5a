"""Joint cuts of student and teacher, against every cut that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe.balance import Chain, joint_cut


def all_sizes(count: int, stages: int) -> list[list[int]]:
    edges = [(0, *cut, count) for cut in itertools.combinations(range(1, count), stages - 1)]
    return [[b - a for a, b in itertools.pairwise(edge)] for edge in edges]


def stage_costs(chain: Chain, sizes: Sequence[int]) -> list[float]:
    """Seconds of each stage, the messages of its two ends included."""
    ends = list(itertools.accumulate(sizes, initial=0))
    edge = [0.0, *chain.edge[1:], 0.0] if chain.edge else [0.0] * (len(chain.seconds) + 1)
    return [sum(chain.seconds[a:b]) + edge[a] + edge[b] for a, b in itertools.pairwise(ends)]


def memory(student: Chain, teacher: Chain, sizes: Sequence[Sequence[int]], in_flight: Sequence[int]) -> list[float]:
    result = [0.0] * len(in_flight)
    for chain, of in zip((student, teacher), sizes, strict=True):
        for stage, (a, b) in enumerate(itertools.pairwise(itertools.accumulate(of, initial=0))):
            result[stage] += sum(chain.weights[a:b])
            if chain.passed:  # one microbatch at a time is there as a whole
                result[stage] += sum(chain.held[a:b]) + in_flight[stage] * (chain.passed[a] + chain.passed[b])
            else:
                result[stage] += in_flight[stage] * sum(chain.held[a:b])
    return result


def slowest(student: Chain, teacher: Chain, sizes: Sequence[Sequence[int]]) -> float:
    pairs = zip(stage_costs(student, sizes[0]), stage_costs(teacher, sizes[1]), strict=True)
    return max(one + other for one, other in pairs)


@st.composite
def chains(draw: st.DrawFn, held: bool) -> Chain:
    count = draw(st.integers(3, 7))
    column = st.lists(st.floats(0, 10), min_size=count, max_size=count)
    edge = draw(st.lists(st.one_of(st.floats(0, 5), st.just(math.inf)), min_size=count, max_size=count))
    passed = st.lists(st.floats(0, 10), min_size=count + 1, max_size=count + 1)
    kept = draw(st.one_of(passed, st.just(()))) if held else ()
    return Chain(draw(column), edge, draw(column), draw(column) if held else [0.0] * count, kept)


@given(chains(True), chains(False), st.integers(1, 3), st.floats(5, 60), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_joint_cut_is_the_best_of_all(
    student: Chain, teacher: Chain, stages: int, limit: float, bounded: bool
) -> None:
    in_flight = list(range(stages, 0, -1))
    if not bounded:
        limit = math.inf
    pairs = itertools.product(all_sizes(len(student.seconds), stages), all_sizes(len(teacher.seconds), stages))
    fitting = [pair for pair in pairs if max(memory(student, teacher, pair, in_flight)) <= limit]
    best = min((slowest(student, teacher, pair) for pair in fitting), default=math.inf)
    if best == math.inf:
        with pytest.raises(ValueError, match="nothing keeps the limit"):
            joint_cut(student, teacher, stages, limit, in_flight)
        return
    leaner = joint_cut(student, teacher, stages, limit, in_flight, spare=0.2)
    found = joint_cut(student, teacher, stages, limit, in_flight)
    near = [pair for pair in fitting if slowest(student, teacher, pair) <= best * 1.2 + 1e-9]
    least, now = (min(max(memory(student, teacher, pair, in_flight)) for pair in pairs) for pairs in (near, [found]))
    assert slowest(student, teacher, leaner) <= best * 1.2 + 1e-9
    wanted = least if least < 0.8 * now else now
    assert max(memory(student, teacher, leaner, in_flight)) == pytest.approx(wanted)
    assert [sum(sizes) for sizes in found] == [len(student.seconds), len(teacher.seconds)]
    assert min(map(min, found)) >= 1
    assert max(memory(student, teacher, found, in_flight)) <= limit + 1e-9
    assert slowest(student, teacher, found) == pytest.approx(best)


def test_a_cut_of_one_network_makes_up_for_the_other() -> None:
    """The student can be cut 1:3 only; the teacher evens that out, which no cut of each by itself does."""
    student, teacher = Chain([3, 1], [0, 0]), Chain([1] * 8, [0] * 8)
    assert joint_cut(student, teacher, 2) == ([1, 1], [3, 5])


def test_many_layers_are_cut_nearly_as_well_as_few() -> None:
    """Beyond 96 layers neighbours are joined, the cheapest first."""
    seconds = [1 + (7 * n % 13) / 13 for n in range(300)]
    student, teacher = Chain(seconds, [0] * 300), Chain(seconds[::-1], [0] * 300)
    sizes = joint_cut(student, teacher, 4)
    assert slowest(student, teacher, sizes) < 1.01 * 2 * sum(seconds) / 4


def test_many_layers_that_recompute_keep_the_limit() -> None:
    """Joined neighbours pass on what the ends of the joint layer do: here every second place is a narrow one."""
    passed = [1.0 if n % 2 == 0 else 50.0 for n in range(301)]
    student = Chain([1.0] * 300, [0.0] * 300, [1.0] * 300, [1.0] * 300, passed)
    teacher, in_flight = Chain([1.0] * 4), [4, 3, 2, 1]
    sizes = joint_cut(student, teacher, 4, 158, in_flight)  # 75 layers twice, and two narrow ends four times
    assert max(memory(student, teacher, sizes, in_flight)) <= 158
    with pytest.raises(ValueError, match="nothing keeps the limit"):
        joint_cut(student, teacher, 4, 140, in_flight)
