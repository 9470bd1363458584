"""Reading any file takes at most 10 s and 1 GB: at the limit of 2^26 pixels, and of files made to be slow.

Each case reads in a process of its own, which reports its peak (VmHWM, with Python and torch in it) and its
processor time. ZFCORE_ATTACK=1 runs all of them, some minutes; without it a few that cover the kinds.
"""

import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import picture_files as files
import pytest
from PIL import Image

from zfcore.data import read_image
from zfcore.data.formats import libtiff
from zfcore.errors import ImageError

ATTACK = os.environ.get("ZFCORE_ATTACK") == "1"
heavy = pytest.mark.skipif(not ATTACK, reason="heavy: ZFCORE_ATTACK=1 runs it")
no_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc: no peak to read")

SECONDS, BYTES = 10, 10**9
SIDE = 2**13

CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
from zfcore.data import read_image
from zfcore.errors import ImageError
options = json.loads(sys.argv[2])
begin = time.process_time()
try:
    picture = read_image(sys.argv[1], **options)
    result = [list(picture.pixels.shape), float(picture.pixels[:, :9, :9].mean()), None]
except ImageError as error:
    result = [None, None, str(error)]
seconds = time.process_time() - begin
(peak,) = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([*result, seconds, peak]))
"""


def measured(path, **options):
    """(shape, mean, refusal) of reading a file in a process of its own, which keeps the bounds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    shape, mean, refusal, seconds, peak = json.loads(done.stdout)
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert peak < BYTES, f"{peak / 1e6:.0f} MB"
    return shape, mean, refusal


def large_png(path, depth, colour, count, *, width=SIDE, height=SIDE, extra=(), seed=0):
    """Rows that are all alike, each pixel its left neighbour and a little more: slow to undo, quick to write."""
    row = (
        b"\4"
        + np.random.default_rng(seed).integers(0, 9, (width * depth * count + 7) // 8, np.uint8).tobytes()
    )
    packer = zlib.compressobj(1)
    step = max(1, 2**22 // len(row))
    data = b"".join(packer.compress(row * min(step, height - top)) for top in range(0, height, step))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + files.chunk(b"IHDR", header)
        + b"".join(files.chunk(*pair) for pair in extra)
        + files.chunk(b"IDAT", data + packer.flush())
        + files.chunk(b"IEND", b"")
    )


PALETTE = (b"PLTE", bytes(range(256)) * 3)
KEY = (b"tRNS", b"\0\7\0\7\0\7")
PNGS = {  # name: depth, colour type, samples, further chunks
    "LA": (8, 4, 2), "RGBA": (8, 6, 4), "L": (8, 0, 1), "RGB": (8, 2, 3), "P": (8, 3, 1, PALETTE),
    "P with alphas": (8, 3, 1, PALETTE, (b"tRNS", bytes(range(256)))), "L with a key": (8, 0, 1, (b"tRNS", b"\0\7")),
    "RGB with a key": (8, 2, 3, KEY), "L 16": (16, 0, 1), "LA 16": (16, 4, 2), "RGB 16": (16, 2, 3),
    "RGBA 16": (16, 6, 4), "1": (1, 0, 1),
}  # fmt: skip
QUICK = ("LA", "RGBA")


@no_proc
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else heavy) for k in PNGS])
def test_png_at_the_limit(tmp_path, kind):
    depth, colour, count, *extra = PNGS[kind]
    large_png(tmp_path / "a.png", depth, colour, count, extra=extra)
    shape, mean, refusal = measured(tmp_path / "a.png", size=64)
    assert shape == [3, 64, 64] and 0 < mean <= 1, refusal


@no_proc
def test_gif_with_transparency_at_the_limit(tmp_path):
    flat = Image.new("P", (SIDE, SIDE), 3)
    flat.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9, 0, 0, 255])
    flat.paste(1, (0, 0, SIDE // 2, SIDE))
    flat.save(tmp_path / "a.gif", transparency=1, save_all=True, append_images=[flat.copy()])
    shape, mean, refusal = measured(tmp_path / "a.gif", size=64)
    assert shape == [3, 64, 64] and mean == 1, refusal


@no_proc
@pytest.mark.parametrize("width, height", [(1, 2**26), (2**26, 1)])
def test_sides_out_of_proportion_are_refused(tmp_path, width, height):
    large_png(tmp_path / "a.png", 8, 0, 1, width=width, height=height)
    _, _, refusal = measured(tmp_path / "a.png", size=64)
    assert f"{width} x {height} pixels; expected sides of at most 1048576" in refusal


@no_proc
@heavy
@pytest.mark.parametrize("width, height", [(64, 2**20), (2**20, 64)])
def test_the_longest_sides(tmp_path, width, height):
    large_png(tmp_path / "a.png", 8, 6, 4, width=width, height=height)
    assert measured(tmp_path / "a.png", size=64)[0] == [3, 64, 64]


@no_proc
@heavy
def test_without_a_size(tmp_path):
    """What is returned counts too: 12 bytes a pixel, so half as many pixels without being asked."""
    large_png(tmp_path / "a.png", 8, 6, 4)
    refusal = measured(tmp_path / "a.png")[2]
    assert "8192 x 8192 pixels; expected at most 33554432 without size= (max_pixels= allows more)" in refusal
    large_png(tmp_path / "b.png", 8, 0, 1)
    assert measured(tmp_path / "b.png", channels=1)[0] == [1, SIDE, SIDE]
    large_png(tmp_path / "c.png", 8, 6, 4, height=SIDE // 2)
    assert measured(tmp_path / "c.png")[0] == [3, SIDE // 2, SIDE]


def noise(height=SIDE, width=SIDE):
    tile = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    return Image.fromarray(np.tile(tile, (height // 512, width // 512, 1)))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


LARGE = {
    "baseline.jpg": (lambda: noise(), {"quality": 90, "subsampling": 0}),
    "turned.jpg": (lambda: noise(), {"quality": 75, "exif": turned(6)}),
    "progressive.jpg": (lambda: noise(), {"quality": 75, "subsampling": 0, "progressive": True}),
    "inks.jpg": (lambda: noise().convert("CMYK"), {"quality": 75}),
    "grey.gif": (lambda: noise().convert("L"), {}),
    "a.tif": (lambda: noise().convert("RGBA"), {}),
    "turned.tif": (lambda: noise(), {"exif": turned(6)}),
    "lzw.tif": (lambda: noise(), {"compression": "tiff_lzw"}),
    "deflate.tif": (lambda: noise(), {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": (lambda: noise(), {"compression": "jpeg"}),
    "floats.tif": (lambda: noise().convert("L").convert("F"), {}),
    "inks.tif": (lambda: noise().convert("CMYK"), {}),
    "a.bmp": (lambda: noise(), {}),
    "a.ppm": (lambda: noise(), {}),
    "half.webp": (lambda: noise(SIDE // 2), {"quality": 50, "method": 0}),
    "lossless.webp": (lambda: noise(SIDE // 2), {"lossless": True, "quality": 0, "method": 0}),
}


@no_proc
@heavy
@pytest.mark.parametrize("name", LARGE)
def test_large_pictures_of_every_kind(tmp_path, monkeypatch, name):
    monkeypatch.setattr("PIL.ImageFile.MAXBLOCK", 2**28)
    make, options = LARGE[name]
    make().save(tmp_path / name, **options)
    shape, mean, refusal = measured(tmp_path / name, size=64)
    assert shape == [3, 64, 64] and 0.2 < mean < 0.8, refusal


@no_proc
@heavy
def test_kinds_that_take_too_much_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.MAXBLOCK", 2**28)
    noise().convert("CMYK").save(tmp_path / "a.jpg", progressive=True)
    assert re.search("JPEG takes about 8.. MB; expected at most 705", measured(tmp_path / "a.jpg", size=9)[2])
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.webp", quality=1, method=0)
    assert re.search(
        "WEBP takes about 1... MB; expected at most 705", measured(tmp_path / "a.webp", size=9)[2]
    )


# JPEG: scans


def progressive(side, **options):
    """A progressive JPEG, cut before its end, and its last scan."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 40)).save(buffer, "JPEG", progressive=True, **options)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2], data[last:-2]


@no_proc
def test_scans_are_counted_before_they_are_decoded(tmp_path):
    begin, scan = progressive(SIDE)
    (tmp_path / "a.jpg").write_bytes(begin + 1000 * scan + b"\xff\xd9")
    _, _, refusal = measured(tmp_path / "a.jpg", size=64)
    assert "a JPEG of more than 24 scans over 67108864 pixels; expected fewer" in refusal
    (tmp_path / "b.jpg").write_bytes(begin + 14 * scan + b"\xff\xd9")
    shape, _, refusal = measured(tmp_path / "b.jpg", size=64)
    assert shape == [3, 64, 64], refusal


def test_scans_are_those_of_the_picture_itself(tmp_path):
    """Neither those of a thumbnail, nor bytes of pixels and comments that look like one, nor what follows."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=100, progressive=True, restart_marker_blocks=1)
    data = buffer.getvalue()
    assert data.count(b"\xff\x00") > 9
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    want = read_image(path).pixels

    markers = b"\xff\xda\0\x08" * 2000
    exif = b"\xff\xe1" + struct.pack(">H", len(markers) + 8) + b"Exif\0\0" + markers
    comment = b"\xff\xfe" + struct.pack(">H", len(markers) + 2) + markers
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:2] + exif + data[2:last] + comment + b"\xff" * 9 + data[last:] + markers)
    assert (read_image(path).pixels == want).all()

    scan = data[last:-2]
    path.write_bytes(data[:-2] + 100 * scan + b"\xff\xd9")
    with pytest.raises(ImageError, match="more than 100 scans over 4096 pixels"):
        read_image(path)
    for cut in range(last, last + len(scan), 7):  # a file that ends anywhere
        path.write_bytes(data[:cut])
        with pytest.raises(ImageError, match="damaged or truncated"):
            read_image(path)


def test_scans_in_strips_of_a_tiff_are_counted(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 9).save(buffer, "JPEG", progressive=True)
    strip = buffer.getvalue()
    tags = [(256, 3, [64]), (257, 3, [64]), (258, 3, [8]), (259, 3, [7]), (262, 3, [1]), (273, 4, [8]),
            (277, 3, [1]), (278, 3, [64]), (279, 4, [len(strip)])]  # fmt: skip
    (tmp_path / "a.tif").write_bytes(files.tiff_of(strip, tags))
    with pytest.raises(ImageError, match="a TIFF of progressive JPEG"):
        read_image(tmp_path / "a.tif")
    Image.new("L", (64, 64), 9).save(tmp_path / "b.tif", compression="jpeg")
    assert abs(float(read_image(tmp_path / "b.tif").pixels.mean()) - 9 / 255) < 0.01


# Files made to be slow, or to take memory


def blocks(data):
    return b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))


def png_of(*chunks, side=1, data=b"\0\0"):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = files.chunk(b"IDAT", zlib.compress(data, 1))
    return (
        b"\x89PNG\r\n\x1a\n"
        + files.chunk(b"IHDR", header)
        + b"".join(chunks)
        + packed
        + files.chunk(b"IEND", b"")
    )


def empty_deflate():
    """A deflate block with tables of its own and no byte in it: 90 bits, four of them 45 bytes."""
    bits = []

    def put(value, count):
        bits.extend(value >> i & 1 for i in range(count))

    put(0, 1), put(2, 2), put(0, 5), put(0, 5), put(14, 4)  # not the last; 257 and 1 codes; 18 lengths
    for symbol in [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1]:
        put(symbol in (18, 1), 3)
    put(1, 1), put(138 - 11, 7), put(1, 1), put(118 - 11, 7), put(0, 1), put(0, 1), put(0, 1)
    return np.packbits(np.array(bits * 4, np.uint8), bitorder="little").tobytes()


def repeated_tags():
    """A directory whose entries all name the same bytes."""
    stretch = bytes(2 * 10**6)
    data = files.tiff(np.zeros((1, 1, 1), np.uint8), 8, more=[(40000 + i, 7, [0] * 5) for i in range(3000)])
    at = struct.unpack_from("<I", data, 4)[0] + 2
    entries = bytearray(data[at : at + 12 * 3012])
    for entry in range(0, len(entries), 12):
        if struct.unpack_from("<H", entries, entry)[0] >= 40000:
            struct.pack_into("<II", entries, entry + 4, len(stretch), 8)
    return data[:at] + entries + data[at + len(entries) :] + stretch


def exif_of_repeats():
    """5,000 EXIF entries of 60,000 bytes each, all the same bytes."""
    entries = b"".join(struct.pack("<HHII", 40000 + i, 7, 60000, 0) for i in range(5000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries + bytes(5000)
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[20:]


def many_frames():
    one = files.gif(np.zeros((9, 9), int), [[9, 9, 9]])
    frame = one.index(b",", 13 + 384)
    return one[:frame] + one[frame:-1] * 200_000 + b";"


def huge_tile():
    tags = [(256, 3, [10]), (257, 3, [10]), (258, 3, [8]), (259, 3, [8]), (262, 3, [1]), (277, 3, [1]),
            (322, 4, [30000]), (323, 4, [30000]), (324, 4, [8]), (325, 4, [900])]  # fmt: skip
    return files.tiff_of(zlib.compress(bytes(10**6))[:900], tags)


def looped_directory():
    data = files.tiff(np.full((2, 2, 1), 255, np.uint8), 8)
    at = struct.unpack_from("<I", data, 4)[0]
    end = at + 2 + 12 * struct.unpack_from("<H", data, at)[0]
    return data[:end] + struct.pack("<I", at) + data[end + 4 :]


def run_bmp(runs):
    return files.bmp(np.zeros((1, 1), int), 8, palette=[[9, 9, 9]] * 256, code=runs, compression=1)[:18]


SLOW = {  # name: (file, the refusal's words or None for a picture)
    "text.png": (lambda: png_of(files.chunk(b"tEXt", b"a\0b") * 300_000), "over 262144 PNG chunks"),
    "inflated text.png": (lambda: png_of(files.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24))) * 99), None),
    "comment.gif": (lambda: files.gif(np.zeros((9, 9), int), [[9, 9, 9]], before=b"!\xfe" + blocks(bytes(10**7)) + b"\0"), None),
    "frames.gif": (many_frames, None),
    "tags.tif": (repeated_tags, "takes about 1.... MB"),
    "tile.tif": (huge_tile, "tiles of 30000 x 30000"),
    "loop.tif": (looped_directory, None),
    "exif.jpg": (exif_of_repeats, None),
    "plain.ppm": (lambda: b"P2\n2048 2048\n255\n" + b"1 2 3 4 " * 2**20, None),
    "comments.pgm": (lambda: b"P2\n9 9\n255\n" + b"#\n" * 10**6 + b"1 " * 81, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_what_does_not_decide_the_pixels_costs_nothing(tmp_path, name):
    """In this process: a few seconds would be noticed, and the peak is that of all the tests."""
    make, words = SLOW[name]
    (tmp_path / name).write_bytes(make())
    if words:
        with pytest.raises(ImageError, match=words):
            read_image(tmp_path / name)
    else:
        assert read_image(tmp_path / name, size=9).pixels.isfinite().all()


STOPPED = {
    "empty blocks.png": lambda: png_of(side=SIDE)[:33] + files.chunk(b"IDAT", b"\x78\x01" + empty_deflate() * 5 * 10**6),
    "empty blocks.tif": lambda: files.tiff_of(
        b"\x78\x01" + empty_deflate() * 2 * 10**6,
        [(256, 3, [SIDE]), (257, 3, [SIDE]), (258, 3, [8]), (259, 3, [8]), (262, 3, [1]), (273, 4, [8]),
         (277, 3, [1]), (278, 3, [SIDE]), (279, 4, [2 + 90 * 10**6])]),
    "text.ppm": lambda: b"P3\n8192 8192\n255\n" + b"1 2 3 " * SIDE**2,
    "runs.bmp": lambda: run_bmp(b"")[:14] + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 8, 1, 0, 0, 0, 0, 0)
    + bytes(1024) + b"\1\1" * 2 * 10**6,
    "clears.gif": lambda: files.gif(np.zeros((1, 1), int), [[9, 9, 9]])[:6] + struct.pack("<HHBBB", SIDE, SIDE, 0, 0, 0)
    + b"," + struct.pack("<HHHHB", 0, 0, SIDE, SIDE, 0) + b"\x08" + blocks(b"\0\2\4\x08\x10\x20\x40\x80\1" * 10**7) + b"\0;",
}  # fmt: skip


@no_proc
@heavy
@pytest.mark.parametrize("name", STOPPED)
def test_slow_files_at_the_limit_end_in_time(tmp_path, name):
    (tmp_path / name).write_bytes(STOPPED[name]())
    shape, _, refusal = measured(tmp_path / name, size=64)
    assert shape == [3, 64, 64] or refusal


def test_a_decoder_is_stopped_when_its_time_is_over(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    monkeypatch.setattr("zfcore.data.images._SECONDS", 0)
    with pytest.raises(ImageError, match="decoding takes too long"):
        read_image(tmp_path / "a.png")


def test_libtiff_is_quiet_about_damaged_files(tmp_path, capfd):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
        buffer, "TIFF", compression="tiff_lzw"
    )
    data = bytearray(buffer.getvalue())
    generator, refused = random.Random(1), 0
    for _ in range(40):
        at = generator.randrange(8, len(data) - 200)
        (tmp_path / "a.tif").write_bytes(data[:at] + bytes(8) + data[at + 8 :])
        try:
            read_image(tmp_path / "a.tif")
        except ImageError:
            refused += 1
    assert refused
    assert capfd.readouterr().err == ""


def test_libtiff_gets_its_handlers_back(tmp_path):
    setters = libtiff._setters()
    if not setters:
        pytest.skip("no libtiff to be found in this Pillow")

    def handlers():
        found = [setter(None) for setter in setters]
        for setter, handler in zip(setters, found, strict=True):
            setter(handler)
        return found

    before = handlers()
    (tmp_path / "a.tif").write_bytes(files.tiff(np.ones((9, 9, 1), np.uint8), 8, compression=8))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [tmp_path / "a.tif"] * 200))
        with libtiff.quiet():
            assert handlers() == [None, None]
    assert handlers() == before


ORIGINALS = {
    "tiff planes": lambda: files.tiff(np.arange(300, dtype=np.uint8).reshape(10, 10, 3), 8, 2, planar=2),
    "tiff tiles": lambda: files.tiff(np.arange(400, dtype=np.uint16).reshape(20, 20, 1), 16, tile=16, compression=8),
    "tiff big-endian": lambda: files.tiff(np.ones((9, 9, 4), np.uint8), 8, 2, order=">", extra_samples=(2,)),
    "png key": lambda: files.png(np.arange(64).reshape(8, 8, 1) % 4, 2, 0, (b"tRNS", b"\0\1")),
    "bmp masks": lambda: files.bmp(np.arange(64).reshape(8, 8), 16, masks=(0xF00, 0xF0, 0xF, 0xF000), header=108),
    "bmp runs": lambda: files.bmp(np.zeros((9, 9), int), 8, palette=[[9, 9, 9]] * 256, code=b"\x09\1\0\0" * 9, compression=1),
    "gif": lambda: files.gif(np.arange(64).reshape(8, 8), [[i, i, 0] for i in range(128)], transparent=3, screen=(20, 20)),
    "plain": lambda: b"P3 # x\n4 4\n99\n" + b"1 22 # y\n33 " * 16,
    "floats": lambda: b"Pf\n4 4\n-1\n" + np.arange(16, dtype="<f4").tobytes(),
    "progressive": lambda: progressive(16)[0] + b"\xff\xd9",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about metadata
@pytest.mark.parametrize("kind", ORIGINALS)
def test_mutated_files_of_every_kind_never_crash(tmp_path, kind):
    """Flipped bytes, cut and doubled stretches: an ImageError or a picture, nothing else."""
    original, generator = ORIGINALS[kind](), random.Random(7)
    path = tmp_path / "a"
    path.write_bytes(original)
    read_image(path)
    failed = 0
    for _ in range(2000 if ATTACK else 100):
        data = bytearray(original)
        for _ in range(generator.choice((1, 3, 20))):
            at = generator.randrange(len(data))
            action = generator.random()
            if action < 0.7:
                data[at] = generator.randrange(256)
            elif action < 0.85:
                del data[at : at + generator.randrange(1, 40)]
            else:
                data[at:at] = data[at : at + generator.randrange(1, 40)]
            data = data or bytearray(b"?")
        path.write_bytes(data)
        try:
            pixels = read_image(path, size=8).pixels
            assert pixels.shape == (3, 8, 8) and pixels.isfinite().all()
        except ImageError as error:
            assert str(path) in str(error)
            failed += 1
    assert failed
