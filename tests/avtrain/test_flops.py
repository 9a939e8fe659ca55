"""Operations are those of plain sums over the network's layers; peaks are those of cards, by their whole names."""

import pytest
import torch

from avtrain.config import read_config
from avtrain.flops import peak_of, peak_tflops, training_flop


def test_the_paper_network_has_the_counted_operations():
    """21.8 GMAC a visual segment, 0.88 an audio segment, 2.7 a clip's Transformers; backwards twice as many."""
    by_hand = 3 * 2 * (15 * (21.8e9 + 0.88e9) + 2.7e9)
    assert training_flop(read_config("paper")) == pytest.approx(by_hand, rel=0.06)


def test_what_runs_again_is_not_counted():
    assert training_flop(read_config("tiny", ["model.stages_recomputed=3"])) == training_flop(read_config("tiny"))


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A1000", None), ("Tesla T4", None)])
def test_a_card_is_known_by_its_whole_name_or_not_at_all(name, peak):
    assert peak_tflops(name) == peak


def test_elsewhere_no_figure_is_guessed():
    assert peak_of(torch.device("cpu"), torch.bfloat16) is None
