"""Embeddings for use elsewhere: a Parquet table, a row a clip and segment, written as the batches come."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avtrain.config import DataConfig
from avtrain.data.shards import ShardFolder
from avtrain.files import written_as_it_comes
from avtrain.models.avbert import AVBert
from avtrain.runtime import Runtime
from avtrain.transfer.features import Outputs, segment_outputs

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_A_GROUP = 2048


def write_embeddings(model: AVBert, folder: ShardFolder, data: DataConfig, runtime: Runtime, output: Path) -> int:
    """Write the embeddings of all clips; memory does not grow with their number.

    Args:
        model, folder, data, runtime: as for `segment_outputs`.
        output: a .parquet file, whole or not at all: `table_schema`, in row groups of about 2,048 rows.

    Returns:
        How many rows. Of several processes the first one writes and knows it, and the others return 0.
    """
    dimension, outputs = model.config.dimension, segment_outputs(model, folder, data, runtime)
    return outputs.taken(lambda parts: write_table(output, dimension, parts, folder)) or 0


def table_schema(dimension: int) -> pa.Schema:
    """key, labels, time_s (of the segment's start in the source), and the embeddings visual and audio (local) and
    multimodal (mean of the segment's two tokens), `dimension` floats each; null where absent."""
    import pyarrow as pa

    floats = pa.list_(pa.float32(), dimension)
    return pa.schema([("key", pa.string()), ("labels", pa.list_(pa.int32())), ("time_s", pa.float64()),
                      ("visual", floats), ("audio", floats), ("multimodal", floats)])


def write_table(output: Path, dimension: int, parts: Iterable[Outputs], folder: ShardFolder) -> int:
    """Write what `segment_outputs` gives for the folder's clips; returns how many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table_schema(dimension)
    written, held = 0, schema.empty_table()
    with written_as_it_comes(output) as file, pq.ParquetWriter(file, schema, use_dictionary=["key"]) as writer:
        for found in parts:
            held = pa.concat_tables([held, _rows(found, folder, schema)])
            if len(held) >= _ROWS_A_GROUP:
                writer.write_table(held)
                written, held = written + len(held), schema.empty_table()
        if len(held):
            writer.write_table(held)
    return written + len(held)


def _rows(found: Outputs, folder: ShardFolder, schema: pa.Schema) -> pa.Table:
    """A row for each clip and segment where there is anything to see or hear."""
    import pyarrow as pa

    segment_s = folder.spec["segment_frames"] / folder.spec["fps"]
    here = {"visual": found.batch.visual_present.numpy(), "audio": found.batch.audio_present.numpy()}
    clips, segments = np.nonzero(here["visual"] | here["audio"])

    def floats(name: str, there: NDArray[np.bool_] | None) -> pa.Array:
        """(rows,) of lists, null where it isn't there."""
        if name not in found.tensors:
            return pa.nulls(len(clips), schema.field("visual").type)
        values: Tensor = found.tensors[name][clips, segments]
        absent = None if there is None else pa.array(~there[clips, segments])
        return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1], mask=absent)

    starts_s = np.asarray([folder.rows[number].start_s for number in found.clips.tolist()])
    columns = [pa.array([found.batch.keys[clip] for clip in clips], pa.string()),
               pa.array([found.batch.labels[clip] for clip in clips], pa.list_(pa.int32())),
               pa.array(starts_s[clips] + segments * segment_s), floats("visual_local", here["visual"]),
               floats("audio_local", here["audio"]), floats("multimodal", None)]
    return pa.table(columns, schema=schema)
