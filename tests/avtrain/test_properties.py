"""What holds for any order, ranks, workers and settings, drawn at random (HYPOTHESIS_EXAMPLES=1000 draws more)."""

import dataclasses
import json
import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from avtrain.config import Config, config_from, config_to, parse_override, read_config
from avtrain.data.decode import ClipUnreadable, decode_log_mel
from avtrain.data.order import cut_of, epoch_order, fixed_order
from avtrain.data.stream import Streams, stream_order
from avtrain.errors import AvtrainError

drawn = settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")), deadline=None, database=None)
shards = st.lists(st.integers(0, 20), min_size=1, max_size=12)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                 max_size=3), max_leaves=5)


@drawn
@given(shards, st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 20))
def test_an_epoch_has_every_clip_once_the_same_every_time(clips, seed, epoch, at_once):
    order = epoch_order(clips, seed, epoch, at_once)
    assert sorted(order) == fixed_order(clips) and order == epoch_order(clips, seed, epoch, at_once)


@drawn
@given(shards, st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
       st.integers(1, 4), st.integers(1, 5), st.integers(1, 30))
def test_streams_have_every_clip_once(clips, seed, epoch, ranks, workers, micro, parts, piece, buffer):
    streams = Streams(cut_of(ranks * micro * parts, micro, 0, ranks), piece, workers)
    assert sorted(stream_order(clips, seed, epoch, streams, buffer)) == fixed_order(clips)
    owners = streams.of(np.arange(3 * ranks * micro * parts))
    assert set(owners.tolist()) <= set(range(streams.count))


@drawn
@given(st.integers(1, 64), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 8))
def test_a_batch_is_cut_without_a_rest_or_refused(batch, micro, ranks):
    try:
        cut = cut_of(batch, micro, 0, ranks)
    except AvtrainError:
        assert batch % ((micro or 1) * ranks)
        return
    assert cut.parts * cut.ranks * cut.micro_batch == batch


@drawn
@given(st.sampled_from([(section.name, field.name) for section in dataclasses.fields(Config)
                        for field in dataclasses.fields(section.default_factory)]), values)
def test_any_value_of_a_setting_survives_a_round_trip_or_is_refused_in_a_line(name, value):
    settled = config_to(read_config("tiny"))
    settled[name[0]][name[1]] = value
    try:
        config = config_from(settled, "here")
    except AvtrainError as error:
        assert str(error).startswith("here: ")
        return
    assert config_from(json.loads(json.dumps(config_to(config))), "here") == config


@drawn
@given(st.text(max_size=60))
def test_any_override_is_read_or_refused(text):
    try:
        section, option, _ = parse_override(f"model.{text}")
        assert section == "model" and isinstance(option, str)
    except AvtrainError:
        pass


@drawn
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_are_taken_for_a_log_mel_or_break_its_reader(content, begins_right):
    head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': False, 'shape': (80, 2), }"
    try:
        assert decode_log_mel((head if begins_right else b"") + content).dtype == np.float16
    except ClipUnreadable as error:
        assert str(error).startswith("its log-mel")
