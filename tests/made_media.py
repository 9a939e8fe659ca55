"""What stands in for the real media where they are not: files of the same names and kinds, made by ffmpeg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av

CLASSES = ("Dog bark", "Rain", "Sea waves", "Baby cry", "Clock tick", "Person sneeze", "Helicopter", "Chainsaw",
           "Rooster", "Fire crackling")
FOLDS = (1, 2, 3, 4, 5)
_H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")


def _picture(size: str, fps: int, seconds: float, more: str = "") -> list[object]:
    return ["-f", "lavfi", "-i", f"testsrc2=s={size}:r={fps}:d={seconds}{more}"]


def _tone(hertz: int, rate_hz: int, seconds: float) -> list[object]:
    return ["-f", "lavfi", "-i", f"sine={hertz}:r={rate_hz}:d={seconds}"]


def make_media(ffmpeg: Callable[..., None], folder: Path) -> None:
    """Make the files that shared/media/README.md lists, shorter or with smaller pictures where no test minds."""
    noisy = ",noise=alls=40:allf=t"
    surround = "|".join(f"0.4*sin(2*PI*{hertz}*t)" for hertz in (300, 500, 700, 60, 900, 1100))
    videos: dict[str, list[object]] = {
        "pancake.mkv": [*_picture("426x240", 30, 10.4, noisy), *_tone(500, 48_000, 10.4), *_H264, "-b:v", "500k",
                        "-c:a", "libopus"],
        "v2d_test.mp4": [*_picture("288x162", 8, 122.6), *_tone(400, 44_100, 122.6), *_H264, "-c:a", "aac"],
        "bigbuckbunny.mp4": [*_picture("320x180", 25, 5.3, ",gblur=sigma=4,hue=s=0.25"), "-f", "lavfi", "-i",
                             f"aevalsrc={surround}:s=48000:c=5.1:d=5.3", *_H264, "-c:a", "aac", "-b:a", "384k"],
        "mmaction_demo.mp4": [*_picture("340x256", 14, 10, ",setsar=64/51"), *_H264],
        "mmaction_test.avi": [*_picture("160x120", 25, 6.6), *_tone(700, 44_100, 6.6), "-c:v", "mpeg4", "-c:a",
                              "libmp3lame"],
        "nasa.mp4": [*_picture("320x180", 10, 13), *_picture("480x270", 10, 13), *_tone(300, 8_000, 13.056),
                     *_tone(900, 16_000, 13.056), *(part for index in range(4) for part in ("-map", index)), *_H264,
                     "-c:a", "aac"],
        "h265.mp4": [*_picture("128x128", 10, 1), "-c:v", "libx265", "-preset", "ultrafast", "-x265-params",
                     "log-level=none"],
        "av1.mkv": [*_picture("96x54", 8, 1), "-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", 8],
        "bikes.mp4": [*_picture("320x136", 25, 10, noisy), *_H264, "-b:v", "300k"],
        "corrupted.mp4": [*_picture("96x54", 10, 5), *_H264]}
    for name, arguments in videos.items():
        ffmpeg(*arguments, folder / name)
    with av.open(str(folder / "corrupted.mp4")) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos is not None and packet.size]
    with (folder / "corrupted.mp4").open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"\xff" * 4)  # the length of what follows
    (folder / "README.md").write_text("Made for tests.\n")
    _make_esc10(ffmpeg, folder / "esc10")


def _make_esc10(ffmpeg: Callable[..., None], folder: Path) -> None:
    """One recording of 5 s for each class in each fold, that the ear could tell apart."""
    inputs: list[object] = []
    outputs: list[object] = []
    for number, name in enumerate(CLASSES):
        sounds = {"Dog bark": "0.8*(2*random(0)-1)*lt(mod(t,0.9),0.2)", "Rain": "0.2*(2*random(0)-1)"}
        pitch = f"0.4*sin(2*PI*{200 + 150 * number}*t)*(0.6+0.4*sin(2*PI*{number}*t))"
        inputs += ["-f", "lavfi", "-i", f"aevalsrc='{sounds.get(name, pitch)}':s=44100:d=25"]
        place = folder / f"{number + 1:03d} - {name}"
        place.mkdir(parents=True)
        for fold in FOLDS:
            outputs += ["-map", number, "-ss", 5 * (fold - 1), "-t", 5, "-c:a", "libvorbis",
                        place / f"{fold}-100032-A.ogg"]
    ffmpeg(*inputs, *outputs)
