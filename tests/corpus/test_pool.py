"""The pool of processes: order, how much it holds, and processes that die."""

import pytest

from rlhfjax.corpus import pool
from rlhfjax.errors import DataError
from tests.corpus.some_tasks import add, exit_at_once


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(DataError, match="a worker process died"):
        list(pool.ordered(exit_at_once, None, range(4), 1))


@pytest.mark.parametrize("workers, held", [(0, 1), (2, 4)])
def test_results_come_in_order_and_few_are_held(workers, held):
    begun = []

    def tasks():
        for i in range(20):
            begun.append(i)
            yield i

    results = pool.ordered(add, 100, tasks(), workers)
    assert next(results) == 100
    assert len(begun) == held
    assert [*results] == list(range(101, 120))
