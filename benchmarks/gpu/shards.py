"""Part 4: the whole step from shards, with clips that this makes itself: how fast, and how long it waits for data."""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avtrain.data.manifest import MANIFEST, TAR_BLOCK, schema
from avtrain.data.shards import FORMAT, FORMAT_VERSION
from benchmarks.gpu.device import synchronize
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import Bench, Setting

HEIGHT, WIDTH, FPS, SEGMENT = 160, 212, 16, 32
_CLIPS_A_SHARD = 32
SPEC = {"fps": FPS, "frames": 480, "segment_frames": SEGMENT, "short_side": HEIGHT, "crf": 23, "sample_rate_hz": 44100,
        "mel_bands": 80, "mel_frames": 128, "hop_samples": 690, "window_samples": 1380, "reference_step": 4}


def run(report: Report, bench: Bench, setting: Setting, folder: Path, clips: int) -> None:
    """All rows of this part."""
    lacking = [name for name in ("av", "pyarrow") if find_spec(name) is None]
    if lacking:
        report.add("clips from shards", {"passed_over": f"no package {', '.join(lacking)}: bring its wheel along"})
        return
    frames = SEGMENT * bench.config.data.segments
    if report.measure(f"{clips} clips are made", lambda: made(folder, clips, frames), 10) is None:
        return
    cores = len(os.sched_getaffinity(0))
    for workers, beside in dict.fromkeys(((max(1, cores - 2), True), (max(1, cores // 2), True),
                                          (max(1, cores - 2), False))):
        way = "pinned, copied beside" if beside else "as they come"
        report.measure(f"from shards, {workers} workers, {way}",
                       lambda workers=workers, beside=beside: trained(bench, setting, folder, workers, beside), 8)


def made(folder: Path, clips: int, frames: int) -> Figures:
    """Shards as avprep writes them, encoded on all cores."""
    import pyarrow as pa  # these may be missing
    import pyarrow.parquet as pq

    cores, context = len(os.sched_getaffinity(0)), get_context("spawn")
    began, rows, listed = time.monotonic(), list[dict[str, Any]](), []
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        videos = pool.map(drawn_video, range(clips), [frames] * clips)
        for number in range(-(-clips // _CLIPS_A_SHARD)):
            path = folder / f"train-{number:06d}.tar"
            count = min(_CLIPS_A_SHARD, clips - number * _CLIPS_A_SHARD)
            with tarfile.open(path, "w") as tar:
                for index in range(count):
                    rows.append(_add_clip(tar, number * _CLIPS_A_SHARD + index, next(videos), frames))
                    rows[-1]["shard"] = path.name
            content = path.read_bytes()
            listed.append({"url": path.name, "nsamples": count, "filesize": len(content),
                           "sha256": hashlib.sha256(content).hexdigest()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), folder / MANIFEST)
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, "dataset": "drawn", "split": "train",
             "classes": ["drawn"], "multi_label": False, "spec": SPEC, "shardlist": listed}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    sizes = sum(row["mp4_size"] for row in rows)
    return {"kb_a_clip": sizes / clips / 1000, "seconds": time.monotonic() - began, "cores": cores}


def _add_clip(tar: tarfile.TarFile, number: int, mp4: bytes, frames: int) -> dict[str, Any]:
    """Returns its row of the manifest."""
    random, log_mel = np.random.default_rng(number), io.BytesIO()
    mel_frames = frames // SEGMENT * 128
    np.save(log_mel, random.normal(-3, 3, (80, mel_frames)).astype(np.float16))
    key = f"clip-{number:06d}"
    info = {"key": key, "source": key, "labels": [0], "start_s": 0.0, "end_s": frames / FPS, "frames": frames,
            "width": WIDTH, "height": HEIGHT, "sound_s": frames / FPS, "mel_frames": mel_frames, "missing": [],
            "marks": []}
    row: dict[str, Any] = dict(info)
    for ending, content in (("mp4", mp4), ("logmel.npy", log_mel.getvalue()), ("json", json.dumps(info).encode())):
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(content)
        column = ending.partition(".")[0]
        row |= {f"{column}_offset": tar.offset + TAR_BLOCK, f"{column}_size": len(content)}
        tar.addfile(member, io.BytesIO(content))
    return row


def drawn_video(number: int, frames: int) -> bytes:
    """A clip of patches that drift over a drifting texture, another scene every segment, with some grain; H.264."""
    import av

    random = np.random.default_rng(number)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "23", "g": str(SEGMENT), "keyint_min": str(SEGMENT),
                          "sc_threshold": "0", "bf": "3", "b_strategy": "0", "x264-params": "b-pyramid=none",
                          "flags": "+cgop"}
        grain = random.integers(0, 8, (4, HEIGHT, WIDTH), dtype=np.uint8)
        for start in range(0, frames, SEGMENT):
            texture = random.integers(40, 180, (HEIGHT // 8, WIDTH // 8 + 1)).astype(np.uint8)
            ground = np.kron(texture, np.ones((8, 8), np.uint8))[:, :WIDTH]
            patch = random.integers(16, 235, (48, 48)).astype(np.uint8)
            colours = random.integers(60, 200, (2, 1, 1)).astype(np.uint8)
            at, speed, drift = random.integers(0, 100, 2), random.integers(-4, 5, 2), random.integers(-3, 4, 2)
            for step in range(min(SEGMENT, frames - start)):
                picture = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
                picture[:HEIGHT] = np.roll(ground, tuple(step * drift), (0, 1)) + grain[step % 4]
                top, left = (at + step * speed) % (HEIGHT - 48)
                picture[top:top + 48, left:left + 48] = patch
                planes = picture[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
                planes[:] = colours
                frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
                for packet in stream.encode(frame):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def trained(bench: Bench, setting: Setting, folder: Path, workers: int, beside: bool) -> Figures:
    """Some seconds of training from the shards; the first batches, which fill the queues, don't count."""
    from avtrain.data.shards import open_folders  # these read media files through packages that may be missing
    from avtrain.pretraining.pretrain import epochs_of

    config = replace(bench.config, data=replace(bench.config.data, workers=workers),
                     training=replace(bench.config.training, batch_size=setting.clips, accumulate=1))
    supply = epochs_of(open_folders([str(folder)], labelled=False), config).starting_at(0, 0)
    batches = _beside(supply, bench.device) if beside else (one.tensors(bench.device) for one in supply)
    with bench.running(setting) as step:
        for _ in range(2):
            step(next(batches))
        synchronize(bench.device)
        began, cpu, waited, clips = time.perf_counter(), _cpu_seconds(), 0.0, 0
        while time.perf_counter() - began < 5 or clips < 2 * setting.clips:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if len(batch[0]) != setting.clips:  # the last one of an epoch; graphs have one size
                continue
            loss = step(batch)
            float(loss)  # else the host would run ahead, and the wait for the device would count as one for data
            clips += len(batch[0])
        synchronize(bench.device)
        seconds = time.perf_counter() - began
        used = (_cpu_seconds() - cpu) / seconds
    batches.close()
    supply.close()
    figures = bench.figures(setting.clips, seconds * setting.clips / clips)
    return {"workers": workers, "clips": setting.clips, **figures, "waiting_share": waited / seconds,
            "cores_used": used, "cpu_s_a_clip": used * seconds / clips}


def _beside(supply: Iterator[Any], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """A thread pins batches and copies them on a stream of their own, two ahead."""
    if device.type != "cuda":
        yield from (one.tensors(device) for one in supply)
        return
    ready: queue.Queue[Any] = queue.Queue(2)
    stream, stop = torch.cuda.Stream(device), threading.Event()

    def copy() -> None:
        try:
            for one in supply:
                parts = (one.visual, one.audio, one.visual_present, one.audio_present)
                with torch.cuda.stream(stream):
                    copied = tuple(part.pin_memory().to(device, non_blocking=True) for part in parts)
                stream.synchronize()
                while not stop.is_set():
                    try:
                        ready.put(copied, timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except Exception as error:  # handed to the thread that waits
            ready.put(error)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        while True:
            batch = ready.get(timeout=60)
            if isinstance(batch, Exception):
                raise batch
            for part in batch:
                part.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        stop.set()
        thread.join(timeout=10)


def _cpu_seconds() -> float:
    """CPU time that all processes of this machine have used."""
    try:
        values = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return sum(os.times()[:4])
    user, nice, system, _, _, irq, softirq = (int(value) for value in values[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
