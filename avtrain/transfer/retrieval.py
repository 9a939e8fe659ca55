"""Embeddings for use elsewhere, and search across modalities: which pictures go with this sound, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from avtrain.transfer.features import Features, frozen_features
from avtrain.transfer.metrics import Floats

_DIMENSIONS = 32  # of the space that pictures and sounds share
_RIDGE = 0.1      # added to the covariances, in parts of their mean eigenvalue
_QUERIES, _SHOWN = 4, 5


def write_embeddings(model: AVBert, folder: ShardFolder, data: DataConfig, runtime: Runtime, output: Path,
                     cache: Path | None) -> int:
    """Write one row a clip and segment: key, labels, time_s (of the segment's start in the source), and the lists of
    floats visual and audio (local embeddings, D) and multimodal (mean of its two tokens, D); null where absent.

    Args:
        model, folder, data, runtime, cache: as for `frozen_features`.
        output: a .parquet file.

    Returns:
        How many rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = frozen_features(model, folder, data, runtime, cache)
    starts_s = {row.key: row.start_s for row in folder.rows}
    segment_s = folder.spec["segment_frames"] / folder.spec["fps"]
    here = {"visual": features.visual_present, "audio": features.audio_present}
    local = {"visual": features.visual_local.numpy(), "audio": features.audio_local.numpy()}
    multimodal = _multimodal(features)
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "labels", "time_s", "visual", "audio", "multimodal")}
    for row, segment in (here["visual"] | here["audio"]).nonzero().tolist():
        columns["key"].append(features.keys[row])
        columns["labels"].append(features.labels[row])
        columns["time_s"].append(starts_s[features.keys[row]] + segment * segment_s)
        for name, present in here.items():
            columns[name].append(local[name][row, segment] if present[row, segment] else None)
        columns["multimodal"].append(multimodal[row, segment] if multimodal is not None else None)
    floats = pa.list_(pa.float32())
    schema = pa.schema([("key", pa.string()), ("labels", pa.list_(pa.int32())), ("time_s", pa.float64()),
                        ("visual", floats), ("audio", floats), ("multimodal", floats)])
    with written_whole(output) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)
    return len(columns["key"])


def _multimodal(features: Features) -> Floats | None:
    """(rows, segments, D): the mean of a segment's visual and audio tokens, of those that are there."""
    if features.multimodal_tokens is None:
        return None
    visual, audio = (tokens[:, 1:] for tokens in features.multimodal_tokens.chunk(2, 1))
    there = [present[..., None].float() for present in (features.visual_present, features.audio_present)]
    mean = (visual * there[0] + audio * there[1]) / (there[0] + there[1]).clamp(min=1)
    return np.asarray(mean.numpy())


@dataclass(frozen=True)
class Retrieval:
    """Test clips that have picture and sound, and how near each picture is to each sound.

    Attributes:
        keys: of the clips.
        similarity: (pictures, sounds), both in the order of `keys`.
    """

    keys: list[str]
    similarity: Tensor

    def nearest(self, k: int, from_sound: bool) -> Tensor:
        """(clips, k): the pictures nearest to each sound, or the sounds nearest to each picture."""
        similarity = self.similarity.T if from_sound else self.similarity
        return similarity.topk(min(k, len(similarity)), 1).indices

    def recall(self, k: int, from_sound: bool) -> float:
        """How often a clip's own picture (or sound) is among the k nearest to its sound (or picture)."""
        nearest = self.nearest(k, from_sound)
        return float((nearest == torch.arange(len(nearest))[:, None]).any(1).float().mean())


def retrieve(model: AVBert, train: ShardFolder, test: ShardFolder, data: DataConfig, runtime: Runtime,
             cache: Path | None) -> Retrieval:
    """Compare pictures and sounds of test clips, in directions that go together on the training clips.

    The frozen local embeddings are averaged over a clip; canonical correlation analysis of the training clips (with
    a ridge; labels play no part) turns both into one space.

    Raises:
        AvtrainError: there are not enough clips with picture and sound.
    """
    known, found = (frozen_features(model, folder, data, runtime, cache) for folder in (train, test))
    (_, visual, audio), (keys, test_visual, test_audio) = _clip_means(known), _clip_means(found)
    if len(visual) < 2 or len(keys) < 2:
        raise AvtrainError("retrieve: fewer than two clips for training or for test have both picture and sound")
    to_visual, to_audio = _directions(visual - visual.mean(0), audio - audio.mean(0))
    pictures = F.normalize((test_visual - visual.mean(0)) @ to_visual, dim=1)
    sounds = F.normalize((test_audio - audio.mean(0)) @ to_audio, dim=1)
    return Retrieval(keys, pictures @ sounds.T)


def _clip_means(features: Features) -> tuple[list[str], Tensor, Tensor]:
    """(keys, visual, audio) of the clips with both: local embeddings averaged over the segments that are there."""
    rows = (features.visual_present.any(1) & features.audio_present.any(1)).nonzero()[:, 0]
    means = [(local[rows] * present[rows, :, None]).sum(1) / present[rows].sum(1, keepdim=True)
             for local, present in ((features.visual_local, features.visual_present),
                                    (features.audio_local, features.audio_present))]
    return [features.keys[row] for row in rows.tolist()], means[0].double(), means[1].double()


def _directions(visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Regularised canonical directions of centred rows, (D, dimensions) each, scaled by their correlation."""
    whiten = []
    for rows in (visual, audio):
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        values = values.clamp(min=0)
        whiten.append(vectors @ torch.diag((values + _RIDGE * values.mean() + 1e-12).rsqrt()) @ vectors.T)
    left, correlations, right = torch.linalg.svd(whiten[0] @ (visual.T @ audio / len(visual)) @ whiten[1])
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
    for row, (from_sound, query) in enumerate([(one, query) for one in (True, False) for query in queries]):
        shown = found.nearest(_SHOWN, from_sound)[query].tolist()
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
