"""Views for transfer: evenly spaced clips of a video, one segment long each, and crops of them."""

from __future__ import annotations

from dataclasses import dataclass

from avtrain.data.augment import SoundAugmentation


@dataclass(frozen=True)
class Views:
    """Which views of a stored clip are taken.

    Attributes:
        modality: visual, audio or both: what else there is is absent.
        clips: evenly spaced clips, each one segment long.
        crops: 1, the centre (in training: a random one); 3, left, centre and right, or top, centre and bottom.
        whole: in the test, squares are the whole short side, `scale[0]` pixels; else its centre, `crop` pixels.
        sequence: the clips are the segments of one row, for the Transformers; else each is a row.
        random_start: in training, a clip starts anywhere instead.
        sound: in training, what happens to the log-mel.
    """

    modality: str
    clips: int
    crops: int = 1
    whole: bool = True
    sequence: bool = False
    random_start: bool = False
    sound: SoundAugmentation = SoundAugmentation()


def start_frames(length: int, segment: int, count: int) -> list[int]:
    """Where clip i of `count` starts: (i / (count - 1)) x (length - segment), in frames; one alone is in the middle."""
    room = max(0, length - segment)
    return [round((i / (count - 1) if count > 1 else 0.5) * room) for i in range(count)]
