"""Part 4: the whole step from shards, with clips that this makes itself: how fast, and how long it waits for data."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avtrain.data.manifest import MANIFEST, TAR_BLOCK, schema
from avtrain.data.shards import FORMAT, FORMAT_VERSION
from benchmarks.gpu.device import NOMINAL_TFLOPS, synchronize
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
    for workers in dict.fromkeys((max(1, cores - 2), max(1, cores // 2))):
        report.measure(f"from shards, {workers} workers",
                       lambda workers=workers: trained(bench, setting, folder, workers), 8)
    for graphs in (True, False) if bench.device.type == "cuda" else (False,):
        report.measure(f"avtrain's own loop, {'with' if graphs else 'without'} graphs",
                       lambda graphs=graphs: pretrained(bench, setting.clips, folder, graphs), 15)


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
                    rows.append(add_clip(tar, number * _CLIPS_A_SHARD + index, next(videos), frames))
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


def add_clip(tar: tarfile.TarFile, number: int, mp4: bytes, frames: int) -> dict[str, Any]:
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


def trained(bench: Bench, setting: Setting, folder: Path, workers: int) -> Figures:
    """Some seconds of training from the shards; the first batches, which fill the queues, don't count."""
    from avtrain.data.clips import ClipDataset  # these read media files through packages that may be missing
    from avtrain.data.shards import open_folders
    from avtrain.pretraining.pretrain import epochs_of

    config = replace(bench.config, data=replace(bench.config.data, workers=workers),
                     training=replace(bench.config.training, batch_size=setting.clips, micro_batch=None))
    dataset = ClipDataset(open_folders([str(folder)], labelled=False), config.data, 0)
    supply = epochs_of(dataset, config, pin_memory=bench.device.type == "cuda").starting_at(0)
    full = (batch.tensors(bench.device) for batch in supply if len(batch.keys) == setting.clips)  # graphs have one size
    with bench.running(setting) as step:
        for _ in range(2):
            step(next(full))
        batch = next(full)
        synchronize(bench.device)
        began, cpu, waited, clips = time.perf_counter(), _cpu_seconds(), 0.0, 0
        while time.perf_counter() - began < 5 or clips < 2 * setting.clips:
            loss = step(batch)
            asked = time.perf_counter()
            batch = next(full)
            waited += time.perf_counter() - asked
            float(loss)  # else the host would run ahead, and the wait for the device would count as one for data
            clips += setting.clips
        synchronize(bench.device)
        seconds = time.perf_counter() - began
        used = (_cpu_seconds() - cpu) / seconds
    full.close()
    supply.close()
    figures = bench.figures(setting.clips, seconds * setting.clips / clips)
    return {"workers": workers, "clips": setting.clips, **figures, "asking_share": waited / seconds,
            "cores_used": used, "cpu_s_a_clip": used * seconds / clips}


def pretrained(bench: Bench, clips: int, folder: Path, graphs: bool) -> Figures:
    """`avtrain pretrain` itself: 16 steps of two parts, a line of metrics every four."""
    from avtrain.pretraining.pretrain import pretrain
    from avtrain.runtime import choose_runtime

    config = replace(bench.config, data=replace(bench.config.data, workers=max(1, len(os.sched_getaffinity(0)) - 2)),
                     model=replace(bench.config.model, dropout=0.0),
                     training=replace(bench.config.training, batch_size=2 * clips, micro_batch=clips, steps=16,
                                      log_every=4, save_every=16, evaluate_every=16, cuda_graphs=graphs))
    gc.collect()  # graphs of other settings hold their memory until they are gone
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    out = folder / f"run-{graphs}"
    run = pretrain(config, [str(folder)], [], out, choose_runtime(str(bench.device), "bfloat16"))
    lines = run.folder.lines()
    best = max(line["clips_per_s"] for line in lines[1:])
    return {"clips_a_step": 2 * clips, "clips_per_s": best, "mfu_nominal": bench.tflop_per_clip * best / NOMINAL_TFLOPS,
            "waiting_share": lines[-1]["waiting_share"], "peak_gib": bench.peak_gib(),
            "losses": [line["loss"] for line in lines], "gradient_norms": [line["gradient_norm"] for line in lines]}


def _cpu_seconds() -> float:
    """CPU time that all processes of this machine have used."""
    try:
        values = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return sum(os.times()[:4])
    user, nice, system, _, _, irq, softirq = (int(value) for value in values[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
