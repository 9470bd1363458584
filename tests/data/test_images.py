"""Pictures mean what they say, and a bad file is one ImageError."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from zfcore.data import find_images, load_image, read_image
from zfcore.errors import ArgumentError, DtypeError, ImageError

LEVEL = 1 / 255 + 1e-6  # one 8-bit level


def grey(height=6, width=9):
    """A ramp that tells every pixel from its neighbours and from every flip of itself."""
    return (np.arange(height)[:, None] * 20 + np.arange(width)[None] * 11).astype(np.uint8)


def colour(height=6, width=9):
    g = grey(height, width)
    return np.stack([g, 255 - g, (g.astype(int) * 3 % 256).astype(np.uint8)], axis=-1)


def expected(array):
    """uint8 [H, W] or [H, W, 3] -> [3, H, W] in 0..1"""
    array = np.asarray(array, dtype=np.float64) / 255
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    return torch.from_numpy(array).permute(2, 0, 1).float()


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def luma(array):
    return np.asarray(Image.fromarray(array).convert("L"))


def on_white(array, alpha):
    alpha = alpha[..., None].astype(float) / 255 if array.ndim == 3 else alpha.astype(float) / 255
    return array * alpha + 255 * (1 - alpha)


ALPHA = np.tile(np.array([0, 60, 128, 200, 255, 255, 0, 30, 90], np.uint8), (6, 1))


def _rgba():
    return Image.fromarray(np.dstack([colour(), ALPHA]))


def _la():
    return Image.fromarray(np.dstack([grey(), ALPHA]))


def _palette():
    image = Image.fromarray(colour()).quantize(54)
    return image, np.asarray(image.convert("RGB"))


def _palette_with_transparency():
    image, shown = _palette()
    index = image.getpixel((4, 3))
    image.info["transparency"] = index
    shown = shown.copy()
    shown[np.asarray(image) == index] = 255
    return image, shown


def _bits():
    array = grey() > 100
    return Image.fromarray(array), np.where(array, 255, 0)


def _sixteen(order="<"):
    return (grey().astype(np.uint16) * 257).astype(order + "u2")


# (name, file name, make -> (image, uint8 pixels expected), save options)
GOLDENS = [
    ("L png", "a.png", lambda: (Image.fromarray(grey()), grey()), {}),
    ("RGB png", "a.png", lambda: (Image.fromarray(colour()), colour()), {}),
    ("RGB bmp", "a.bmp", lambda: (Image.fromarray(colour()), colour()), {}),
    ("L bmp", "a.bmp", lambda: (Image.fromarray(grey()), grey()), {}),
    ("RGB ppm", "a.ppm", lambda: (Image.fromarray(colour()), colour()), {}),
    ("L pgm", "a.pgm", lambda: (Image.fromarray(grey()), grey()), {}),
    ("1 pbm", "a.pbm", _bits, {}),
    ("1 png", "a.png", _bits, {}),
    ("1 tiff", "a.tif", _bits, {"compression": "group4"}),
    ("RGB tiff lzw", "a.tiff", lambda: (Image.fromarray(colour()), colour()), {"compression": "tiff_lzw"}),
    ("L tiff", "a.tiff", lambda: (Image.fromarray(grey()), grey()), {}),
    ("RGB webp", "a.webp", lambda: (Image.fromarray(colour()), colour()), {"lossless": True}),
    ("RGBA webp", "a.webp", lambda: (_rgba(), on_white(colour(), ALPHA)), {"lossless": True, "exact": True}),
    ("L gif", "a.gif", lambda: (Image.fromarray(grey()), grey()), {}),
    ("P gif", "a.gif", _palette, {}),
    ("P png", "a.png", _palette, {}),
    ("P png with a transparent colour", "a.png", _palette_with_transparency, {}),
    ("LA png", "a.png", lambda: (_la(), on_white(grey(), ALPHA)), {}),
    ("RGBA png", "a.png", lambda: (_rgba(), on_white(colour(), ALPHA)), {}),
    ("RGBA tiff", "a.tif", lambda: (_rgba(), on_white(colour(), ALPHA)), {}),
    ("I;16 png", "a.png", lambda: (Image.fromarray(_sixteen()), grey()), {}),
    ("I;16 tiff", "a.tif", lambda: (Image.fromarray(_sixteen()), grey()), {}),
    ("I;16B tiff", "a.tif", lambda: (Image.fromarray(_sixteen(">")), grey()), {}),
    ("I;16 pgm", "a.pgm", lambda: (Image.fromarray(_sixteen()), grey()), {}),
    ("F tiff 0..1", "a.tif", lambda: (Image.fromarray((grey() / 255).astype(np.float32)), grey()), {}),
    ("F tiff 0..255", "a.tif", lambda: (Image.fromarray(grey().astype(np.float32)), grey()), {}),
    (
        "CMYK tiff",
        "a.tif",
        lambda: (Image.fromarray(colour()).convert("CMYK"), colour()),
        {},
    ),
    (
        "YCbCr tiff",
        "a.tif",
        lambda: (
            Image.fromarray(colour()).convert("YCbCr"),
            np.asarray(Image.fromarray(colour()).convert("YCbCr").convert("RGB")),
        ),
        {},
    ),
]


@pytest.mark.parametrize("name, file, make, options", GOLDENS, ids=[g[0] for g in GOLDENS])
def test_modes(tmp_path, name, file, make, options):
    image, pixels = make()
    path = saved(tmp_path, image, file, **options)
    read = read_image(path)
    assert read.pixels.dtype == torch.float32 and read.pixels.is_contiguous()
    assert read.size == pixels.shape[:2]
    assert (read.pixels - expected(pixels)).abs().max() <= LEVEL
    one = load_image(path, channels=1)
    assert one.shape == (1, *pixels.shape[:2])
    as_grey = pixels if pixels.ndim == 2 else luma(np.rint(pixels).astype(np.uint8))
    assert (one - expected(as_grey)[:1]).abs().max() <= 2 * LEVEL  # rounded once more by luma


def test_cmyk_jpeg_as_photo_programs_write_it(tmp_path):
    """Adobe's CMYK JPEGs hold inverted inks; read plainly they come out as negatives."""
    flat = np.zeros((16, 16, 3), np.uint8)
    flat[:] = (200, 40, 90)
    path = saved(tmp_path, Image.fromarray(flat).convert("CMYK"), "a.jpg", quality=100)
    assert Image.open(path).mode == "CMYK"
    assert (load_image(path) - expected(flat)).abs().max() <= 4 * LEVEL  # JPEG's own loss


TURNED = {  # orientation -> how the stored pixels must be turned to be upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("file", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_is_applied(tmp_path, orientation, file):
    blocks = np.kron(grey(3, 4), np.ones((16, 16), np.uint8))  # survives JPEG
    stored = np.dstack([blocks] * 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"quality": 100} if file == "a.jpg" else {"lossless": True} if file == "a.webp" else {}
    path = saved(tmp_path, Image.fromarray(stored), file, exif=exif, **lossless)
    upright = TURNED[orientation](stored)
    read = read_image(path)
    assert read.size == upright.shape[:2]
    assert (read.pixels - expected(upright.copy())).abs().max() <= 3 * LEVEL


def test_sixteen_bits_keep_their_precision(tmp_path):
    array = np.array([[0, 1, 2, 300, 65535]], np.uint16)
    pixels = load_image(saved(tmp_path, Image.fromarray(array), "a.png"), channels=1)
    assert torch.allclose(pixels[0], torch.tensor(array / 65535, dtype=torch.float32), atol=1e-7)


def _tiff(array, photometric=1, sample_format=1):
    """A TIFF of one strip, written by hand: the kinds that Pillow does not write."""
    data = array.tobytes()
    height, width = array.shape
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, array.itemsize * 8), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + b"\0\0\0\0"


def test_tiff_kinds_that_pillow_leaves_as_they_are(tmp_path):
    path = tmp_path / "a.tif"
    want = expected(grey())

    path.write_bytes(_tiff(65535 - _sixteen(), photometric=0))
    assert (load_image(path) - want).abs().max() <= LEVEL
    path.write_bytes(_tiff(grey().astype("<u4") * np.uint32(16843009)))
    assert (load_image(path) - want).abs().max() <= LEVEL
    path.write_bytes(_tiff(255 - grey(), photometric=0))
    assert (load_image(path) - want).abs().max() <= LEVEL
    path.write_bytes(_tiff(grey().astype("<i4"), sample_format=2))
    with pytest.raises(ImageError, match="signed"):
        load_image(path)
    path.write_bytes(_tiff(grey().astype("<f4") * 9, sample_format=3))
    with pytest.raises(ImageError, match="float samples"):
        load_image(path)
    nan = (grey() / 255).astype("<f4")
    nan[2, 2] = np.nan
    path.write_bytes(_tiff(nan, sample_format=3))
    with pytest.raises(ImageError, match="float samples"):
        load_image(path)


def test_sixteen_bit_grey_with_a_transparent_level(tmp_path):
    path = saved(tmp_path, Image.fromarray(_sixteen()), "a.png", transparency=int(_sixteen()[2, 3]))
    shown = grey().copy()
    shown[grey() == grey()[2, 3]] = 255
    assert (load_image(path) - expected(shown)).abs().max() <= LEVEL


def test_first_frame_of_an_animation_is_noted(tmp_path):
    frames = [Image.fromarray(grey()), Image.fromarray(255 - grey())]
    for file in ("a.gif", "a.webp", "a.tif", "a.png"):
        options = {"lossless": True} if file == "a.webp" else {}
        path = saved(tmp_path, frames[0], file, save_all=True, append_images=frames[1:], **options)
        read = read_image(path)
        assert (read.pixels - expected(grey())).abs().max() <= LEVEL, file
        assert any("frames" in note for note in read.notes), file
    assert read_image(saved(tmp_path, frames[0], "one.gif")).notes == ()


def test_resizing_is_antialiased_and_centred(tmp_path):
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 255
    path = saved(tmp_path, Image.fromarray(stripes), "a.png")
    small = load_image(path, size=10)
    assert small.shape == (3, 10, 10)
    assert (small - 0.5).abs().max() < 0.05  # without antialiasing: black or white
    halves = np.zeros((20, 60), np.uint8)
    halves[:, 20:40] = 255  # exactly the centre square
    path = saved(tmp_path, Image.fromarray(halves), "b.png")
    assert load_image(path, size=20).min() == 1
    tall = saved(tmp_path, Image.fromarray(halves.T.copy()), "c.png")
    assert load_image(tall, size=(20, 20)).min() == 1
    assert load_image(path, size=(28, 12), channels=1).shape == (1, 28, 12)
    same = load_image(saved(tmp_path, Image.fromarray(colour()), "d.png"), size=(6, 9))
    assert torch.equal(same, expected(colour()))
    assert load_image(saved(tmp_path, Image.fromarray(grey(1, 40)), "e.png"), size=16).shape == (3, 16, 16)


FORMATS = {
    "png": {}, "jpg": {"quality": 90}, "webp": {}, "gif": {}, "bmp": {}, "ppm": {},
    "tif": {"compression": "tiff_lzw"},
}  # fmt: skip


def _picture_bytes(suffix):
    noise = np.random.default_rng(0).integers(0, 255, (37, 41, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    names = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(noise).save(buffer, names.get(suffix, suffix.upper()), **FORMATS[suffix])
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about metadata
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file_is_refused_or_whole(tmp_path, suffix):
    data = _picture_bytes(suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    whole = load_image(path)
    refused = 0
    for part in (1, 4, 10, 30, *range(40, len(data), max(1, len(data) // 25))):
        path.write_bytes(data[:part])
        try:
            # a file may lose its trailer (as PNG's IEND) and still hold every pixel
            assert torch.equal(load_image(path), whole), f"half read at {part} of {len(data)} bytes"
        except ImageError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 20


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about metadata
def test_mutated_files_never_crash(tmp_path):
    """Flipped bytes, cut and doubled stretches: an ImageError or a picture, nothing else."""
    generator = random.Random(7)
    originals = {suffix: _picture_bytes(suffix) for suffix in FORMATS}
    failed = read = 0
    for case in range(315):
        suffix = list(FORMATS)[case % len(FORMATS)]
        data = bytearray(originals[suffix])
        for _ in range(generator.choice((1, 3, 20))):
            at = generator.randrange(min(len(data), 200) if generator.random() < 0.5 else len(data))
            action = generator.random()
            if action < 0.7:
                data[at] = generator.randrange(256)
            elif action < 0.85:
                del data[at : at + generator.randrange(1, 40)]
            else:
                data[at:at] = data[at : at + generator.randrange(1, 40)]
        path = tmp_path / f"{case}.{suffix}"
        path.write_bytes(data)
        try:
            pixels = load_image(path, size=24)
            assert pixels.shape == (3, 24, 24) and pixels.isfinite().all()
            read += 1
        except ImageError as error:
            assert path.name in str(error)
            failed += 1
    assert failed > 50 and read > 20  # both ways were taken


def _bomb(width, height):
    """A PNG that says it is width x height and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "width, height", [(9000, 9000), (12000, 9000), (60000, 60000), (2**31 - 1, 2**31 - 1)]
)
def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(_bomb(width, height))

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageError, match="pixels|limit"):
        load_image(path)


def test_pixel_cap_is_the_callers(tmp_path):
    path = saved(tmp_path, Image.fromarray(grey()), "a.png")
    assert load_image(path, max_pixels=54).shape == (3, 6, 9)
    with pytest.raises(ImageError, match="9 x 6 pixels; expected at most 53"):
        load_image(path, max_pixels=53)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        ("a.png", b"%PDF-1.7\n1 0 obj\n"),
        ("a.jpg", b"SIMPLE  =                    T" + b" " * 2850),
        ("a.gif", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("a.png", b"\0" * 4096),
        ("a.bmp", b"hello"),
    ],
)
def test_other_kinds_are_refused(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match="not a picture of a kind that is read"):
        load_image(path)


def test_the_contents_decide_and_not_the_name(tmp_path):
    path = saved(tmp_path, Image.fromarray(colour()), "a.jpg", format="PNG")
    assert read_image(path).format == "PNG"


def test_what_is_no_file(tmp_path):
    for make, reason in (
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "folder"),
        (lambda p: os.mkfifo(p), "FIFO"),
        (lambda p: p.symlink_to(p), "cannot be opened"),
        (lambda p: p.write_bytes(b""), "empty"),
    ):
        path = tmp_path / f"{reason}.png"
        make(path)
        with pytest.raises(ImageError, match=reason):
            load_image(path)
    with pytest.raises(ImageError, match="/dev/zero.*a device"):
        load_image("/dev/zero")
    with pytest.raises(ImageError, match="cannot be opened"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        load_image("n" * 5000)


def test_a_control_character_in_a_name_stays_inert(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a\x1b[31m\nb.png")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"size": 0}, ArgumentError), ({"size": (3,)}, ArgumentError), ({"size": (3, -1)}, ArgumentError),
        ({"size": 2.5}, DtypeError), ({"size": True}, DtypeError), ({"channels": 2}, ArgumentError),
        ({"channels": True}, ArgumentError), ({"max_pixels": 0}, ArgumentError),
        ({"max_pixels": "9"}, DtypeError),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, options, error):
    path = saved(tmp_path, Image.fromarray(grey()), "a.png")
    with pytest.raises(error, match=next(iter(options))):
        load_image(path, **options)


def test_a_path_must_be_one():
    with pytest.raises(DtypeError, match="path"):
        load_image(3.5)


def test_find_images(tmp_path):
    def touch(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        return str(path)

    b, a = touch("in/b.PNG"), touch("in/a.jpeg")
    deep = touch("in/sub/deeper/c.tiff")
    text = touch("in/notes.txt")
    named = touch("strange.name")
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in/self.png").symlink_to(tmp_path / "in/self.png")
    found = find_images([named, tmp_path / "in", str(tmp_path / "missing.png")])
    assert found.files == [named, a, b, deep, str(tmp_path / "missing.png")]
    assert found.others == [text]
    reasons = {os.path.basename(path): reason for path, reason in found.skipped}
    assert set(reasons) == {"pipe.png", "gone.png", "self.png"}
    assert "FIFO" in reasons["pipe.png"] and "leads nowhere" in reasons["gone.png"]
    assert find_images([]) == ([], [], [])


def test_find_images_of_a_very_deep_folder(tmp_path):
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"x")
    assert find_images([tmp_path]).files == [str(folder / "a.png")]
