"""The format of an image file, by its first bytes and not by its name."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError

TRAINED_ON = ("JPEG", "PNG")  # what the loaders decode
IMPORTED = ("WebP", "BMP", "GIF", "TIFF")  # what `harness data import` decodes to PNG
NOT_IMAGES: tuple[str, ...] = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md")
NOT_IMAGES += (".html", ".mat", ".db", ".ini")

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "PSD",
    b"P5": "PGM",
    b"P6": "PPM",
}
BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC")
BRANDS |= dict.fromkeys((b"avif", b"avis"), "AVIF")


def image_format(file: Path) -> str:
    """Return a name such as JPEG or WebP; "" for anything unknown. Raises OSError."""
    with open(file, "rb") as stream:
        return format_of(stream.read(16))


def usable_format(file: Path) -> str:
    """Return the format of an image that can be decoded; "" for a text or similar file.

    Raises UserError for any other file.
    """
    try:
        kind = image_format(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; repair or remove it") from None
    if not kind and file.suffix.lower() in NOT_IMAGES:
        return ""
    if kind not in TRAINED_ON + IMPORTED:
        known = ", ".join(TRAINED_ON + IMPORTED)
        what = kind or "unknown image format"
        raise UserError(f"{file}: {what}, not {known}; convert or remove it")
    return kind


def format_of(head: bytes) -> str:
    """Return the same as `image_format`, from the first 16 bytes of a file."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "")
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # reserved; two letters alone are any text
        return "BMP"
    return next((name for start, name in SIGNATURES.items() if head.startswith(start)), "")
