"""Who builds in a folder of a store, which knows no locks: a small file there, renewed as long as the build lives."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from avprep.errors import AvprepError
from avprep.state import Part
from avprep.storage import Store

RENEWED_S = 60.0
EXPIRED_S = 300.0  # without a renewal; clocks of machines may differ by less
_PREFIX = ".build/lease-"


class Lease:
    """A build's claim to the shards of its part."""

    def __init__(self, store: Store, part: Part) -> None:
        self._store, self._part = store, part
        self._name = f"{_PREFIX}{part.number}-of-{part.of}.json"
        self._id = uuid.uuid4().hex
        self._lost = False
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def check(self) -> None:
        """
        Raises:
            AvprepError: another build has taken this one for dead, as when a machine was asleep.
        """
        if self._lost:
            raise AvprepError(f"another avprep build has taken over {self._store.address}: this one gave no sign of "
                              f"life for {EXPIRED_S / 60:.0f} minutes")

    def take(self) -> None:
        """
        Raises:
            AvprepError: another build writes some of the same shards.
        """
        for name, other in self._others().items():
            self._refuse_if_alive(other)
            self._store.remove([name])
        if not self._store.create(self._name, self._content()) and not self._is_ours():  # its answer may have got lost
            raise AvprepError(self._busy("it began at the same moment"))
        try:
            for other in self._others().values():  # of a part whose shards overlap, begun at the same moment
                self._refuse_if_alive(other)
        except AvprepError:
            self._store.remove([self._name])
            raise
        self._renewal.start()

    def give_back(self) -> None:
        """End it."""
        self._ended.set()
        self._renewal.join()
        if not self._lost:
            self._store.remove([self._name])

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            try:
                self._lost = not self._is_ours()
                if self._lost:
                    return
                self._store.write(self._name, self._content())
            except (AvprepError, ValueError, KeyError):  # the next time, perhaps; until then others wait
                continue

    def _is_ours(self) -> bool:
        [(_, content)] = self._store.read([self._name])
        return bool(json.loads(content)["id"] == self._id)

    def _content(self) -> bytes:
        return json.dumps({"id": self._id, "part": [self._part.number, self._part.of], "renewed_s": time.time(),
                           "who": f"process {os.getpid()} on {os.uname().nodename}"}).encode()

    def _others(self) -> dict[str, dict[str, Any]]:
        """The claims of others to some of the same shards, by name."""
        names = [name for name in self._store.listed() if name.startswith(_PREFIX)]
        found = {}
        for name, content in self._store.read(names):
            claim = json.loads(content)
            if claim["id"] != self._id and Part(*claim["part"]).overlaps(self._part):
                found[name] = claim
        return found

    def _refuse_if_alive(self, other: dict[str, Any]) -> None:
        if time.time() - other["renewed_s"] < EXPIRED_S:
            raise AvprepError(self._busy(other["who"]))

    def _busy(self, who: str) -> str:
        return (f"another avprep build is writing to {self._store.address} ({who}): wait for it, or stop it; one that "
                f"was killed counts for {EXPIRED_S / 60:.0f} minutes more")


@contextmanager
def leased(store: Store, part: Part) -> Iterator[Lease]:
    """The lease of a part's shards.

    Raises:
        AvprepError: another build has it.
    """
    lease = Lease(store, part)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()
