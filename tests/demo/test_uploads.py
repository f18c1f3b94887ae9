"""Uploads: right pixels of what is an image, and a friendly sentence for anything else."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.demo import uploads
from ldae.demo.uploads import read_upload

SENTENCES = {uploads.TOO_LARGE, uploads.NO_IMAGE, uploads.DAMAGED, uploads.TOO_LONG, uploads.NO_RANGE}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)


def expected(pixels):
    """Pixels (8, 12, 3) in [0, 255] as the model takes them."""
    return torch.tensor(np.asarray(pixels, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def saved(image, path, **options):
    image.save(path, **options)
    return path


def outcome(path):
    """ "read", or what is said of a file that cannot be."""
    try:
        read_upload(path, (8, 12), 3)
    except ValueError as error:
        return str(error)
    return "read"


def png_of(width, height):
    """A PNG whose header says a size, and which holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_image_is_read_as_it_is(tmp_path):
    path = saved(Image.fromarray(PIXELS), tmp_path / "x.png")
    assert torch.allclose(read_upload(path, (8, 12), 3), expected(PIXELS), atol=1e-6)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = RNG.integers(0, 65536, (8, 12)).astype(np.uint16)
    path = saved(Image.fromarray(grey), tmp_path / "x.png")
    wanted = expected(np.repeat((grey / 257).round()[..., None], 3, axis=2))
    assert torch.allclose(read_upload(path, (8, 12), 3), wanted, atol=1e-6)


def test_transparency_is_seen_on_white(tmp_path):
    alpha = np.full((8, 12, 1), 0, np.uint8)
    alpha[:, 6:] = 255
    path = saved(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), tmp_path / "x.png")
    wanted = PIXELS.copy()
    wanted[:, :6] = 255
    assert torch.allclose(read_upload(path, (8, 12), 3), expected(wanted), atol=1e-6)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = saved(Image.fromarray(np.rot90(PIXELS).copy()), tmp_path / "x.png", exif=exif)
    assert torch.allclose(read_upload(path, (8, 12), 3), expected(PIXELS), atol=1e-6)


MODES = [("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png"), ("RGB", "tiff")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_mode_are_read(tmp_path, mode, suffix, channels):
    path = saved(Image.fromarray(PIXELS).convert(mode), tmp_path / f"x.{suffix}")
    values = read_upload(path, (8, 12), channels)
    assert values.shape == (1, channels, 8, 12)
    assert values.abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", uploads.NO_IMAGE),
        (b"hello", uploads.NO_IMAGE),
        (b"\x89PNG\r\n\x1a\n broken", uploads.NO_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", uploads.NO_IMAGE),  # a program's input
        (png_of(8, 12), uploads.DAMAGED),
        (png_of(10_000, 10_000), uploads.TOO_LARGE),  # Pillow warns
        (png_of(60_000, 60_000), uploads.TOO_LARGE),  # Pillow refuses
        (png_of(1, 3_000_000), uploads.TOO_LONG),
    ],
)
def test_what_is_no_image_gets_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^This .*\.$") as error:
        read_upload(path, (8, 12), 3)
    assert str(error.value) == sentence


def test_large_images_are_refused_without_the_bound_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "x.png"
    path.write_bytes(png_of(10_000, 10_000))
    with pytest.raises(ValueError, match="too large"):
        read_upload(path, (8, 12), 3)


def test_numbers_without_a_range_get_a_sentence(tmp_path):
    path = saved(Image.fromarray(RNG.random((8, 12), np.float32)), tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_upload(path, (8, 12), 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is cut off
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_files_cut_anywhere_are_read_or_get_a_sentence(tmp_path, suffix):
    content = saved(Image.fromarray(PIXELS), tmp_path / f"x.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        assert outcome(path) in {"read", *SENTENCES}


def test_no_file_gets_a_sentence(tmp_path):
    for path in (None, tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match="damaged"):
            read_upload(path, (8, 12), 3)
