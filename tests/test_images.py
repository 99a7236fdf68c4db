"""Decoding, progress, and what a Dataset promises.

    python -m pytest tests/test_images.py
"""

import io
import time

import numpy as np
import pytest
import torch
from data_files import encode, photos, png_header, refused  # noqa: F401
from PIL import Image

import files
import images
import miniimagenet
import omniglot
import tasks

BILINEAR = Image.Resampling.BILINEAR


@pytest.mark.parametrize("module", [miniimagenet, omniglot])
def test_bad_requests(photos, module):
    with refused("split", "'training'"):
        module.load(photos, "training", 12)
    with refused("--imgsz"):
        module.load(photos, "train", 0)


def test_array_that_no_memory_holds(photos):
    with refused("memory", "--imgsz"):
        miniimagenet.load(photos, "train", 2_000_000)
    assert not (photos / "cache").exists()


# Decoding


def decode(data: bytes, channels: int = 3, size: int = 8) -> np.ndarray:
    return images.decode(data, "some.png", channels, size, BILINEAR)[0]


def test_every_mode_becomes_rgb_and_grey():
    red = np.zeros((10, 10, 3), np.uint8) + np.array([200, 40, 40], np.uint8)
    grey = np.full((10, 10), 90, np.uint8)
    clear = np.dstack([red, np.full((10, 10), 0, np.uint8)])
    clear[:, :5, 3] = 255
    cmyk = io.BytesIO()
    Image.fromarray(red).convert("CMYK").save(cmyk, "JPEG", quality=100)
    palette, masked = io.BytesIO(), io.BytesIO()
    Image.fromarray(red).quantize(4).save(palette, "PNG")
    Image.fromarray(np.repeat([[0, 1]], 10, 0).astype(np.uint8).repeat(5, 1)).convert("P").save(
        masked, "PNG", transparency=1)
    deep = io.BytesIO()
    Image.fromarray((grey.astype(np.uint16) << 8) + 17).save(deep, "PNG")

    def colour(data, x):
        return decode(data)[:, 4, x].tolist()

    assert colour(encode(red), 1) == [200, 40, 40]
    assert colour(encode(grey), 1) == colour(encode(grey, "BMP"), 1) == colour(deep.getvalue(), 1) == [90] * 3
    assert colour(encode(np.full((10, 10), True)), 1) == [255] * 3
    assert np.abs(np.array(colour(cmyk.getvalue(), 1)) - [200, 40, 40]).max() <= 3
    assert np.abs(np.array(colour(palette.getvalue(), 1)) - [200, 40, 40]).max() <= 3
    assert colour(encode(clear), 0) == [200, 40, 40] and colour(encode(clear), 7) == [255] * 3  # on white
    ink = np.dstack([np.zeros((10, 10), np.uint8), clear[..., 3]])  # black ink on nothing: grey and alpha
    assert colour(encode(ink), 0) == [0] * 3 and colour(encode(ink), 7) == [255] * 3
    assert colour(masked.getvalue(), 7) == [255] * 3 and colour(masked.getvalue(), 0) == [0] * 3
    for buffer in (cmyk, palette, masked, deep):
        assert decode(buffer.getvalue(), channels=1).shape == (1, 8, 8)
    assert decode(encode(grey), channels=1)[0, 3, 3] == 90


@pytest.mark.parametrize("bits, value", [(8, 200), (12, 3000), (16, 40_000), (16, 65_535)])
def test_16_bit_images_keep_their_range(bits, value):
    """Scanners and microscopes write 8 or 12 bits of data into 16; as 16 bits they would come out black."""
    pixels = np.zeros((10, 10), np.uint16)
    pixels[:5] = value
    for channels in (1, 3):
        decoded = decode(encode(pixels), channels)
        assert decoded[:, 0, 0].tolist() == [value >> bits - 8] * channels and decoded[0, 7, 0] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encode(pixels, exif=exif))[0]
    corner = {1: (0, 0), 2: (0, 7), 3: (7, 7), 4: (7, 0), 5: (0, 0), 6: (0, 7), 7: (7, 7), 8: (7, 0)}[orientation]
    assert [place for place in ((0, 0), (0, 7), (7, 0), (7, 7)) if turned[place] == 255] == [corner]
    damaged = encode(pixels, "JPEG", exif=exif, quality=100).replace(b"Exif\0\0", b"Exif\0\1")
    assert decode(damaged)[0, 0, 0] > 200  # EXIF data that can't be read says nothing


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_images_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encode(noise, kind)
    for part in (0.02, 0.3, 0.7):
        with refused("some.png"):
            decode(whole[:int(len(whole) * part)])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_other_formats_and_bombs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (postscript, encode(np.zeros((9, 9), np.uint8), "TIFF"), b"<svg/>"):
        with refused("some.png", "JPEG"):
            decode(data)
    for side in (8_200, 12_000, 2_000_000):  # over this module's limit, PIL's warning and PIL's error
        with refused("some.png", "million pixels"):
            decode(png_header(side, side))


def test_result_and_error_do_not_depend_on_threads(photos, monkeypatch):
    results, errors = [], set()
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        results.append(miniimagenet.load(photos, "train", 12, cache=photos / f"cache{threads}"))
    assert all(torch.equal(results[0], other) for other in results)
    for name in ("p10.png", "p02.png", "p31.png"):
        (photos / "images" / name).write_text("broken")
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        with refused("3 of the 12 images") as caught:
            miniimagenet.load(photos, "train", 12)
        errors.add(str(caught.value))
    assert len(errors) == 1 and sorted("p02 p31 p10".split(), key=errors.pop().index) == "p02 p31 p10".split()


@pytest.mark.parametrize("limit", [399, 400])
def test_large_images_are_decoded_one_at_a_time(photos, monkeypatch, limit):
    """Else a folder of them, each a few kilobytes on disk, takes the memory of one times the machine's cores."""
    at_work, most, convert = [], [], images._opaque

    def watched(image):
        at_work.append(image)
        time.sleep(0.01)
        most.append(len(at_work))
        at_work.pop()
        return convert(image)

    monkeypatch.setattr(images, "LARGE", limit)  # the photographs have 20 x 20 pixels, and fewer bytes
    monkeypatch.setattr(images, "_threads", lambda: 4)
    monkeypatch.setattr(images, "_opaque", watched)
    miniimagenet.load(photos, "train", 12)
    assert max(most) == 1 if limit < 400 else max(most) > 1


# Progress, and what a Dataset promises


@pytest.mark.parametrize("items, seconds, said", [(3, 0.0, []), (5, 1.0, ["reading: 3 of 5 files"]),
                                                  (30, 1.0, ["reading: 3 of 30 files", "reading: 14 of 30 files",
                                                             "reading: 25 of 30 files"])])
def test_what_takes_over_two_seconds_says_how_far_it_is(items, seconds, said, monkeypatch, capfd):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * seconds)
    assert list(files.progress(range(items), "reading", items, "files")) == list(range(items))
    assert capfd.readouterr().err.splitlines() == said


PROMISED = torch.randint(256, (3, 4, 1, 8, 8), dtype=torch.uint8)
BROKEN = PROMISED / 255


@pytest.mark.parametrize("images_, counts, words", [
    (BROKEN, None, ["torch.float32", "must give uint8", "(255 * images)"]), (PROMISED.int(), None, ["torch.int32"]),
    (PROMISED.numpy(), None, ["uint8"]), (PROMISED // 255, None, ["0 and 1 alone", "multiply them by 255"]),
    (PROMISED[:2], None, ["[2, 4, 1, 8, 8]", "[3, 4, 1, 8, 8]"]), (PROMISED[:, :3], None, ["make them agree"]),
    (PROMISED[..., :7], None, ["make them agree"]), (PROMISED.expand(3, 4, 3, 8, 8), None, ["channels"]),
    (PROMISED, [4, 4, 3], ["counts has 3 classes of at least 3", "sizes says 3 of 4"]),
    (PROMISED, [4, 4], ["counts has 2"])])
def test_a_dataset_that_breaks_its_promise(images_, counts, words):
    def made(images_, counts):
        return tasks.Dataset(lambda: "mine", 1, (0.0,), (1.0,), lambda: {"train": (3, 4)}, lambda split: images_,
                             counts=lambda split: counts)

    with refused("the train split of mine", *words):
        images.check_images(images_, made(images_, counts), "train", 8)
    assert images.check_images(PROMISED, made(PROMISED, None), "train", 8) is PROMISED
    with refused("the val split of mine: sizes has no 'val'"):
        images.check_images(PROMISED, made(PROMISED, None), "val", 8)
    if images_ is BROKEN:
        scaled = (255 * images_).round().to(torch.uint8)  # as advised
        assert torch.equal(images.check_images(scaled, made(scaled, None), "train", 8), PROMISED)
