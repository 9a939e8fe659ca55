"""Bad and odd media: what strangers' folders hold by accident or by intent. Each has its right outcome."""

from __future__ import annotations

import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ANY, WRITTEN = "any", "written"  # or else the reason in the account
_UNREADABLE, _NO_FILE, _NO_LENGTH = "not a readable media file", "not a regular file", "zero length"
_H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
_PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=5:d=2")
_TONE = ("-f", "lavfi", "-i", "sine=300:r=16000:d=2")
Kind = tuple[str, bytes, str]  # name, content, outcome


def text_kinds() -> Iterator[Kind]:
    """What is no media at all."""
    yield "empty.mp4", b"", "empty file"
    yield "html.mp4", b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>", _UNREADABLE
    yield "json.mp4", b'{"error": "quota exceeded"}', _UNREADABLE
    yield "zeros.mp4", bytes(100_000), _UNREADABLE
    yield "ones.mp4", b"\xff" * 100_000, ANY
    yield "text.mkv", "Grüße\n".encode() * 1000, ANY
    yield "concat.mp4", b"ffconcat version 1.0\nfile good.mp4\n", _UNREADABLE
    yield "playlist.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\ngood.mp4\n#EXT-X-ENDLIST\n", _UNREADABLE
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    yield "sdp.mp4", sdp, _UNREADABLE
    for number in range(4):
        noise = random.Random(number).randbytes(20_000)
        yield f"noise{number}.mp4", noise, ANY
        yield f"noise{number}.mkv", b"\x1a\x45\xdf\xa3" + noise, ANY
        yield f"noise{number}.avi", b"RIFF\xff\xff\xff\x7fAVI LIST" + noise, ANY
        yield f"noise{number}.ts", b"".join(b"\x47" + noise[at:at + 187] for at in range(0, 18_000, 187)), ANY
        yield f"noise{number}.ogg", b"OggS\0" + noise, ANY
        yield f"noise{number}.flv", b"FLV\x01\x05\0\0\0\x09" + noise, ANY
        yield f"noise{number}.mp3", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + noise, ANY


def damaged_kinds(name: str, content: bytes) -> Iterator[Kind]:
    """A good file cut at every tenth, flipped bit by bit, without its inside, and twice."""
    stem, _, ending = name.rpartition(".")
    for tenth in range(1, 10):
        yield f"{stem}-cut{tenth}.{ending}", content[:len(content) * tenth // 10], ANY
    for seed in range(8):
        flipped, moments = bytearray(content), random.Random(seed)
        for _ in range(1 + len(content) // 2000 if seed % 2 else 1 + seed):
            flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        yield f"{stem}-flip{seed}.{ending}", bytes(flipped), ANY
    head = bytearray(content)
    head[32:96] = random.Random(name).randbytes(64)
    yield f"{stem}-head.{ending}", bytes(head), ANY
    yield f"{stem}-headonly.{ending}", content[:64], ANY
    yield f"{stem}-hollow.{ending}", content[:2000] + bytes(max(0, len(content) - 4000)) + content[-2000:], ANY
    yield f"{stem}-twice.{ending}", content * 2, ANY


def box(kind: bytes, content: bytes) -> bytes:
    """An atom of an mp4."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def table_kinds(mp4: bytes) -> Iterator[Kind]:
    """An mp4 whose tables claim what is not so."""
    start = box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41")
    yield "ftyp.mp4", start, ANY
    yield "endless.mp4", start + struct.pack(">I4sQ", 1, b"moov", (1 << 63) - 1) + bytes(100), ANY
    yield "deep.mp4", start + b"".join(struct.pack(">I4s", 0x7FFFFFF0, b"moov") for _ in range(50_000)), ANY
    yield "zero sizes.mp4", start + struct.pack(">I4s", 0, b"moov") * 1000, ANY
    bomb = zlib.compress(bytes(50_000_000))
    for size in (50_000_000, 0xFFFFFFF0):
        packed = box(b"cmov", box(b"dcom", b"zlib") + box(b"cmvd", struct.pack(">I", size) + bomb))
        yield f"bomb{size}.mov", start + box(b"moov", packed), ANY
    for kind, at in ((b"stsz", 8), (b"stco", 4), (b"stts", 4), (b"stsc", 4), (b"stss", 4), (b"elst", 4), (b"stsd", 4)):
        for count in (0, 0x00FFFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
            yield f"{kind.decode()}-{count:x}.mp4", _patched(mp4, kind, at, struct.pack(">I", count)), ANY
    for kind, at in ((b"mvhd", 12), (b"mdhd", 12)):
        for scale in (0, 0xFFFFFFFF) if kind == b"mvhd" else (1,):
            yield f"{kind.decode()}-scale-{scale:x}.mp4", _patched(mp4, kind, at, struct.pack(">I", scale)), ANY
    long = _patched(_patched(mp4, b"mvhd", 16, struct.pack(">I", 36_000_000)), b"mdhd", 16, b"\x7f\xff\xff\xff")
    yield "ten hours.mp4", long, ANY
    for width, height in ((0, 0), (1, 1), (16384, 16384), (65535, 65535)):
        yield f"stated{width}.mp4", _patched(mp4, b"avc1", 24, struct.pack(">HH", width, height)), ANY
    yield "codec.mp4", mp4.replace(b"avc1", b"qqqq"), ANY
    yield "no data.mp4", mp4.replace(b"mdat", b"free"), ANY
    yield "before the file.mp4", _patched(mp4, b"stco", 8, b"\0\0\0\0"), ANY
    yield "beyond the file.mp4", _patched(mp4, b"stco", 8, b"\x7f\xff\xff\xff"), ANY


def _patched(mp4: bytes, kind: bytes, at: int, value: bytes) -> bytes:
    """The mp4 with other bytes in each atom of that kind."""
    made, found = bytearray(mp4), mp4.find(kind)
    while found >= 0:
        made[found + 4 + at:found + 4 + at + len(value)] = value
        found = mp4.find(kind, found + 4)
    return bytes(made)


def png(width: int, height: int) -> bytes:
    """A black picture of that size in a few kilobytes, one bit a pixel."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    line = bytes(1 + (width + 7) // 8)
    packer, packed = zlib.compressobj(), []
    for _ in range(height):
        packed.append(packer.compress(line))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(
        b"IDAT", b"".join(packed) + packer.flush()) + chunk(b"IEND", b"")


def picture_kinds() -> Iterator[Kind]:
    """Pictures of sizes that are none, or that nobody's memory holds."""
    yield "1x1.mp4", png(1, 1), ANY
    yield "8192.mp4", png(8192, 8192), ANY
    yield "16384.mp4", png(16384, 16384), ANY
    yield "wide.mp4", png(60_000, 2), ANY
    for width, height in ((0, 0), (0, 16), (1 << 31 - 1, 1 << 31 - 1), (65_536, 65_536)):
        head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height)
        yield f"png{width}x{height}.mp4", head + png(16, 16)[24:], ANY


def wav(samples: bytes, channels: int = 1, rate_hz: int = 16_000, bits: int = 16, form: int = 1,
        stated: int | None = None) -> bytes:
    """A .wav; `form` 3: of floats. `stated`: bytes of sound that its header claims."""
    width = channels * bits // 8
    head = struct.pack("<HHIIHH", form, channels & 0xFFFF, rate_hz & 0xFFFFFFFF, rate_hz * width & 0xFFFFFFFF,
                       width & 0xFFFF, bits)
    size = len(samples) if stated is None else stated
    return b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + struct.pack("<I", 16) + head + (
        b"data" + struct.pack("<I", size) + samples)


def sound_kinds() -> Iterator[Kind]:
    """Sound of odd numbers, and of none."""
    second = random.Random(0).randbytes(32_000)
    floats = struct.pack("<8000f", *(0.1 for _ in range(8000)))
    yield "no samples.wav", wav(b""), ANY
    yield "one sample.wav", wav(b"\1\0"), ANY
    yield "8 channels.wav", wav(second * 8, 8), WRITTEN
    yield "24 channels.wav", wav(second * 24, 24), WRITTEN
    yield "0 channels.wav", wav(second, 0), ANY
    yield "65535 channels.wav", wav(second, 65_535), ANY
    yield "192 kHz.wav", wav(second * 12, rate_hz=192_000), WRITTEN
    for rate_hz in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
        yield f"{rate_hz} Hz.wav", wav(second[:64], rate_hz=rate_hz), ANY
    yield "0 bits.wav", wav(second, bits=0), ANY
    yield "nan.wav", wav(floats + struct.pack("<f", float("nan")) * 100, bits=32, form=3), "values that are not finite"
    yield "inf.wav", wav(floats + struct.pack("<f", float("inf")) * 100, bits=32, form=3), "values that are not finite"
    yield "loud.wav", wav(struct.pack("<f", 3e38) * 8000, bits=32, form=3), "values that are not finite"
    yield "tiny.wav", wav(struct.pack("<f", 1e-45) * 16_000, bits=32, form=3), WRITTEN
    yield "broken off.wav", wav(second, stated=100_000_000), "truncated"
    yield "never stopped.wav", wav(second, stated=0xFFFFFFFF), WRITTEN


def name_kinds(good: bytes) -> Iterator[Kind]:
    """Good files with names that are text of any kind."""
    for name in ("a\nb.mp4", "'quoted' \"twice\".mp4", "  spaces  .mp4", "\U0001f3a5.mp4", "-i.mp4", "--help.mp4",
                 "n" * 246 + ".mp4", "caf\udce9.mp4", "a.mp4", "a.mp4.mp4", "a%d.mp4", "$(touch x).mp4", "a;b|c&d.mp4",
                 "\\x41.mp4", "\x1b[31mred.mp4", "data:,a.mp4", "\u202egnp.mp4", "CON.mp4", "*.mp4", "ａ.mp4"):
        yield name, good, WRITTEN


def put_no_files(folder: Path) -> Iterator[tuple[str, str]]:
    """What is named like a file and is none: (name, outcome)."""
    os.mkfifo(folder / "pipe.mp4")
    yield "pipe.mp4", _NO_FILE
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(folder)  # a socket's address is short
        made.bind("socket.mp4")
        os.chdir(before)
    yield "socket.mp4", _NO_FILE
    for name, target, outcome in (("zero.mp4", "/dev/zero", _NO_FILE), ("random.mp4", "/dev/urandom", _NO_FILE),
                                  ("dangling.mp4", "nothing", "can't be opened"),
                                  ("circle.mp4", "circle.mp4", "can't be opened"),
                                  ("far.mp4", "/proc/self/mem", ANY), ("terminal.mp4", "/dev/tty", ANY)):
        (folder / name).symlink_to(target)
        yield name, outcome
    (folder / "folder.mp4").mkdir()
    yield "folder.mp4", "an empty folder, named like a media file"


def put_made(ffmpeg: Any, folder: Path) -> Iterator[tuple[str, str]]:
    """What ffmpeg makes of odd wishes: (name, outcome)."""
    slow, fast = "testsrc2=s=64x48:r=0.1:d=20", "testsrc2=s=16x16:r=1000:d=1"
    jump = "setts=pts=PTS+if(gt(N\\,4)\\,90000000\\,0):dts=DTS+if(gt(N\\,4)\\,90000000\\,0)"
    back = "setts=pts=PTS-if(gt(N\\,4)\\,100000\\,0):dts=DTS-if(gt(N\\,4)\\,100000\\,0)"
    for name, outcome, *arguments in (
            ("0.1 fps.mp4", WRITTEN, "-f", "lavfi", "-i", slow, *_H264), ("1000 fps.mkv", WRITTEN, "-f", "lavfi", "-i",
                                                                         fast, *_H264),
            ("2x2.mp4", WRITTEN, "-f", "lavfi", "-i", "testsrc2=s=2x2:r=5:d=1", "-c:v", "ffv1", "-f", "matroska"),
            ("negative.mkv", ANY, *_PICTURE, *_H264, "-output_ts_offset", -1, "-avoid_negative_ts", "disabled"),
            ("late.ts", WRITTEN, *_PICTURE, *_TONE, *_H264, "-c:a", "mp2", "-output_ts_offset", 90_000),
            ("jump ahead.mkv", "nothing tells the time", *_PICTURE, *_H264, "-bsf:v", jump),
            ("jump back.mkv", ANY, *_PICTURE, *_H264, "-bsf:v", back),
            ("jump back.ts", ANY, *_PICTURE, *_H264, "-bsf:v", back),
            ("title.mkv", WRITTEN, *_PICTURE, *_H264, "-metadata", "title=caf\udce9"),
            ("attachment.mkv", WRITTEN, *_PICTURE, *_H264, "-attach", __file__, "-metadata:s:t", "mimetype=text/plain"),
            ("sound twice.mkv", WRITTEN, *_TONE, *_TONE, "-map", 0, "-map", 1, "-c:a", "flac"),
            ("subtitles.mkv", ANY, "-f", "lavfi", "-i", "anullsrc=d=1", "-t", 0.01, "-c:a", "flac")):
        ffmpeg(*arguments, folder / name)
        yield name, outcome


def put_good(ffmpeg: Any, folder: Path) -> Iterator[str]:
    """Good files of many containers, two seconds each."""
    both = (*_PICTURE, *_TONE)
    for name, arguments in {
            "good.mp4": (*both, *_H264, "-c:a", "aac"), "good.mkv": (*both, *_H264, "-c:a", "flac"),
            "good.webm": (*both, "-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libvorbis"),
            "good.avi": (*both, "-c:v", "mpeg4", "-c:a", "mp2"), "good.ts": (*both, *_H264, "-c:a", "mp2"),
            "fragments.mp4": (*_PICTURE, *_H264, "-movflags", "frag_keyframe+empty_moov"),
            "good.flv": (*_PICTURE, *_H264), "good.ogg": (*_TONE, "-c:a", "libvorbis"),
            "good.mp3": (*_TONE, "-c:a", "libmp3lame"), "good.flac": (*_TONE, "-c:a", "flac"),
            "good.wav": _TONE}.items():
        ffmpeg(*arguments, folder / name)
        yield name


def put_zoo(ffmpeg: Any, folder: Path, real: list[Path]) -> dict[str, str]:
    """Fill a folder: {name: outcome}. `real`: small real files, to be damaged too."""
    expected = dict.fromkeys(put_good(ffmpeg, folder), WRITTEN)
    good = [*((name, (folder / name).read_bytes()) for name in expected),
            *((f"real-{path.name}", path.read_bytes()) for path in real)]
    mp4 = (folder / "good.mp4").read_bytes()
    kinds = [*text_kinds(), *table_kinds(mp4), *picture_kinds(), *sound_kinds(), *name_kinds(mp4),
             *(kind for name, content in good for kind in damaged_kinds(name, content))]
    for name, content, outcome in kinds:
        (folder / name).write_bytes(content)
        assert name not in expected
        expected[name] = outcome
    return expected | dict(put_no_files(folder)) | dict(put_made(ffmpeg, folder))
