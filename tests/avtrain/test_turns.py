"""Processes that share one pass, agree on errors, and notice who ends: forked ones, on the host alone."""

import multiprocessing
import os
import signal
import socket

import pytest
import torch

from avtrain import ranks
from avtrain.errors import AvtrainError
from avtrain.turns import Turns, own


def _one_of(rank, count, port, work, results):
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                       "MASTER_ADDR": "127.0.0.1"})
    ranks.begin(torch.device("cpu"))
    try:
        result = work(rank)
    except (AvtrainError, OSError) as error:
        result = f"{type(error).__name__}: {error}"
    results.send(result)
    results.close()


def together(count, work):
    """What each of so many processes makes of `work(rank)`, or the error that it ends with; None of one that dies."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context, started = multiprocessing.get_context("fork"), []
    for rank in range(count):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_one_of, args=(rank, count, port, work, sending))
        process.start()
        sending.close()
        started.append((process, receiving))
    found = []
    for process, receiving in started:
        assert receiving.poll(30), "it hangs"
        try:
            found.append(receiving.recv())
        except EOFError:
            found.append(None)
        process.join(10)
    return found


@pytest.mark.parametrize("count", [7, pytest.param(6, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_items_come_to_the_first_in_order_each_made_by_one(count):
    def work(rank):
        made = []

        def mine():
            for number in own(range(count)):
                made.append(number)
                yield number, f"of {rank}"

        turns = Turns(mine(), count, lambda items: (number for number, _ in items)).mapped(lambda number: 10 * number)
        return turns.taken(list), made, ranks.by_first(lambda: f"told by {rank}")

    found = together(3, work)
    assert [taken for taken, _, _ in found] == [[10 * number for number in range(count)], None, None]
    assert [made for _, made, _ in found] == [[*range(rank, count, 3)] for rank in range(3)]
    assert {told for _, _, told in found} == {"told by 0"}


@pytest.mark.parametrize(("who", "at"), [(1, 5), *(pytest.param(*case, marks=pytest.mark.slow)
                                                   for case in ((0, 5), (0, 0), (1, 0)))])
def test_where_one_fails_all_end_and_can_go_on_to_something_else(who, at):
    def work(rank):
        def mine():
            for number in own(range(9)):
                if rank == who and number >= at:
                    raise AvtrainError("made up\nand more")
                yield number

        with pytest.raises(AvtrainError) as caught:
            Turns(mine(), 9).taken(list)
        return str(caught.value), ranks.by_first(lambda: "on")

    expected = [f"process {who} can't go on: made up"] * 3
    expected[who] = "made up\nand more"
    assert together(3, work) == [(text, "on") for text in expected]


@pytest.mark.parametrize("after", [4, pytest.param(0, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_where_the_first_can_not_take_them_all_end(after):
    def work(rank):
        def take(items):
            for number, _ in enumerate(items):
                if number == after:
                    raise OSError(28, "No space left on device", "file")
            if after == 9:
                raise OSError(28, "No space left on device", "file")

        with pytest.raises((AvtrainError, OSError)) as caught:
            Turns(own(range(9)), 9).taken(take)
        return type(caught.value).__name__, ranks.by_first(lambda: "on")

    assert together(2, work) == [("OSError", "on"), ("Elsewhere", "on")]


def test_who_waits_for_one_that_is_gone_says_so_in_a_line():
    def work(rank):
        ranks.agree()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.agree()

    found = together(2, work)
    assert found[1] is None and found[0].startswith("Gone: another process of this run has ended")
