"""Every kind of samples that the formats know: the right values, or a refusal that says what is not read."""

import io
import itertools
import struct

import numpy as np
import picture_files as files
import pytest
from PIL import Image

from zfcore.data import read_image
from zfcore.errors import ImageError

LEVEL = 1 / 255 + 1e-6
EXACT = 1e-6


@pytest.fixture
def read(tmp_path):
    def read(data, **options):
        path = tmp_path / "picture"
        path.write_bytes(data)
        return read_image(path, **options).pixels.permute(1, 2, 0).double().numpy()

    return read


def samples(height, width, count, bits, seed=0):
    """[H, W, S] of all levels, the darkest and the lightest among them."""
    kind = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    array = np.random.default_rng(seed).integers(0, 2**bits, (height, width, count)).astype(kind)
    array[0, :2] = [[0], [2**bits - 1]]
    return array


def rgb(array):
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


# PNG

PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


@pytest.mark.parametrize("colour, depth", [(c, d) for c in PNG_DEPTHS for d in PNG_DEPTHS[c]])
def test_png(read, colour, depth):
    array = samples(5, 11, PNG_SAMPLES[colour], depth)
    levels = array / (2**depth - 1)
    extra = []
    if colour == 3:
        palette = samples(1, 2**depth, 3, 8, seed=1)[0]
        extra = [(b"PLTE", palette.tobytes())]
        levels = palette[array[..., 0]] / 255
    elif colour in (4, 6):
        alpha = levels[..., -1:]
        levels = levels[..., :-1] * alpha + 1 - alpha
    ours = read(files.png(array, depth, colour, *extra))
    # of 16-bit colour and of its alpha the high bytes count
    tolerance = EXACT if depth <= 8 and colour in (0, 2, 3) else LEVEL if depth <= 8 else 1.6 * LEVEL
    assert np.abs(ours - rgb(levels)).max() <= tolerance
    if (colour, depth) == (0, 16):
        assert np.abs(ours - rgb(levels)).max() <= EXACT


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_with_a_transparent_grey(read, depth):
    array = samples(5, 11, 1, depth)
    for key in {0, 1, 2 ** (depth - 1), 2**depth - 1, int(array[2, 3, 0])}:
        want = np.where(array == key, 1, array / (2**depth - 1))
        # where the depth is less than 16 the higher bits of the key do not count
        for written in (key, key | 0x8000 if depth < 16 else key):
            ours = read(files.png(array, depth, 0, (b"tRNS", struct.pack(">H", written))))
            assert np.abs(ours - rgb(want)).max() <= EXACT, (key, written)


def test_png_with_a_transparent_colour(read):
    array = samples(5, 11, 3, 8)
    array[3, 4] = array[1, 1]
    key = array[1, 1].astype(">u2").tobytes()
    want = np.where((array == array[1, 1]).all(-1, keepdims=True), 255, array) / 255
    assert want[3, 4].min() == 1 and (want != array / 255).any(-1).sum() == 2
    assert np.abs(read(files.png(array, 8, 2, (b"tRNS", key))) - want).max() <= EXACT
    with pytest.raises(ImageError, match="transparent colour among 16-bit colours"):
        read(files.png(samples(5, 11, 3, 16), 16, 2, (b"tRNS", key)))
    with pytest.raises(ImageError, match="tRNS chunk of 2 bytes"):
        read(files.png(array, 8, 2, (b"tRNS", b"\0\1")))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_with_a_palette_of_alphas(read, depth):
    array = samples(5, 11, 1, depth)
    palette = samples(1, 2**depth, 3, 8, seed=1)[0]
    for alphas in (b"\0", b"\xff\0", bytes(range(1, 2**depth)), b"\x80" * 2**depth):
        alpha = np.full(2**depth, 255)
        alpha[: len(alphas)] = list(alphas)
        laid = (palette * alpha[:, None] + 255 * (255 - alpha[:, None])) / 255
        data = files.png(array, depth, 3, (b"PLTE", palette.tobytes()), (b"tRNS", alphas))
        assert np.abs(read(data) - laid[array[..., 0]] / 255).max() <= LEVEL / 2 + EXACT


def test_png_of_sixteen_bit_colour_says_that_it_is_cut(tmp_path):
    for colour in (2, 4, 6):
        (tmp_path / "a.png").write_bytes(files.png(samples(5, 11, PNG_SAMPLES[colour], 16), 16, colour))
        assert read_image(tmp_path / "a.png").notes == ("16-bit colour: read as 8 bits",)


def test_png_samples_are_taken_as_they_stand(read):
    """No gamma and no profile is applied, nor is text looked at."""
    array = samples(5, 11, 3, 8)
    extra = [
        (b"gAMA", struct.pack(">I", 100000)),
        (b"sRGB", b"\0"),
        (b"iCCP", b"x\0\0broken"),
        (b"zTXt", b"?"),
    ]
    assert np.abs(read(files.png(array, 8, 2, *extra)) - array / 255).max() <= EXACT


@pytest.mark.parametrize(
    "extra, words",
    [
        ([(b"tRNS", b"\0\1"), (b"tRNS", b"\0\1")], "two tRNS"),
        ([(b"UNKN", b"")], "unknown PNG chunk"),
        ([(b"t1me", b"")], "chunk without a name"),
    ],
)
def test_png_chunks_that_nobody_may_write(read, extra, words):
    with pytest.raises(ImageError, match=words):
        read(files.png(samples(5, 11, 1, 8), 8, 0, *extra))


# TIFF

WHITE, BLACK, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {WHITE: 1, BLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, 8: 3}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
LAYOUTS = ({}, {"rows_per_strip": 3}, {"tile": 16})


def tiff_pixels(array, bits, photometric, extra, palette=None):
    """[H, W, 3] by the words of TIFF 6.0."""
    levels = array / (1 if array.dtype.kind == "f" else 2.0**bits - 1)
    count = COLOURS[photometric]
    colour = levels[..., :count]
    if photometric == WHITE:
        colour = 1 - colour
    elif photometric == PALETTE:
        colour = palette[array[..., 0]] / 65535
    elif photometric == CMYK:
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    elif photometric == YCBCR:
        y, blue, red = np.moveaxis(255 * colour, -1, 0)
        colour = [y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128), y + 1.772 * (blue - 128)]  # fmt: skip
        colour = np.clip(np.stack(colour, -1), 0, 255) / 255
    for index, meaning in enumerate(extra):
        if meaning in (1, 2):
            alpha = levels[..., count + index][..., None]
            return np.clip(rgb(colour * (alpha if meaning == 2 else 1) + 1 - alpha), 0, 1)
    return rgb(colour)


def must_read(photometric, bits, form, extra, planar):
    """What documents promise: common kinds, in either order of bytes, raw or compressed."""
    if planar == 2:
        return bits == 8 and form == UNSIGNED and photometric == RGB and extra in ((), (2,))
    if form == UNSIGNED and not extra:
        depths = {BLACK: (1, 2, 4, 8, 16), WHITE: (1, 2, 4, 8), RGB: (8, 16), PALETTE: (1, 2, 4, 8), CMYK: (8,), YCBCR: (8,)}  # fmt: skip
        return bits in depths.get(photometric, ())
    if form == UNSIGNED:
        return photometric == RGB and (bits, extra) in ((8, (0,)), (8, (1,)), (8, (2,)), (16, (2,)))
    return False


TIFF_KINDS = [
    (photometric, extra, bits, form)
    for photometric, extra, bits, form in itertools.product(
        COLOURS,
        ((), (0,), (1,), (2,)),
        (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64),
        (UNSIGNED, SIGNED, FLOAT),
    )
    if (form == UNSIGNED or bits in (8, 16, 32, 64)[form == FLOAT :])
    and not (photometric == PALETTE and (bits > 16 or form != UNSIGNED))
    and not (form != UNSIGNED and (extra or photometric not in (WHITE, BLACK, RGB)))
]


@pytest.mark.parametrize("photometric, extra, bits, form", TIFF_KINDS)
def test_tiff(read, photometric, extra, bits, form):
    count = COLOURS[photometric] + len(extra)
    if form == FLOAT:
        array = np.random.default_rng(0).random((7, 21, count)).astype(f"f{bits // 8}")
    elif form == SIGNED or bits == 64:
        array = np.random.default_rng(0).integers(-99, 99, (7, 21, count)).astype(f"i{bits // 8}")
    else:
        array = samples(7, 21, count, bits)
        if 1 in extra:  # multiplied by alpha
            array[..., :-1] = np.minimum(array[..., :-1], array[..., -1:])
    more, palette = [], None
    if photometric == PALETTE:
        palette = np.random.default_rng(1).integers(0, 65536, (2**bits, 3))
        more = [(320, 3, palette.T.reshape(-1).tolist())]
    if photometric == YCBCR:
        more = [(530, 3, [1, 1])]
    exact = bits > 8 and photometric in (WHITE, BLACK) and form == UNSIGNED or form == FLOAT
    tolerance = EXACT if exact else 3 * LEVEL if photometric == YCBCR else 1.6 * LEVEL
    for order, planar, compression, layout in itertools.product("<>", (1, 2), (1, 8), LAYOUTS):
        if planar == 2 and count == 1 or layout and bits % 8:
            continue
        options = {"order": order, "planar": planar, "compression": compression, "form": form}
        data = files.tiff(array, bits, photometric, more=more, extra_samples=extra, **options, **layout)
        try:
            ours = read(data)
        except ImageError as error:
            assert "damaged" not in str(error), (options, layout)
            assert not must_read(photometric, bits, form, extra, planar), (options, layout, error)
        else:
            assert form != SIGNED and bits != 64
            want = tiff_pixels(array, bits, photometric, extra, palette)
            assert np.abs(ours - want).max() <= tolerance, (options, layout)


def test_tiff_of_twelve_bits(read):
    array = np.array([[[0], [1000], [4094], [4095]]], np.uint16)
    for compression in (1, 8, 32773):
        assert np.abs(read(files.tiff(array, 12, compression=compression)) - array / 4095).max() <= EXACT


@pytest.mark.parametrize(
    "array, bits, photometric, options, words",
    [
        (np.array([[[-128], [-1], [0], [127]]], np.int8), 8, 1, {"form": 2}, "signed integer samples"),
        (np.array([[[0], [0.25], [1]]]), 64, 1, {"form": 3}, "64-bit float samples in a TIFF; expected 32"),
        (np.array([[[0], [0.25], [1]]], np.float16), 16, 1, {"form": 3}, "16-bit float samples"),
        (
            np.ones((2, 2, 3), np.float32),
            32,
            2,
            {"form": 3},
            "32-bit colour samples|float samples of a colour",
        ),
        (np.ones((2, 2, 3), np.uint16), 16, 2, {"planar": 2}, "16-bit colour samples, in separate planes"),
        (np.ones((2, 2, 1), np.uint16), 10, 1, {}, "10-bit grey samples in a TIFF; expected 1, 2, 4, 8, 12"),
        (np.ones((2, 2, 3), np.uint8), 8, 8, {}, r"CIE L\*a\*b\*"),
        (np.ones((2, 2, 3), np.uint8), 8, 6, {}, "subsampled"),
        (np.ones((2, 2, 1), np.uint8), 8, 1, {"form": 4}, "sample format 4"),
        (np.ones((2, 2, 1), np.uint8), 8, 1, {"compression": 34925}, "compression 34925"),
        (np.ones((2, 2, 1), np.uint8), 8, 1, {"compression": 32773, "predictor": 2}, "predictor 2"),
        (np.ones((2, 2, 4), np.uint16), 16, 2, {"extra_samples": (1,)}, "multiplied by alpha"),
        (np.ones((2, 2, 1), np.uint8), 8, 3, {"more": [(320, 3, [200] * 768)]}, "palette of 8-bit values"),
        (np.ones((2, 2, 5), np.uint8), 8, 2, {}, "5 samples a pixel that does not say"),
    ],
)
def test_tiff_kinds_that_are_refused_by_name(read, array, bits, photometric, options, words):
    with pytest.raises(ImageError, match=words):
        read(files.tiff(array, bits, photometric, **options))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_tiff_with_a_predictor(read, bits):
    array = samples(7, 21, 1, bits)
    ours = read(files.tiff(array, bits, compression=8, predictor=2, rows_per_strip=3))
    assert np.abs(ours - array / (2**bits - 1)).max() <= EXACT


def test_tiff_with_its_bits_turned_round(read):
    array = samples(7, 21, 1, 1)
    for photometric in (WHITE, BLACK):
        ours = read(files.tiff(array, 1, photometric, fill_order=2))
        assert np.array_equal(ours, rgb(array if photometric == BLACK else 1 - array))
    with pytest.raises(ImageError, match="turned round"):
        read(files.tiff(samples(7, 21, 1, 8), 8, fill_order=2))


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation(read, orientation, compression):
    array = samples(4, 7, 3, 8)
    turned = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1),
        6: np.rot90(array, -1), 7: array.swapaxes(0, 1)[::-1, ::-1], 8: np.rot90(array, 1),
    }[orientation]  # fmt: skip
    data = files.tiff(array, 8, 2, orientation=orientation, compression=compression)
    assert np.abs(read(data) - turned / 255).max() <= EXACT


# PBM, PGM, PPM, PFM


@pytest.mark.parametrize("maxval", [1, 2, 15, 100, 254, 255, 256, 1000, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_pnm(read, maxval, channels, plain):
    array = np.random.default_rng(0).integers(0, maxval + 1, (5, 7, channels))
    magic = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[channels, plain]
    if plain:
        body = "# a comment\n" + " ".join(map(str, array.reshape(-1).tolist())).replace(
            " ", "\n#7 8 9\r\n", 1
        )
        body = body.encode()
    else:
        body = array.astype(np.uint8 if maxval < 256 else ">u2").tobytes()
    data = f"P{magic} # why\n7\t5\n{maxval}\n".encode() + body
    error = np.abs(read(data) - rgb(array / maxval)).max()
    assert error <= (EXACT if channels == 1 or maxval in (1, 15, 255) else LEVEL / 2 + EXACT)
    with pytest.raises(ImageError, match="too early"):
        read(data[: len(data) - 1 - plain * 4 * len(str(maxval))])
    if maxval < 255:
        with pytest.raises(ImageError, match="above the maxval"):
            read(data.replace(body, b"255 " * 105 if plain else b"\xff" * len(body)))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 33])
def test_pbm(read, width):
    array = samples(5, width, 1, 1) if width > 1 else np.array([[[0]], [[1]], [[1]]], np.uint8)
    size = f"{width} {len(array)}\n".encode()
    want = rgb(1.0 - array)  # 1 is black
    assert np.array_equal(read(b"P4\n" + size + files.packed(array[..., 0], 1).tobytes()), want)
    digits = "".join(map(str, array.reshape(-1).tolist()))
    assert np.array_equal(read(b"P1\n" + size + digits.encode()), want)
    assert np.array_equal(read(b"P1\n" + size + b" #0\n ".join(bytes([c]) for c in digits.encode())), want)


def test_pfm(read):
    array = np.random.default_rng(0).random((5, 7, 1)).astype(np.float32)
    for order, scale in (("<", "-1.0"), (">", "1.0")):
        data = f"Pf\n7 5\n{scale}\n".encode() + array[::-1].astype(order + "f4").tobytes()
        assert np.abs(read(data) - array).max() <= EXACT
    with pytest.raises(ImageError, match="scale '2.5'"):
        read(data.replace(b"1.0", b"2.5"))


@pytest.mark.parametrize(
    "header, words",
    [("P5\n7 5\n0\n", "maxval of 0"), ("P5\n7 5\n65536\n", "65536"), ("P5\n7 x\n255\n", "for a number"),
     ("P5\n0 5\n255\n", "no pixels"), ("P5\n" + "#" * 70000, "without an end"), ("P2\n1 1\n9\n-1", "no numbers")],
)  # fmt: skip
def test_pnm_headers_that_are_none(read, header, words):
    with pytest.raises(ImageError, match=words):
        read(header.encode() + b" 1 2 3")


# BMP


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("header", [12, 40, 108, 124])
def test_bmp_palette(read, depth, grey, header):
    """Also palettes that look like a ramp of grey, which are read by their values all the same."""
    array = samples(5, 11, 1, depth)[..., 0]
    palette = samples(1, 2**depth, 3, 8, seed=1)[0]
    ramps = [np.repeat(np.arange(2**depth, dtype=np.uint8)[:, None], 3, 1), np.repeat(palette[:, :1], 3, 1)]
    for colours in ramps if grey else [palette]:
        ours = read(files.bmp(array, depth, palette=colours, header=header))
        assert np.abs(ours - colours[array] / 255).max() <= EXACT


def test_bmp_palette_of_fewer_colours(read):
    array = samples(5, 11, 1, 1)[..., 0]
    palette = np.array([[0, 0, 0], [255, 255, 255]])
    for depth in (1, 4, 8):
        ours = read(files.bmp(array, depth, palette=palette))
        assert np.array_equal(ours, rgb(array[..., None].astype(float)))
    with pytest.raises(ImageError, match="colour 3 of 2"):
        read(files.bmp(array + 2, 4, palette=palette))


MASKS = [
    (16, (0x7C00, 0x3E0, 0x1F)), (16, (0xF800, 0x7E0, 0x1F)), (16, (0xF00, 0xF0, 0xF)), (16, (0x1F, 0x7E0, 0xF800)),
    (16, (0xF00, 0xF0, 0xF, 0xF000)), (16, (0x7C00, 0x3E0, 0x1F, 0x8000)), (32, (0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)), (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)), (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
]  # fmt: skip


@pytest.mark.parametrize("depth, masks", MASKS)
def test_bmp_masks(read, depth, masks):
    array = np.random.default_rng(0).integers(0, 2**depth, (5, 11))
    levels = [(array & mask) / mask for mask in masks]
    want = np.stack(levels[:3], -1)
    if len(masks) == 4:
        want = want * levels[3][..., None] + 1 - levels[3][..., None]
    for header in (108, 124) if len(masks) == 4 else (40, 52, 108):
        for top_down in (False, True):
            data = files.bmp(array, depth, masks=masks, header=header, top_down=top_down)
            assert np.abs(read(data) - want).max() <= 1.5 * LEVEL
    with pytest.raises(ImageError, match="with gaps"):
        read(files.bmp(array, depth, masks=(0x505, 0xF0, 0xF000), header=52))


def test_bmp_of_plain_colour(read):
    array = np.random.default_rng(0).integers(0, 2**24, (5, 11))
    want = np.stack([array >> 16, array >> 8 & 255, array & 255], -1) / 255
    for depth, header in itertools.product((24, 32), (12, 40, 124)):
        unused = 0x7F000000 if depth == 32 else 0  # of 32 raw bits the last 8 mean nothing
        assert np.abs(read(files.bmp(array | unused, depth, header=header)) - want).max() <= EXACT
    five = np.array([[0x7FFF, 0x7C00, 0x3E0, 0x1F, 0x4210]])
    want = np.array([[[31, 31, 31], [31, 0, 0], [0, 31, 0], [0, 0, 31], [16, 16, 16]]]) / 31
    assert np.abs(read(files.bmp(five, 16)) - want).max() <= LEVEL / 2 + EXACT


def test_bmp_run_lengths(read):
    palette = samples(1, 256, 3, 8, seed=1)[0]
    blank = np.zeros((3, 5), int)
    # bottom row: 3 x 7, then 2 and 1; middle: a step of (2, 0), then three as they stand; top: nothing
    code = bytes([3, 7, 1, 2, 1, 1, 0, 0, 0, 2, 2, 0, 0, 3, 9, 8, 7, 0, 0, 1])
    want = palette[np.array([[0, 0, 0, 0, 0], [0, 0, 9, 8, 7], [7, 7, 7, 2, 1]])] / 255
    assert np.abs(read(files.bmp(blank, 8, palette=palette, code=code, compression=1)) - want).max() <= EXACT
    code = bytes([5, 0x12, 0, 0, 0, 5, 0x34, 0x56, 0x70, 0, 0, 0, 3, 0x90, 0, 1])
    want = palette[np.array([[9, 0, 9, 0, 0], [3, 4, 5, 6, 7], [1, 2, 1, 2, 1]])] / 255
    data = files.bmp(blank, 4, palette=palette[:16], code=code, compression=2)
    assert np.abs(read(data) - want).max() <= EXACT
    with pytest.raises(ImageError, match="too early"):
        read(files.bmp(blank, 8, palette=palette, code=code[:5], compression=1))
    for compression in (4, 5, 9):
        with pytest.raises(ImageError, match=f"compression {compression}"):
            read(files.bmp(blank, 8, palette=palette, compression=compression))


# GIF


def test_gif_transparency(read):
    array = samples(6, 9, 1, 7)[..., 0]
    palette = samples(1, 128, 3, 8, seed=1)[0]
    for key in (None, 0, 5, int(array[2, 3]), 127):
        want = palette[array] / 255
        if key is not None:
            want = np.where((array == key)[..., None], 1, want)
        for background in (0, 9):
            ours = read(files.gif(array, palette, transparent=key, background=background))
            assert np.abs(ours - want).max() <= EXACT
    ramp = np.repeat(np.arange(128)[:, None], 3, 1)  # which Pillow takes for grey
    want = np.where((array == 7)[..., None], 1, ramp[array] / 255)
    assert np.abs(read(files.gif(array, ramp, transparent=7)) - want).max() <= EXACT


def test_what_the_first_frame_of_a_gif_leaves_is_white(tmp_path):
    array = samples(6, 9, 1, 7)[..., 0]
    palette = samples(1, 128, 3, 8, seed=1)[0]
    for screen, at, background in (((20, 10), (3, 2), 5), ((9, 6), (1, 1), 0), ((2, 2), (0, 0), 0)):
        (tmp_path / "a.gif").write_bytes(
            files.gif(array, palette, screen=screen, at=at, background=background)
        )
        picture = read_image(tmp_path / "a.gif")
        height, width = max(screen[1], at[1] + 6), max(screen[0], at[0] + 9)  # a screen grows to hold it
        want = np.ones((height, width, 3))
        want[at[1] : at[1] + 6, at[0] : at[0] + 9] = palette[array] / 255
        assert picture.size == (height, width)
        assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - want).max() <= EXACT


# WebP, JPEG


def _saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_webp_alpha(read):
    array = samples(6, 9, 4, 8)
    alpha = array[..., 3:] / 255
    want = array[..., :3] / 255 * alpha + 1 - alpha
    for profile in (None, b"x" * 300):
        data = _saved(Image.fromarray(array), "WEBP", lossless=True, exact=True, icc_profile=profile)
        assert np.abs(read(data) - want).max() <= LEVEL
    smooth = np.full((32, 32, 4), (10, 200, 90, 128), np.uint8)
    smooth[:16, :, 3] = 0
    ours = read(_saved(Image.fromarray(smooth), "WEBP", quality=90))
    assert ours[:16].min() > 1 - LEVEL  # nothing of what is hidden
    assert np.abs(ours[20:] - (np.array([10, 200, 90]) / 255 * 128 / 255 + 127 / 255)).max() < 6 * LEVEL


def test_first_frame_of_an_animated_webp_with_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    array = samples(6, 9, 3, 8)
    frames = [Image.fromarray(array), Image.fromarray(255 - array), Image.fromarray(array)]
    data = _saved(
        frames[0],
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        lossless=True,
        exif=exif,
        icc_profile=b"y" * 99,
    )
    (tmp_path / "a.webp").write_bytes(data)
    picture = read_image(tmp_path / "a.webp")
    assert picture.notes == ("several frames: only the first was read",)
    assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - np.rot90(array, -1) / 255).max() <= EXACT


def test_jpeg_of_four_inks(read):
    """Adobe's programs store inks inverted, and all readers take them so, marked as Adobe's or not."""
    inks = np.full((16, 16, 4), (30, 140, 70, 20), np.uint8)
    data = _saved(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "JPEG", quality=100)
    at = data.index(b"\xff\xee\0\x0eAdobe")
    want = (255 - inks[..., :3].astype(float)) * (255 - 20) / 255**2
    assert np.abs(read(data) - want).max() <= 3 * LEVEL
    assert np.abs(read(data[:at] + data[at + 16 :]) - want).max() <= 3 * LEVEL
    assert data[at + 15] == 0
    turned = read(data[: at + 15] + b"\2" + data[at + 16 :])  # the same bytes as Y, Cb, Cr and black: YCCK
    y, blue, red, black = 255.0 - np.array([30, 140, 70, 20])
    ink = np.array([y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128), y + 1.772 * (blue - 128)])  # fmt: skip
    want = (255 - np.clip(ink, 0, 255)) * black / 255**2
    assert np.abs(turned - want).max() <= 4 * LEVEL


def test_jpeg_kinds_that_are_refused_by_name(read):
    data = _saved(Image.fromarray(samples(16, 16, 3, 8)), "JPEG")
    frame = data.index(b"\xff\xc0")
    for code, words in ((0xC3, "lossless"), (0xC9, "arithmetic"), (0xC5, "hierarchical")):
        with pytest.raises(ImageError, match=words):
            read(data[: frame + 1] + bytes([code]) + data[frame + 2 :])
    with pytest.raises(ImageError, match="12-bit samples"):
        read(data[: frame + 4] + b"\x0c" + data[frame + 5 :])


def test_jpeg_colours_are_as_its_components_say(read):
    """Without JFIF's and Adobe's marks the components' names tell RGB from YCbCr."""
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    plain = _saved(Image.fromarray(flat), "JPEG", quality=100, subsampling=0)
    kept = _saved(Image.fromarray(flat), "JPEG", quality=100, subsampling=0, keep_rgb=True)
    for data in (plain, kept):
        assert np.abs(read(data) - flat / 255).max() <= 3 * LEVEL


def test_jpeg_of_several_pictures(tmp_path):
    flat = [Image.new("RGB", (16, 16), colour) for colour in ((200, 40, 90), (0, 0, 0))]
    flat[0].save(tmp_path / "a.mpo", save_all=True, append_images=flat[1:])
    picture = read_image(tmp_path / "a.mpo")
    assert (picture.format, picture.notes) == ("JPEG", ("several frames: only the first was read",))
    assert np.abs(picture.pixels[:, 3, 3].numpy() - np.array([200, 40, 90]) / 255).max() <= 3 * LEVEL
