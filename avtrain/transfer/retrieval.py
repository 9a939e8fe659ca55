"""Search across modalities: which pictures go with this sound, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avtrain.config import DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.shards import ShardFolder
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert
from avtrain.runtime import Runtime
from avtrain.transfer.feature_file import FeatureRows
from avtrain.transfer.features import clip_means

_DIMENSIONS = 32  # of the space that pictures and sounds share
_RIDGE = 0.1      # added to the covariances, in parts of their mean eigenvalue
_QUERIES, _SHOWN = 4, 5
_COMPARED_AT_ONCE = 1024


@dataclass(frozen=True)
class Retrieval:
    """Test clips that have picture and sound, and where they lie in the space that pictures and sounds share.

    Attributes:
        keys: of the clips.
        pictures, sounds: (clips, dimensions), of length 1, in the order of `keys`.
    """

    keys: list[str]
    pictures: Tensor
    sounds: Tensor

    def nearest(self, k: int, from_sound: bool) -> Tensor:
        """(clips, k): the pictures nearest to each sound, or the sounds nearest to each picture."""
        queries, others = (self.sounds, self.pictures) if from_sound else (self.pictures, self.sounds)
        return torch.cat([(some @ others.T).topk(min(k, len(others)), 1).indices
                          for some in queries.split(_COMPARED_AT_ONCE)])

    def recall(self, k: int, from_sound: bool) -> float:
        """How often a clip's own picture (or sound) is among the k nearest to its sound (or picture)."""
        nearest = self.nearest(k, from_sound)
        return float((nearest == torch.arange(len(nearest))[:, None]).any(1).float().mean())


def retrieve(model: AVBert, train: ShardFolder, test: ShardFolder, data: DataConfig, runtime: Runtime,
             cache: Path) -> Retrieval:
    """Compare pictures and sounds of test clips, in directions that go together on the training clips.

    The frozen local embeddings are averaged over a clip; canonical correlation analysis of the training clips (with
    a ridge; labels play no part) turns both into one space.

    Raises:
        AvtrainError: there are not enough clips with picture and sound.
    """
    known, found = (clip_means(model, folder, data, runtime, cache) for folder in (train, test))
    if len(known) < 2 or len(found) < 2:
        raise AvtrainError("retrieve: fewer than two clips for training or for test have both picture and sound")
    visual, audio = (FeatureRows.of_clips([known], name, [train.clips], train.rows.numbers())
                     for name in ("visual", "audio"))
    means = [torch.stack([of_one[part].double().sum(0) for part in of_one.parts()]).sum(0) / len(of_one)
             for of_one in (visual, audio)]
    directions = _directions(visual, audio, *means)
    asked = [FeatureRows.of_clips([found], name, [test.clips], test.rows.numbers()) for name in ("visual", "audio")]
    pictures, sounds = (
        torch.cat([F.normalize((of_one[part].double() - mean) @ to, dim=1) for part in of_one.parts()])
        for of_one, mean, to in zip(asked, means, directions, strict=True))
    keys = test.rows.keys()
    return Retrieval([keys[clip] for clip in found.clips.tolist()], pictures, sounds)


def _directions(visual: FeatureRows, audio: FeatureRows, visual_mean: Tensor,
                audio_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Regularised canonical directions of rows less their mean, (D, dimensions) each, scaled by their correlation."""
    of_visual, of_audio, of_both = torch.zeros(3, visual.channels, visual.channels, dtype=torch.float64)
    for part in visual.parts():
        seen, heard = visual[part].double() - visual_mean, audio[part].double() - audio_mean
        of_visual += seen.T @ seen
        of_audio += heard.T @ heard
        of_both += seen.T @ heard
    whiten = []
    for products in (of_visual, of_audio):
        values, vectors = torch.linalg.eigh(products / len(visual))
        values = values.clamp(min=0)
        whiten.append(vectors @ torch.diag((values + _RIDGE * values.mean() + 1e-12).rsqrt()) @ vectors.T)
    left, correlations, right = torch.linalg.svd(whiten[0] @ (of_both / len(visual)) @ whiten[1])
    scale = correlations[:_DIMENSIONS].sqrt()
    return whiten[0] @ left[:, :_DIMENSIONS] * scale, whiten[1] @ right.T[:, :_DIMENSIONS] * scale


def draw_retrieval(found: Retrieval, folder: ShardFolder, data: DataConfig, output: Path) -> None:
    """A few clips, evenly spaced: on top their sounds with the pictures nearest to each, below the other way round.

    Args:
        found: from `retrieve`.
        folder: the test shards.
        data: what a clip looks like.
        output: a .png file. A clip's own partner has a green title.
    """
    from matplotlib.figure import Figure

    places = {row.key: row.place for row in folder.rows}
    dataset = ClipDataset(folder, data, None)
    queries = sorted(set(np.linspace(0, len(found.keys) - 1, min(_QUERIES, len(found.keys))).round().astype(int)))
    figure = Figure(figsize=(2 * (_SHOWN + 1), 3.6 * len(queries)))
    axes = figure.subplots(2 * len(queries), _SHOWN + 1, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, wspace=0.05, hspace=0.15)
    for axis in axes.flat:
        axis.set_axis_off()
    nearest = {from_sound: found.nearest(_SHOWN, from_sound) for from_sound in (True, False)}
    for row, (from_sound, query) in enumerate([(one, query) for one in nearest for query in queries]):
        shown = nearest[from_sound][query].tolist()
        for column, (clip, sound) in enumerate([(query, from_sound), *((one, not from_sound) for one in shown)]):
            item = dataset[places[found.keys[clip]], 0]
            if item.unreadable:
                raise AvtrainError(str(item.unreadable[0]))
            axis = axes[row, column]
            if sound:
                heard = item.audio[:, 0].transpose(0, 1).flatten(1).numpy()
                axis.imshow(heard, origin="lower", aspect="auto", cmap="magma")
            else:
                seen = item.visual
                axis.imshow(seen[len(seen) // 2, :, seen.shape[2] // 2].permute(1, 2, 0).numpy())
            kind = "query: " if column == 0 else ""
            axis.set_title(f"{kind}{found.keys[clip][-18:]}", fontsize=7,
                           color="green" if column and clip == query else "black")
    with written_whole(output) as temporary:
        figure.savefig(temporary, dpi=90)
