"""What a clip is. Written into every shard index and checked by whoever reads the shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from avprep.errors import AvprepError

FORMAT = "avprep-shards"
FORMAT_VERSION = 2

# Of a segment's frames, every fourth is one that others are predicted from (and the last): a reader that wants no more
# than those has the decoder leave out the rest.
REFERENCE_STEP = 4
# Those settings that are options of `avprep build`.
SPEC_OPTIONS = ("fps", "frames", "segment_frames", "short_side", "crf")

# Fewer samples than this and a segment no longer holds `mel_frames` frames at its own hop.
_SHORTEST_SEGMENT_SAMPLES = 16_384


@dataclass(frozen=True)
class ClipSpec:
    """The settings that decide the content of a clip (the paper's section 4.1, "open" choices by option).

    Attributes:
        fps: constant picture rate, frames per second.
        frames: frames of a full clip; 480 at 16 fps are 30 s.
        segment_frames: frames of one segment; a keyframe stands at the start of each.
        short_side: pixels of the shorter side; smaller pictures are never enlarged.
        crf: H.264 constant rate factor (0 lossless .. 51 worst).
        sample_rate_hz: rate of the mono waveform that the log-mel is computed from.
        mel_bands: mel bands from 0 Hz to half the sample rate.
        mel_frames: log-mel frames a segment.
    """

    fps: int = 16
    frames: int = 480
    segment_frames: int = 32
    short_side: int = 160
    crf: int = 23
    sample_rate_hz: int = 44_100
    mel_bands: int = 80
    mel_frames: int = 128

    def __post_init__(self) -> None:
        for name, low, high in (("fps", 1, 240), ("frames", 1, 100_000), ("segment_frames", 1, 100_000),
                                ("short_side", 16, 4096), ("crf", 0, 51)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise AvprepError(f"--{name.replace('_', '-')} is {value}: it must lie between {low} and {high}")
        if self.frames % self.segment_frames:
            raise AvprepError(f"--frames {self.frames} is not a multiple of --segment-frames {self.segment_frames}: "
                              "a full clip must be a whole number of segments")
        if self.segment_samples < _SHORTEST_SEGMENT_SAMPLES:
            raise AvprepError(f"--segment-frames {self.segment_frames} at --fps {self.fps} is {self.segment_s:.2f} s: "
                              f"a segment must last {_SHORTEST_SEGMENT_SAMPLES / self.sample_rate_hz:.2f} s or more")

    @property
    def clip_s(self) -> float:
        """Seconds of a full clip."""
        return self.frames / self.fps

    @property
    def segment_s(self) -> float:
        """Seconds of a segment."""
        return self.segment_frames / self.fps

    @property
    def segment_samples(self) -> int:
        """Waveform samples of a segment: w in method.md, 88,200 for 2 s."""
        return round(self.segment_frames * self.sample_rate_hz / self.fps)

    @property
    def hop_samples(self) -> int:
        """Samples between log-mel frames: floor(w / mel_frames) + 1, 690 for 2 s. The window is twice that."""
        return self.segment_samples // self.mel_frames + 1

    def to_json(self) -> dict[str, Any]:
        """The settings and what follows from them, as they stand in `index.json` and in every sample."""
        return {**asdict(self), "hop_samples": self.hop_samples, "window_samples": 2 * self.hop_samples,
                "reference_step": REFERENCE_STEP}
