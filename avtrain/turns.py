"""One pass over data that several processes share: each makes its part, and the first one takes all of it, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from avtrain import ranks
from avtrain.errors import AvtrainError

_Item = TypeVar("_Item")
_Other = TypeVar("_Other")
_Result = TypeVar("_Result")


def own(items: Iterable[_Item]) -> Iterator[_Item]:
    """Those that this process makes: every ranks-th, from the rank-th on."""
    return islice(items, ranks.rank(), None, ranks.ranks())


class Turns(Generic[_Item]):
    """Items that the processes make in turns. One process makes them all, and `iter` gives them.

    Args:
        mine: this process's: see `own`. None of them is None.
        count: how many all processes make.
        after: what becomes of all of them as they come, on the first process.
    """

    def __init__(self, mine: Iterable[Any], count: int = 0,
                 after: Callable[[Iterator[Any]], Iterator[_Item]] = iter) -> None:
        self._mine, self._count, self._after = mine, count, after

    def __iter__(self) -> Iterator[_Item]:
        return self._after(iter(self._mine))

    def mapped(self, change: Callable[[_Item], _Other]) -> Turns[_Other]:
        """The same, each item changed, by the first process."""
        return Turns(self._mine, self._count, lambda items: map(change, self._after(items)))

    def taken(self, take: Callable[[Iterator[_Item]], _Result]) -> _Result | None:
        """Hand all items over, in order and as they come, to `take` on the first process, which goes through them to
        their end; an item of each process is held.

        Returns:
            What `take` does; None on the other processes.

        Raises:
            AvtrainError, OSError: what this process's items or `take` raise; `Elsewhere` on the others.
        """
        if ranks.ranks() == 1:
            return take(iter(self))
        told = False

        def all_items() -> Iterator[Any]:
            nonlocal told
            supply = iter(self._mine)
            for _ in range(-(-self._count // ranks.ranks())):
                item, error = None, None
                try:
                    item = next(supply, None)
                except (AvtrainError, OSError) as failed:
                    error = failed
                told = True
                ranks.agree(error)
                told = False
                yield from (one for one in ranks.collected(item) if one is not None)

        if ranks.rank() > 0:
            for _ in all_items():
                pass
            ranks.agree()
            return None
        try:
            result = take(self._after(all_items()))
        except (AvtrainError, OSError) as error:
            if not told:
                ranks.agree(error)
            raise
        ranks.agree()
        return result
