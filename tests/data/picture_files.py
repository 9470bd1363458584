"""Picture files written by hand, after the formats' specifications: the kinds that Pillow does not write."""

import struct
import zlib

import numpy as np


def packed(rows, bits):
    """[H, N] integers, `bits` each, most significant bit first, every row padded to whole bytes."""
    rows = np.asarray(rows, np.uint64)
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    lines = (rows[..., None] >> shifts & np.uint64(1)).astype(np.uint8).reshape(len(rows), -1)
    return np.packbits(lines, axis=1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples, depth, colour, *extra):
    """samples: [H, W, S] integers; extra: (kind, body) of chunks before the pixels."""
    height, width, _ = samples.shape
    lines = packed(samples.reshape(height, -1), depth)
    data = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*pair) for pair in extra)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def _predicted(plane, predictor):
    """Horizontal differences, of [H, W, S] samples."""
    if predictor == 1:
        return plane
    return np.concatenate([plane[:, :1], plane[:, 1:] - plane[:, :-1]], axis=1)


def _sample_bytes(plane, bits, order):
    """[H, W, S] samples as the bytes of each row."""
    rows = plane.reshape(len(plane), -1)
    if plane.dtype.kind == "f" or bits in (16, 32, 64) or plane.dtype.kind == "i" and bits == 8:
        whole = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder(order)))
        return whole.view(np.uint8).reshape(len(rows), -1)
    if bits == 24:
        whole = rows.astype(np.uint32).astype(order + "u4").view(np.uint8).reshape(*rows.shape, 4)
        return np.ascontiguousarray(whole[..., :3] if order == "<" else whole[..., 1:]).reshape(len(rows), -1)
    return packed(rows, bits)


def tiff(
    samples,
    bits,
    photometric=1,
    *,
    order="<",
    form=None,
    planar=1,
    extra_samples=(),
    compression=1,
    predictor=1,
    fill_order=1,
    rows_per_strip=None,
    tile=None,
    orientation=None,
    more=(),
):
    """samples: [H, W, S] of a dtype that holds `bits` bits. more: (tag, type, values) of further tags."""
    height, width, count = samples.shape
    planes = [samples] if planar == 1 else [samples[..., i : i + 1] for i in range(count)]
    parts = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            blocks = [
                padded[y : y + tile, x : x + tile]
                for y in range(0, padded.shape[0], tile)
                for x in range(0, padded.shape[1], tile)
            ]
        else:
            step = rows_per_strip or height
            blocks = [plane[y : y + step] for y in range(0, height, step)]
        for block in blocks:
            data = _sample_bytes(_predicted(block, predictor), bits, order)
            if fill_order == 2:
                data = np.packbits(np.unpackbits(data, axis=1), axis=1, bitorder="little")
            data = data.tobytes()
            if compression == 8:
                data = zlib.compress(data)
            elif compression == 32773:  # PackBits, of literals alone
                cut = [data[i : i + 128] for i in range(0, len(data), 128)]
                data = b"".join(bytes([len(piece) - 1]) + piece for piece in cut)
            parts.append(data + b"\0" * (len(data) % 2))
    offsets, at = [], 8
    for part in parts:
        offsets.append(at)
        at += len(part)
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * count), (259, 3, [compression]),
            (262, 3, [photometric]), (277, 3, [count]), (284, 3, [planar])]  # fmt: skip
    sizes = [len(part) for part in parts]
    if tile:
        tags += [(322, 3, [tile]), (323, 3, [tile]), (324, 4, offsets), (325, 4, sizes)]
    else:
        tags += [(273, 4, offsets), (278, 4, [rows_per_strip or height]), (279, 4, sizes)]
    tags += [(339, 3, [form] * count)] if form else []
    tags += [(338, 3, list(extra_samples))] if extra_samples else []
    tags += [(317, 3, [predictor])] if predictor != 1 else []
    tags += [(266, 3, [fill_order])] if fill_order != 1 else []
    tags += [(274, 3, [orientation])] if orientation else []
    return tiff_of(b"".join(parts), [*tags, *more], order)


def tiff_of(data, tags, order="<"):
    """A TIFF of one directory behind `data`, which starts at byte 8."""
    tags = sorted(tags)
    directory, values = b"", b""
    where = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        coded = struct.pack(f"{order}{len(numbers)}{ {1: 'B', 3: 'H', 4: 'I', 7: 'B'}[kind] }", *numbers)
        head = struct.pack(order + "HHI", tag, kind, len(numbers))
        if len(coded) <= 4:
            directory += head + coded.ljust(4, b"\0")
        else:
            directory += head + struct.pack(order + "I", where + len(values))
            values += coded + b"\0" * (len(coded) % 2)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    count = struct.pack(order + "H", len(tags))
    return magic + struct.pack(order + "I", 8 + len(data)) + data + count + directory + bytes(4) + values


def bmp(pixels, depth, *, palette=None, masks=None, header=40, top_down=False, code=None, compression=None):
    """pixels: [H, W] integers of `depth` bits. palette: [N, 3] RGB. code: run-length code in their place."""
    height, width = pixels.shape
    if depth < 16:
        rows = packed(pixels, depth)
    else:
        rows = pixels.astype("<u4").view(np.uint8).reshape(height, width, 4)[..., : depth // 8]
        rows = rows.reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    data = code if code is not None else (rows if top_down else rows[::-1]).tobytes()
    compression = (3 if masks else 0) if compression is None else compression
    table = b"".join(struct.pack("BBBB", b, g, r, 0) for r, g, b in (palette if palette is not None else ()))
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, depth)
        table = b"".join(table[i : i + 3] for i in range(0, len(table), 4))
    else:
        lines = -height if top_down else height
        info = struct.pack("<IiiHHIIiiII", header, width, lines, 1, depth, compression, len(data), 0, 0, len(table) // 4, 0)  # fmt: skip
        coded = struct.pack(f"<{len(masks)}I", *masks) if masks else b""
        info = info + coded if header == 40 else (info + coded).ljust(header, b"\0")
    start = 14 + len(info) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + table + data


def gif(pixels, palette, *, transparent=None, screen=None, at=(0, 0), background=0, before=b""):
    """pixels: [H, W] indices of 7 bits. An LZW stream that is cleared before the codes would grow."""
    height, width = pixels.shape
    codes = []
    for i, level in enumerate(pixels.reshape(-1).tolist()):
        codes += [128, level] if i % 100 == 0 else [level]
    bits = np.array([[code >> i & 1 for i in range(8)] for code in [*codes, 129]], np.uint8)
    data = np.packbits(bits.reshape(-1), bitorder="little").tobytes()
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    table = np.zeros((128, 3), np.uint8)
    table[: len(palette)] = palette
    screen = screen or (width, height)
    control = b"" if transparent is None else b"!\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80 | 6, background, 0)
        + table.tobytes()
        + before
        + control
        + b","
        + struct.pack("<HHHHB", *at, width, height, 0)
        + b"\x07"
        + blocks
        + b"\0;"
    )
