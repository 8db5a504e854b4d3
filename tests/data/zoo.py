"""Every kind of JPEG and PNG that was thought of, generated: name -> the bytes of the file."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SIDE = 64  # pixels: whole MCUs of every chroma subsampling
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
ADAM7 += ((1, 0, 2, 1),)  # first row and column, and the steps, of each pass
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types

# 40 x 32 pixels, 4:2:0, arithmetic coding (libjpeg-turbo's jpegtran -arithmetic): PIL writes none
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQ"
    "c1tdhbWGkJ6jq62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/yQARCAAgACgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIR"
    "AxEAPwD+6BRaOIbO0AtHPsws3ZNeOGcgRi/tEznxa10zH/AQNvY2Bk6M6KYWG4Th2arYtpiYlCo7m9iAh46lPyP0"
    "xw4c893/ACZzqOr8eO70/uho2Jrp1zrNVJqX6e3FwhuUlXDFPHrp9xmKDzYBf0BKSEHLnISwQrmCLGNaGlFUo4Y8"
    "En/Z9xY6uQ96UftLlP6xyqscvK8DKuAeUE/oAAQ5Yb9N5HWxSOI53ahX7SaILEbTgocxyWomA/FjrbcDZrj6Z6xW"
    "mVXeWh238P/Z"
)


def zoo(photo: Image.Image) -> dict[str, bytes]:
    """File name -> content, made of `photo`, which is at least SIDE x SIDE."""
    photo = photo.convert("RGB").crop((0, 0, SIDE, SIDE))
    return dict([*jpegs(photo), *pngs(photo), *odd_sizes(photo)])


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **({"quality": 90} | options))
    return stream.getvalue()


def segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) of the headers up to the first scan; then (0, all that follows)."""
    yield 0xD8, content[:2]
    at = 2
    while content[at + 1] != 0xDA:
        (length,) = struct.unpack(">H", content[at + 2 : at + 4])
        yield content[at + 1], content[at : at + 2 + length]
        at += 2 + length
    yield 0, content[at:]


def without(content: bytes, *markers: int) -> bytes:
    return b"".join(part for marker, part in segments(content) if marker not in markers)


def with_factors(content: bytes, *factors: int) -> bytes:
    """The same blocks, in MCUs of other sampling factors (0x21: 2 across, 1 down)."""
    parts = []
    for marker, part in segments(content):
        if marker in (0xC0, 0xC2):
            header = bytearray(part)
            for number, factor in enumerate(factors):
                header[11 + 3 * number] = factor
            part = bytes(header)
        parts.append(part)
    return b"".join(parts)


def with_frame(content: bytes, at: int, value: int) -> bytes:
    """The frame header (SOF) with another byte at its place `at`."""
    return b"".join(
        part[:at] + bytes([value]) + part[at + 1 :] if marker in (0xC0, 0xC2) else part
        for marker, part in segments(content)
    )


def with_ids(content: bytes, ids: bytes) -> bytes:
    """Other component ids, in the frame and the scan of a baseline image."""
    parts = []
    for marker, part in segments(content):
        edited = bytearray(part)
        for number, name in enumerate(ids):
            if marker == 0xC0:
                edited[10 + 3 * number] = name
            if marker == 0:
                edited[5 + 2 * number] = name
        parts.append(bytes(edited))
    return b"".join(parts)


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A segment behind the start marker."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + content[2:]


def adobe(transform: int) -> bytes:
    return b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def jpegs(photo: Image.Image) -> Iterator[tuple[str, bytes]]:
    app0, app14 = 0xE0, 0xEE
    for number, name in enumerate(("444", "422", "420")):
        for progressive in (False, True):
            kind = "progressive" if progressive else "baseline"
            yield f"{kind}_{name}.jpg", jpeg(photo, subsampling=number, progressive=progressive)
    yield "440.jpg", with_factors(jpeg(photo, subsampling=1), 0x12)
    yield "411.jpg", with_factors(jpeg(photo, subsampling=2), 0x41)
    yield "gray.jpg", jpeg(photo.convert("L"))
    yield "gray_factors.jpg", with_factors(jpeg(photo.convert("L")), 0x22)
    yield "arithmetic.jpg", base64.b64decode(ARITHMETIC)
    yield "low_quality.jpg", jpeg(photo, quality=5)
    yield "optimized.jpg", jpeg(photo, optimize=True)
    yield "restart_rows.jpg", jpeg(photo, restart_marker_rows=1)
    yield "restart_blocks.jpg", jpeg(photo, restart_marker_blocks=3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"rotated_{orientation}.jpg", jpeg(photo, exif=exif)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "icc.jpg", jpeg(photo, icc_profile=icc)
    yield "dpi_comment.jpg", jpeg(photo, dpi=(72, 300), comment=b"a comment")
    plain = jpeg(photo)
    yield "no_jfif.jpg", without(plain, app0)
    rgb = jpeg(photo, keep_rgb=True)
    yield "rgb_adobe.jpg", rgb
    yield "rgb_ids_alone.jpg", with_ids(without(rgb, app0, app14), b"RGB")
    yield "rgb_ids_and_jfif.jpg", with_ids(without(plain, app14), b"RGB")
    yield "ids_from_0.jpg", with_ids(without(plain, app0), b"\0\1\2")
    yield "ycc_adobe.jpg", with_segment(without(plain, app0), app14, adobe(1))
    yield "rgb_adobe_and_jfif.jpg", with_segment(plain, app14, adobe(0))
    yield "unknown_adobe.jpg", with_segment(without(plain, app0), app14, adobe(7))
    cmyk = jpeg(photo.convert("CMYK"))
    bare = without(cmyk, app0, app14)
    for progressive in (False, True):
        name = "cmyk_progressive" if progressive else "cmyk"
        content = jpeg(photo.convert("CMYK"), progressive=progressive)
        yield f"{name}_adobe.jpg", content
        yield f"{name}_bare.jpg", without(content, app0, app14)
    yield "ycck_adobe.jpg", with_segment(bare, app14, adobe(2))
    yield "cmyk_adobe_1.jpg", with_segment(bare, app14, adobe(1))
    yield "cmyk_ids.jpg", with_ids(bare, b"CMYK")
    yield "cmyk_jfif.jpg", with_segment(bare, app0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    yield "cmyk_420.jpg", jpeg(photo.convert("CMYK"), subsampling=2)
    yield "pictures.jpg", several_pictures(photo)
    yield "png_named.JPEG", png(np.asarray(photo), RGB)


def refused(photo: Image.Image) -> dict[str, bytes]:
    """What is no intact 8-bit JPEG or PNG."""
    photo = photo.convert("RGB").crop((0, 0, SIDE, SIDE))
    plain, whole = jpeg(photo), png(np.asarray(photo), RGB)
    pixels = whole.index(b"IDAT")
    found = {
        "12_bit.jpg": with_frame(plain, 4, 12),
        "two_components.jpg": with_frame(plain, 9, 2),
        "no_height.jpg": with_frame(with_frame(plain, 5, 0), 6, 0),
        "cut.jpg": plain[: len(plain) // 2],
        "headers_alone.jpg": without(plain, 0),
        "empty.jpg": b"",
        "text.png": b"404: not found",
        "cut.png": whole[: len(whole) // 2],
        "checksum.png": whole[: pixels + 40] + b"????" + whole[pixels + 44 :],
        "no_pixels.png": whole[: pixels - 4] + whole[-12:],
    }
    for format in ("GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        photo.save(stream, format)
        found[f"{format.lower()}.jpg"] = stream.getvalue()
    return found


def several_pictures(photo: Image.Image) -> bytes:
    """Two pictures in one file, as cameras write them (MPO)."""
    stream = io.BytesIO()
    photo.save(stream, "MPO", save_all=True, append_images=[photo.rotate(180)])
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    checked = name + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))


def packed_rows(samples: NDArray[np.uint16], depth: int) -> bytes:
    """Rows of (height, samples), each with the filter byte of none before it."""
    if depth == 16:
        rows = samples.astype(">u2").view(np.uint8).reshape(len(samples), -1)
    elif depth == 8:
        rows = samples.astype(np.uint8)
    else:
        bits = samples[:, :, None] >> np.arange(depth - 1, -1, -1) & 1
        rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def png(
    samples: NDArray[Any],
    colour: int,
    depth: int = 8,
    *,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """(height, width[, channels]) samples below 2^depth; `before`: chunks before the pixels."""
    height, width = samples.shape[:2]
    samples = samples.reshape(height, width, -1).astype(np.uint16)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = (samples[top::down, left::across] for top, left, down, across in passes)
    rows = b"".join(packed_rows(part.reshape(len(part), -1), depth) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def pngs(photo: Image.Image) -> Iterator[tuple[str, bytes]]:
    rgb, gray = np.asarray(photo), np.asarray(photo.convert("L"))
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8) * 4, (SIDE, SIDE))
    alpha = np.dstack([rgb, ramp])
    for interlaced in (False, True):
        how: Any = {"interlaced": interlaced}
        name = "_interlaced.png" if interlaced else ".png"
        yield f"rgb{name}", png(rgb, RGB, **how)
        yield f"rgba{name}", png(alpha, RGBA, **how)
        yield f"gray_alpha{name}", png(np.dstack([gray, ramp]), GRAY_ALPHA, **how)
        for depth in (1, 2, 4, 8, 16):
            levels = gray.astype(np.uint16) * 257 >> (16 - depth)
            yield f"gray_{depth}{name}", png(levels, GRAY, depth, **how)
            if depth <= 8:
                colours = rgb.reshape(-1, 3)[:: SIDE * SIDE // 2**depth][: 2**depth]
                tables = [(b"PLTE", colours.tobytes())]
                yield f"palette_{depth}{name}", png(levels, PALETTE, depth, before=tables, **how)
        deep = rgb.astype(np.uint16) * 256 + ramp[:, :, None]
        yield f"rgb_16{name}", png(deep, RGB, 16, **how)
    deep = np.dstack([rgb, ramp]).astype(np.uint16) * 256 + 200
    yield "rgba_16.png", png(deep, RGBA, 16)
    yield "gray_alpha_16.png", png(deep[:, :, 2:], GRAY_ALPHA, 16)
    colours = rgb.reshape(-1, 3)[::16]
    clear = [(b"PLTE", colours.tobytes()), (b"tRNS", bytes(range(256)))]
    yield "palette_transparent.png", png(gray, PALETTE, before=clear)
    one = [(b"PLTE", colours.tobytes()), (b"tRNS", b"\xff\xff\0")]
    yield "palette_one_clear.png", png(gray, PALETTE, before=one)
    background = (b"bKGD", struct.pack(">HHH", 255, 0, 0))
    middle = tuple(map(int, rgb[SIDE // 2, SIDE // 2]))
    for name, extra in {
        "rgb_clear_colour": [(b"tRNS", struct.pack(">HHH", *middle))],
        "rgb_gamma": [(b"gAMA", struct.pack(">I", 100000))],
        "rgb_gamma_dark": [(b"gAMA", struct.pack(">I", 20000))],
        "rgb_srgb": [(b"sRGB", b"\0")],
        "rgb_icc": [(b"iCCP", b"p\0\0" + zlib.compress(linear_profile()))],
        "rgb_chromaticities": [(b"cHRM", struct.pack(">8I", *[31270, 32900] * 4))],
        "rgb_significant_bits": [(b"sBIT", b"\5\6\5")],
        "rgb_background": [background],
        "rgb_rotated": [(b"eXIf", exif_of(6))],
        "rgb_palette_hint": [(b"PLTE", colours.tobytes())],
        "rgb_text": [(b"tEXt", b"Comment\0a text")],
        "rgb_animation": [
            (b"acTL", struct.pack(">II", 1, 0)),
            (b"fcTL", struct.pack(">IIIIIHHBB", 0, SIDE, SIDE, 0, 0, 1, 10, 0, 0)),
        ],
    }.items():
        yield f"{name}.png", png(rgb, RGB, before=extra)
    yield "rgba_background.png", png(alpha, RGBA, before=[background])
    yield "rgba_gamma.png", png(alpha, RGBA, before=[(b"gAMA", struct.pack(">I", 20000))])
    yield "gray_gamma.png", png(gray, GRAY, before=[(b"gAMA", struct.pack(">I", 20000))])
    yield "gray_clear.png", png(gray, GRAY, before=[(b"tRNS", struct.pack(">H", int(gray[0, 0])))])
    levels = gray >> 6
    yield "gray_2_clear.png", png(levels, GRAY, 2, before=[(b"tRNS", struct.pack(">H", 1))])
    short = [(b"PLTE", colours[:100].tobytes())]
    yield "palette_short.png", png(gray % 128, PALETTE, before=short)
    yield "palette_missing.png", png(gray, PALETTE)
    yield "jpeg_named.png", jpeg(photo)
    whole = png(rgb, RGB)
    yield "behind.png", whole + bytes(50)
    yield "no_end.png", whole[:-12]
    yield "end_torn.png", whole[:-3]
    yield "late_text.png", whole[:-12] + chunk(b"tEXt", b"a\0b") + whole[-12:]


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def linear_profile() -> bytes:
    """A profile that changes every colour, were it applied."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def odd_sizes(photo: Image.Image) -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 1), (1, 40), (40, 1), (2, 3), (7, 5), (17, 33), (63, 9)):
        image = photo.crop((0, 0, width, height))
        for number, name in enumerate(("444", "422", "420")):
            yield f"{width}x{height}_{name}.jpg", jpeg(image, subsampling=number)
        yield f"{width}x{height}_gray.jpg", jpeg(image.convert("L"))
        yield f"{width}x{height}.png", png(np.asarray(image), RGB, interlaced=width > 2)
