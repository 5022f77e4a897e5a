"""The header and the cut of a batch."""

import pickle

import pytest
import torch

from lightning_tspipe.data import make_batch

X, Y = torch.randn(7, 3), torch.arange(7)


def test_sizes_views_and_stand_in() -> None:
    """Seven rows in three parts are 3, 2, 2; a header survives pickling; its stand-in has shapes and no memory."""
    batch = make_batch(4, [X, Y], [X, X[:, :2]], X, Y, 3, True)
    assert batch.info.sizes == (3, 2, 2)
    assert [view.shape for view in batch.student[1]] == [(2, 3), (2, 2)]
    assert [len(views) for views in batch.teacher] == [1, 1, 1]
    info = pickle.loads(pickle.dumps(batch.info))
    assert info == batch.info
    assert info.student.is_list
    assert not info.teacher.is_list
    assert info.key("student", 1) == info.key("student", 2) != info.key("student", 0)
    assert info.key("student", 1) != info.key("teacher", 1)
    stand_in = info.stand_in()
    assert [leaf.shape for leaf in stand_in] == [X.shape, Y.shape]
    assert all(leaf.is_meta for leaf in stand_in)


def test_a_short_batch() -> None:
    """A number that the user gave is kept or refused; an automatic one shrinks."""
    with pytest.raises(ValueError, match=r"7 row\(s\) cannot be cut into microbatches=8.*drop_last=True"):
        make_batch(0, X, X, X, None, 8, True)
    assert make_batch(0, X, X, X, None, 8, False).info.sizes == (1,) * 7


def test_the_teacher_is_cut_into_other_microbatches() -> None:
    """Into parts of the student's or into several of them; a batch that is too short for both into as many."""
    for wanted, student, teacher in (
        ((3, 6), (3, 2, 2), (2, 1, 1, 1, 1, 1)),
        ((4, 2), (2, 2, 2, 1), (4, 3)),
        ((2, 8), (4, 3), (4, 3)),
        ((8, 2), (1,) * 7, (1,) * 7),
    ):
        batch = make_batch(0, X, X, [X, X], Y, wanted[0], False, wanted[1])
        info = batch.info
        assert (info.sizes, info.teacher_sizes) == (student, teacher)
        assert (info.microbatches, info.teacher_microbatches) == (len(student), len(teacher))
        assert [tuple(view.shape[0] for view in views) for views in batch.teacher] == [(rows,) * 2 for rows in teacher]
        assert [len(views[0]) for views in batch.student] == list(student)
        assert info.rows("teacher", 1) == teacher[1]
    with pytest.raises(ValueError, match=r"7 row\(s\) cannot be cut into teacher_microbatches=8.*drop_last=True"):
        make_batch(0, X, X, X, None, 2, True, 8, True)


@pytest.mark.parametrize("value", ["text", {"a": 1}, torch.tensor(1.0), []])
def test_a_batch_without_a_tensor(value: object) -> None:
    """The hook that returned it is named."""
    with pytest.raises(ValueError, match=r"student_input\(batch\) has no tensor"):
        make_batch(0, value, value, value, None, 1, True)


def test_rows_that_differ() -> None:
    """Views, and both networks, see the same samples."""
    with pytest.raises(ValueError, match=r"have \[5, 7\] rows"):
        make_batch(0, X, [X, X[:5]], X, None, 1, True)
    with pytest.raises(ValueError, match=r"student_input\(batch\) has 7 rows and teacher_input\(batch\) has 5"):
        make_batch(0, X, X, X[:5], None, 1, True)
