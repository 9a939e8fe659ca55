"""Names of settings in earlier versions: what checkpoints, the folders of runs and people's own files may still say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from avtrain.errors import AvtrainError


class Retired(NamedTuple):
    """What became of a name of earlier versions.

    Attributes:
        now: the field's name today, in the same section; "": it is gone.
        instead: what to do where it is gone, for people who still set it.
        became: what a section that was written with it has instead.
    """

    now: str = ""
    instead: str = ""
    became: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda section: {}


def _micro_batch(section: Mapping[str, Any]) -> dict[str, Any]:
    """So many parts of a batch as clips of a part."""
    parts = section["accumulate"]
    return {"micro_batch": section["batch_size"] // parts} if parts > 1 and "batch_size" in section else {}


# Old names of fields. Renamed ones are read wherever they stand. Those that are gone are passed over where an earlier
# version has written them down, in a checkpoint or a run's folder; who asks for them today is told what to do instead.
RETIRED = {
    "model.log_mel_deviation": Retired(now="log_mel_std"),
    "model.segments_at_once": Retired(instead="model.stages_recomputed saves memory, and changes nothing else"),
    "transfer.accumulate": Retired(instead="transfer.micro_batch says how many clips are computed at once",
                                   became=_micro_batch),
    "training.accumulate": Retired(instead="training.micro_batch says how many clips are computed at once",
                                   became=_micro_batch),
}


def current_names(section: str, values: Mapping[str, Any], written: bool) -> dict[str, Any]:
    """A section's values under the names that the fields have today.

    Args:
        section, values: as for `section_values`.
        written: by an earlier version, as a record: then what is gone is left out; else somebody asks for it.

    Raises:
        AvtrainError: it holds a field under both names, or asks for one that is gone.
    """
    found = {}
    for name, value in values.items():
        retired = RETIRED.get(f"{section}.{name}", Retired(now=name))
        if not retired.now and not written:
            raise AvtrainError(f"{section}.{name}: there is no such setting any more; {retired.instead}")
        if retired.now != name and retired.now in values:
            raise AvtrainError(f"{section}.{name}: is called {section}.{retired.now} now; leave one of the two out")
        found.update({retired.now: value} if retired.now else retired.became(values))
    return found
