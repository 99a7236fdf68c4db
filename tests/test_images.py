"""Decoding, progress, and what a Dataset promises."""

import numpy as np
import pytest
import torch
import tqdm
from data_files import encode, load, refused
from PIL import Image

import files
import folders
import images
import miniimagenet
import omniglot
import tasks


def test_requests_that_can_not_be(photos):
    for find, flag in ((omniglot.find, "--root"), (miniimagenet.find, "--synthetic"),
                       (lambda root: folders.find(root, Image.Resampling.BILINEAR), "--data")):
        with refused("long" * 100, flag):
            find(photos / ("long" * 100))
    with refused("memory", "--imgsz"):
        load(miniimagenet, photos, "train", 2_000_000)


# Decoding


def decode(data: bytes | np.ndarray | Image.Image, channels: int = 3) -> np.ndarray:
    return images.decode(data, "some.png", channels, 8, Image.Resampling.BILINEAR)[0]


RED = Image.new("RGB", (10, 10), (200, 40, 40))
GREY = Image.new("L", (10, 10), 90)
LEFT = Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8), 10, 0).repeat(5, 1))  # 255 in the left half


@pytest.mark.parametrize("image, kind, options, left, right", [
    (RED, "PNG", {}, (200, 40, 40), (200, 40, 40)), (GREY, "BMP", {}, (90,) * 3, (90,) * 3),
    (RED.convert("CMYK"), "JPEG", {"quality": 100}, (200, 40, 40), (200, 40, 40)),
    (RED.quantize(4), "GIF", {}, (200, 40, 40), (200, 40, 40)), (LEFT.convert("1"), "PNG", {}, (255,) * 3, (0,) * 3),
    # what is transparent becomes white, so that ink on nothing isn't black on black
    (Image.merge("RGBA", [*RED.split(), LEFT]), "PNG", {}, (200, 40, 40), (255,) * 3),
    (Image.merge("LA", [Image.new("L", (10, 10)), LEFT]), "PNG", {}, (0,) * 3, (255,) * 3),
    (LEFT.point(lambda value: value // 255).convert("P"), "PNG", {"transparency": 1}, (255,) * 3, (0,) * 3),
])
def test_every_mode_becomes_rgb_and_grey(image, kind, options, left, right):
    data = encode(image, kind, **options)
    for column, expected in ((0, left), (7, right)):
        assert np.abs(decode(data)[:, 4, column].astype(int) - expected).max() <= 3
        grey = Image.new("RGB", (1, 1), expected).convert("L").getpixel((0, 0))
        assert abs(int(decode(data, channels=1)[0, 4, column]) - grey) <= 3


@pytest.mark.parametrize("bits, value", [(8, 200), (12, 3000), (16, 40_000)])
def test_16_bit_images_keep_their_range(bits, value):
    """Scanners and microscopes write 8 or 12 bits of data into 16; as 16 bits they would come out black."""
    pixels = np.zeros((10, 10), np.uint16)
    pixels[:5] = value
    for channels in (1, 3):
        decoded = decode(encode(pixels), channels)
        assert decoded[:, 0, 0].tolist() == [value >> bits - 8] * channels and decoded[0, 7, 0] == 0


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (2, (0, 7)), (3, (7, 7)), (8, (7, 0))])
def test_exif_orientation_is_applied(orientation, corner):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encode(pixels, exif=exif))[0]
    assert [place for place in ((0, 0), (0, 7), (7, 0), (7, 7)) if turned[place] == 255] == [corner]
    damaged = encode(pixels, exif=exif.tobytes().replace(b"MM", b"XX"))
    assert decode(damaged)[0, 0, 0] == 255  # EXIF data that can't be read is ignored


def test_what_is_no_image_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for whole in (encode(noise, "JPEG"), encode(noise)):
        for part in (0.3, 0.7):
            with refused("some.png can't be decoded"):
                decode(whole[:int(len(whole) * part)])
    for data, words in ((b"", "empty"), (encode(GREY, "EPS"), "none of JPEG"), (encode(GREY, "TIFF"), "none of JPEG")):
        with refused(f"some.png is {words}"):
            decode(data)
    small = encode(GREY, "GIF")
    with refused("some.png", "pixels"):
        decode(small[:6] + (20_000).to_bytes(2, "little") * 2 + small[10:])  # its header states 20,000 x 20,000


def test_what_takes_over_two_seconds_says_how_far_it_is(monkeypatch, capfd):
    for items, seconds, reported in ((3, 0.0, []), (30, 1.0, [10, 19, 28, 30])):
        clock = iter(range(1000))
        monkeypatch.setattr(tqdm.std, "time", lambda: next(clock) * seconds)
        assert list(files.progress(range(items), "reading", items, "files")) == list(range(items))
        said = [line.partition(",")[0] for line in capfd.readouterr().err.splitlines() if line]
        assert said == [f"reading: {done}/{items} files" for done in reported]


PROMISED = torch.randint(256, (3, 4, 1, 8, 8), dtype=torch.uint8)


def promising(counts: list[int]) -> tasks.Dataset:
    return tasks.Dataset(lambda: "mine", 1, (0.0,), (1.0,), lambda: {"train": counts}, lambda split: PROMISED)


@pytest.mark.parametrize("loaded, counts, words", [
    (PROMISED / 255, [4] * 3, ["torch.float32", "must give uint8", "(255 * images)"]),
    (PROMISED.numpy(), [4] * 3, ["uint8"]), (PROMISED // 255, [4] * 3, ["only pixels 0 and 1", "multiply them by 255"]),
    (PROMISED[:2], [4] * 3, ["[2, 4, 1, 8, 8]", "[3, 4, 1, 8, 8]", "make them agree"]),
    (PROMISED[:, :3], [4] * 3, ["agree"]), (PROMISED[..., :7], [4] * 3, ["agree"]),
    (PROMISED.expand(3, 4, 3, 8, 8), [4] * 3, ["channels"]), (PROMISED, [4, 5, 3], ["counts"]),
    (PROMISED, [4, 4], ["counts"])])
def test_a_dataset_that_breaks_its_promise(loaded, counts, words):
    with refused("the train split of mine", *words):
        images.check_images(loaded, promising(counts), "train", 8)
    assert images.check_images(PROMISED, promising([4, 3, 4]), "train", 8) is PROMISED
