"""Runs of pretraining that nothing disturbed."""

import pytest
from small_pretrain import pretrained


@pytest.fixture(scope="session")
def whole(demo_shards, tmp_path_factory):
    """Nine steps: folder and what was printed. To be read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = pretrained(demo_shards, out, drawn=True)
    assert done.exit_code == 0, (done.output, done.exception)
    return out, done.stdout
