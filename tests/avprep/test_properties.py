"""What holds for any file, name and list, drawn at random (HYPOTHESIS_EXAMPLES=1000 draws more)."""

import os
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from avprep.clips import windows
from avprep.datasets.source import Listing, complete, safe_key, source_of
from avprep.datasets.tables import time_span, whole_number
from avprep.errors import SourceFailed
from avprep.probe import Media
from avprep.spec import ClipSpec
from avprep.state import Part

drawn = settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")), deadline=None, database=None)
RAW = Path("/raw")
names = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=300).filter(lambda name: name.strip("."))


@drawn
@given(length_s=st.floats(0.01, 20_000), frames=st.integers(1, 40), segment=st.sampled_from([16, 32, 64]),
       fps=st.integers(1, 60))
def test_windows_cover_the_file_once_and_in_order(length_s, frames, segment, fps):
    spec = ClipSpec(fps=fps, frames=frames * 64, segment_frames=max(segment, 16 * -(-fps // 16)) if fps <= 16 else 64)
    found = windows(source_of("a.mp4", RAW), Media(length_s, 0, None, 0), spec)
    assert [window.start_s for window in found] == [number * spec.clip_s for number in range(len(found))]
    ends = [window.start_s + window.length_s for window in found]
    assert all(0 < window.length_s <= spec.clip_s for window in found)
    assert max(ends) <= length_s + 1e-6 and length_s - max(ends) < spec.segment_s  # what is left is no segment
    assert len({window.key for window in found}) == len(found)


@drawn
@given(length_s=st.floats(0.1, 5000), first=st.floats(0, 5000), long=st.floats(0.1, 500))
def test_the_window_of_a_moment_lies_in_the_file(length_s, first, long):
    source = source_of("a.mp4", RAW, moment_s=(first, first + long))
    try:
        [window] = windows(source, Media(length_s, 0, None, 0), ClipSpec())
    except SourceFailed:
        assert first >= length_s
        return
    assert window.start_s >= 0 and 0 < window.length_s <= 30 and window.start_s + window.length_s <= length_s + 0.001
    if first + long <= length_s and long <= 30:
        assert window.start_s <= first + 0.001 and window.start_s + window.length_s >= first + long - 0.001


@drawn
@given(st.lists(names, min_size=1, max_size=30))
def test_keys_are_safe_and_each_file_has_its_own(drawn_names):
    listing = complete(Listing([], [source_of(f"{name}.mp4", RAW) for name in drawn_names]))
    keys = [source.key for source in listing.sources]
    assert len(set(keys)) == len(keys) == len(set(drawn_names))
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,90}", key) for key in keys)
    assert all(source.place == f"{name}.mp4" for source, name in zip(listing.sources, dict.fromkeys(drawn_names),
                                                                     strict=True))
    again = complete(Listing([], [source_of(f"{name}.mp4", RAW) for name in reversed(drawn_names)]))
    assert {source.place: source.key for source in again.sources} == {
        source.place: source.key for source in listing.sources}


@drawn
@given(st.text(max_size=50))
def test_no_text_of_a_list_is_a_fault(text):
    assert re.fullmatch("[A-Za-z0-9_-]{0,80}", safe_key(text))
    span = time_span(text, text + "9")
    assert span is None or 0 <= span[0] < span[1] < float("inf")
    number = whole_number(text)
    assert number is None or 0 <= number < 10**18


@drawn
@given(count=st.integers(0, 10_000), of=st.integers(1, 500))
def test_parts_share_the_shards_out(count, of):
    parts = [Part(number, of).within(count) for number in range(1, of + 1)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
