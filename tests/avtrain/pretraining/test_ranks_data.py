"""Several processes, of which one can't have its data; and shards that are streamed."""

import pytest
from forked import forked
from many_processes import agree, arguments, losses

pytestmark = pytest.mark.slow
# Of rank 1, from the second epoch on, which begins in its share of the third batch.
FAILS = """
import os, signal
from avtrain.data import clips
fill = clips.ClipDataset._fill
def fails(self, row, wanted, *rest):
    if rank == 1 and wanted.epoch == 1:
        HOW
    fill(self, row, wanted, *rest)
clips.ClipDataset._fill = fails
"""
LOST = {"unreadable": "raise ValueError('made up')", "lost": "os.kill(os.getpid(), signal.SIGKILL)",
        "hangs": "signal.pause()"}
MESSAGES = {"unreadable": ": made up", "lost": "it was for the second time, while it made ",
            "hangs": "a worker has made no batch for 2 s (data.timeout_s); it was for the second time"}


def test_an_error_of_data_of_any_process_ends_all_after_a_checkpoint(all_kinds, tmp_path):
    def pretrain(ranks, out, *code):
        return ranks, arguments(all_kinds, tmp_path / out, "--set", "data.timeout_s=2")[1:], *code

    found = forked(pretrain(2, "whole"), *(pretrain(2, name, FAILS.replace("HOW", how)) for name, how in LOST.items()),
                   *(pretrain(1, name) for name in LOST))
    assert [codes for codes, _ in found] == [[0, 0], [1, 1], [1, 1], [1, 1], [0], [0], [0]], found
    for (_, printed), name in zip(found[1:4], LOST, strict=True):
        assert "Error: process 1 can't go on: " in printed and MESSAGES[name] in printed, printed
        assert "Traceback" not in printed and any(key in printed for key in ("normal", "short", "silent", "long"))
        # A worker that is killed may take with it what it had made for the second step.
        assert any((tmp_path / name / "checkpoints" / f"step-00000{step}" / "training.pt").is_file() for step in (1, 2))
        agree(losses(tmp_path / "whole"), losses(tmp_path / name), 1e-8)  # it went on from there


def test_streams_of_two_processes_go_on_and_only_with_two(all_kinds, tmp_path):
    def pretrain(ranks, out, steps):
        return ranks, arguments(all_kinds, tmp_path / out, "--max-steps", steps, "--set", "data.order=stream", "--set",
                                "data.stream_buffer=4")[1:]

    found = forked(pretrain(2, "whole", 8), pretrain(2, "cut", 3), pretrain(1, "cut", 8), pretrain(2, "cut", 8))
    assert [codes for codes, _ in found] == [[0, 0], [0, 0], [1], [0, 0]], found
    assert found[0][1].count("data.order=stream: shuffled within each worker") == 1
    assert 'streams was "2 x 1" and is "1 x 1"' in found[2][1]
    whole, cut = ([{name: value for name, value in line.items() if not name.startswith("test_")} for line in losses(
        tmp_path / name)] for name in ("whole", "cut"))
    agree(whole, cut, 1e-8)
    logged = (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert all(f'"{name}"' in logged for name in ("clips_per_s_process", "memory_gib", "waiting_share"))
