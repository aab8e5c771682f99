"""Rows that branch, in C: every rule, against the chunk form of each branch behind its stem."""

import itertools

import pytest
import torch

from nested_lm.nn.state import map_tensors
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.state import MemoryInputs, check_branches
from tests.ops.memory_problems import OPTIONS, Problem, make_rule
from tests.ops.test_memory_cpu import SUPPORTED

TOLERANCE = 1e-10  # float64
SIZES = ([5, 3, 0, 9], [5, 1, 2, 2], [5, 17, 1, 0])  # of the stem and of the branches of each row


def cut_inputs(inputs, rows, places):
    return MemoryInputs(*(None if x is None else x[rows][:, places].contiguous() for x in inputs))


@pytest.mark.parametrize(
    ("chunk", "generators", "threads"), [(4, 4, 1), (4, 8, 1), (4, 8, 3), (8, 2, 1), (1, 1, 1), (64, 64, 1)]
)
@pytest.mark.parametrize("name", sorted(SUPPORTED))
@torch.no_grad()
def test_branches_are_read_as_if_alone(name, chunk, generators, threads):
    rule = make_rule(chunk, generators, **OPTIONS[name])
    branches = torch.tensor(SIZES).cumsum(1)
    problem = Problem(rule, batch=3, tokens=int(branches.max()) + 1, heads=2, width=5, hidden=3, seed=0)
    inputs, start, readout, state = problem.arguments()
    state = state._replace(border=map_tensors(state.border, lambda part: part * 0.5))
    rows = torch.tensor([1, 1, 0])
    before, options = torch.get_num_threads(), {"rule": rule, "position": 3, "resets": None}
    try:
        torch.set_num_threads(threads)
        given = branches.int().repeat_interleave(2, dim=1)[:, ::2]  # neither long nor contiguous
        found = memory_cpu.finish(inputs, start, readout, state, **options, rows=rows, branches=given)
    finally:
        torch.set_num_threads(before)
    for row, stream in enumerate(rows.tolist()):
        alone = map_tensors(state, lambda part, stream=stream: part[stream : stream + 1].contiguous())
        for begin, end in itertools.pairwise(branches[row].tolist()):
            places = [*range(5), *range(begin, end)]
            one = cut_inputs(inputs, slice(row, row + 1), places)
            expected = memory_chunked.self_modify(one, start, readout, alone, **options)
            for a, b in ((found.reads, expected.reads), (found.rate, expected.rate), (found.decay, expected.decay)):
                torch.testing.assert_close(a[row, places], b[0], rtol=TOLERANCE, atol=TOLERANCE)
        for output in (found.reads, found.rate, found.decay):
            assert (output[row, branches[row, -1] :] == 0).all()


@torch.no_grad()
def test_a_branch_that_is_not_finite_spoils_no_stem_and_no_other_row():
    rule = make_rule(8, 8)
    problem = Problem(rule, batch=2, tokens=12, heads=2, width=5, hidden=3, seed=0)
    inputs, start, readout, state = problem.arguments()
    inputs.key[0, 8] = float("nan")
    options = {"rule": rule, "position": 0, "resets": None, "rows": None}
    found = memory_cpu.finish(inputs, start, readout, state, **options, branches=torch.tensor([[4, 7, 9, 12]] * 2))
    assert torch.isfinite(found.reads[0, :4]).all()
    assert not torch.isfinite(found.reads[0, 8]).any()
    assert torch.isfinite(found.reads[1]).all()


@torch.no_grad()
def test_rows_whose_branches_are_all_empty_are_their_stem():
    rule = make_rule(4, 4)
    problem = Problem(rule, batch=2, tokens=6, heads=2, width=5, hidden=3, seed=0)
    inputs, start, readout, state = problem.arguments()
    options = {"rule": rule, "position": 0, "resets": None}
    found = memory_cpu.finish(
        inputs, start, readout, state, **options, rows=None, branches=torch.tensor([[6, 6, 6], [6, 6, 6]])
    )
    expected = memory_chunked.self_modify(inputs, start, readout, state, **options)
    torch.testing.assert_close(found.reads, expected.reads, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "branches",
    [[[0, 4]], [[5]], [[3, 2]], [[3, 99]], [[3, 6, 5]], [3, 6], [[3, 6], [3, 6]]],
    ids=["no stem", "no branch", "falling", "outside", "falling later", "no line", "another number of rows"],
)
def test_what_are_no_branches_is_refused(branches):
    with pytest.raises(ValueError, match="branch"):
        check_branches(torch.tensor(branches), 1, 9)
