"""Batches of segments that are there, as ones of whole rows."""

from dataclasses import replace

import torch


def padded(batch):
    """The batch with visual and audio as the network takes them, (rows, segments, ...), zeros where nothing is."""
    visual, audio, *_ = batch.tensors(torch.device("cpu"))
    return replace(batch, visual=visual, audio=audio)
