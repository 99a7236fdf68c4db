"""From image files to a tensor: decoding, its cache, what a Dataset promises; whole files; generated images."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from data_files import drawing, encode, listing, load, refused, write_zips
from PIL import Image

import files
import folders
import images
import miniimagenet
import omniglot
import synthetic
import tasks
from synthetic import CHARACTERS, PHOTOS, generate


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
    (GREY, "WEBP", {"lossless": True}, (90,) * 3, (90,) * 3),
    (RED.convert("CMYK"), "JPEG", {"quality": 100}, (200, 40, 40), (200, 40, 40)),
    (RED.quantize(4), "GIF", {}, (200, 40, 40), (200, 40, 40)), (LEFT.convert("1"), "PNG", {}, (255,) * 3, (0,) * 3),
    # what is transparent becomes white, so that ink on nothing isn't black on black
    (Image.merge("RGBA", [*RED.split(), LEFT]), "PNG", {}, (200, 40, 40), (255,) * 3),
    (Image.merge("LA", [Image.new("L", (10, 10)), LEFT]), "PNG", {}, (0,) * 3, (255,) * 3),
    (LEFT.point(lambda value: value // 255).convert("P"), "PNG", {"transparency": 1}, (255,) * 3, (0,) * 3),
    # scanners and microscopes write 8 or 12 bits of data into 16; as 16 bits they would come out black
    *((np.repeat(np.array([[value, 0]], np.uint16), 10, 0).repeat(5, 1), "PNG", {}, (value >> bits - 8,) * 3, (0,) * 3)
      for bits, value in ((8, 200), (12, 3000), (16, 40_000)))])
def test_every_mode_becomes_rgb_and_grey(image, kind, options, left, right):
    data, tolerance = encode(image, kind, **options), 0 if isinstance(image, np.ndarray) else 3
    for column, expected in ((0, left), (7, right)):
        assert np.abs(decode(data)[:, 4, column].astype(int) - expected).max() <= tolerance
        grey = Image.new("RGB", (1, 1), expected).convert("L").getpixel((0, 0))
        assert abs(int(decode(data, channels=1)[0, 4, column]) - grey) <= tolerance


def test_colours_of_16_bits_are_read_but_not_if_they_would_be_black():
    def png(value):  # PIL writes none
        rows = (b"\0" + np.full(8 * 3, value, ">u2").tobytes()) * 8
        header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))

    assert decode(png(40_000))[:, 0, 0].tolist() == [40_000 >> 8] * 3
    with refused("16 bits per channel, of which only the lower are used; convert it to 8 bits"):
        decode(png(3000))


def test_exif_orientation_is_applied():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = decode(encode(pixels, exif=exif))[0]
    assert [place for place in ((0, 0), (0, 7), (7, 0), (7, 7)) if turned[place] == 255] == [(7, 0)]
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
    for pixels in (noise.reshape(64, -1)[0], noise.transpose(2, 0, 1)):  # as Image.fromarray takes them
        with refused("some.png can't be decoded (its shape is ", "not [h, w] or [h, w, 2 to 4]"):
            decode(pixels)
    small = encode(GREY, "GIF")
    with refused("some.png", "pixels"):
        decode(small[:6] + (20_000).to_bytes(2, "little") * 2 + small[10:])  # its header states 20,000 x 20,000


def test_what_takes_over_two_seconds_says_how_far_it_is(monkeypatch, capfd):
    for items, seconds, reported in ((3, 0.0, []), (30, 1.0, [10, 19, 28, 30]), (28, 1.0, [10, 19, 28])):
        clock = iter(range(1000))
        monkeypatch.setattr("tqdm.std.time", lambda: next(clock) * seconds)
        assert list(files.progress(range(items), "reading", items, "files")) == list(range(items))
        said = [line.partition(",")[0] for line in capfd.readouterr().err.splitlines() if line]
        assert said == [f"reading: {done}/{items} files" for done in reported]


PROMISED = torch.randint(256, (3, 4, 1, 8, 8), dtype=torch.uint8)


def promising(counts: list[int]) -> tasks.Dataset:
    return tasks.Dataset(lambda: "mine", 1, (0.0,), (1.0,), lambda: {"train": counts}, lambda split: PROMISED)


@pytest.mark.parametrize("loaded, counts, words", [
    (PROMISED / 255, [4] * 3, ["torch.float32", "must give a tensor of uint8", "(255 * images)"]),
    (PROMISED.numpy(), [4] * 3, ["gives <class 'numpy.ndarray'> and"]),
    (PROMISED // 255, [4] * 3, ["only pixels 0 and 1", "multiply them by 255"]),
    (PROMISED[:2], [4] * 3, ["[2, 4, 1, 8, 8]", "[3, 4, 1, 8, 8]", "make them agree"]),
    (PROMISED.expand(3, 4, 3, 8, 8), [4] * 3, ["channels"]), (PROMISED, [4, 5, 3], ["counts"])])
def test_a_dataset_that_breaks_its_promise(loaded, counts, words):
    with refused("the train split of mine", *words):
        images.check_images(loaded, promising(counts), "train", 8)
    assert images.check_images(PROMISED, promising([4, 3, 4]), "train", 8) is PROMISED


# The cache


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Grows by one at each decoding of a split."""
    done, real = [], images.progress
    monkeypatch.setattr(images, "progress", lambda *args: done.append(args[1]) or real(*args))
    return done


def test_cache_is_taken_and_rebuilt_when_anything_changes(photos, builds):
    first = load(miniimagenet, photos, "train", 12)
    assert torch.equal(load(miniimagenet, photos, "train", 12), first) and len(builds) == 1
    path, = (photos / "cache").iterdir()
    assert path.name.startswith("miniimagenet-train-12px-")
    assert np.array_equal(np.load(path), first.numpy())  # a plain .npy file

    load(miniimagenet, photos, "train", 13), load(miniimagenet, photos, "val", 12)
    file = photos / "images" / "p00.png"
    file.write_bytes(encode(np.full((20, 20, 3), 255, np.uint8)))
    changed = load(miniimagenet, photos, "train", 12)
    assert len(builds) == 4 and changed[2, 0].min() == 255
    for data in (file.read_bytes(), file.read_bytes() + b"\0"):  # another time, then another size
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
        load(miniimagenet, photos, "train", 12)
    lines = (photos / "train.csv").read_text().split()
    (photos / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert torch.equal(load(miniimagenet, photos, "train", 12), changed.flip(1))
    keys = {path.stem.rpartition("-")[2] for path in (photos / "cache").iterdir()}
    assert len(keys) == len(builds) == 7  # the key alone tells splits and sizes apart


def test_what_a_killed_decoding_left_goes_a_day_later(photos):
    (photos / "cache").mkdir()
    yesterday, running = ((photos / "cache" / f".miniimagenet-train-84px-{key}.npy.abcd1234.tmp") for key in "ab")
    for path in (yesterday, running):
        path.write_bytes(b"half")
    os.utime(yesterday, (0, 0))
    load(miniimagenet, photos, "train", 12)
    assert running.exists() and not yesterday.exists()


def test_omniglot_cache_follows_the_zip_content(tmp_path, small_omniglot, builds):
    write_zips(tmp_path, small_omniglot)
    first = load(omniglot, tmp_path, "train", 28)
    write_zips(tmp_path, small_omniglot)  # packed again: other times, the same content
    assert torch.equal(load(omniglot, tmp_path, "train", 28), first) and len(builds) == 1
    write_zips(tmp_path, {name: drawing(30) for name in small_omniglot})
    assert not torch.equal(load(omniglot, tmp_path, "train", 28), first) and len(builds) == 2


def test_damaged_caches_are_found_and_rebuilt(photos, capfd):
    expected = load(miniimagenet, photos, "train", 12)
    path, = (photos / "cache").iterdir()
    whole, plain = path.read_bytes(), io.BytesIO()
    np.save(plain, expected.numpy())
    capfd.readouterr()
    for damaged in (whole[:-1], whole[:len(whole) // 2], b"", plain.getvalue(), whole[:20] + b"X" + whole[21:]):
        path.write_bytes(damaged)
        assert torch.equal(load(miniimagenet, photos, "train", 12), expected)
        assert path.read_bytes() == whole
        assert capfd.readouterr().err == f"the cache {path} is damaged: building it again\n"


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_cache_folder_that_can_not_be_written(photos, builds, name):
    (photos / "file").write_text("in the way")
    with refused("--cache FOLDER"):
        load(miniimagenet, photos, "train", 12, photos / name)
    assert not builds  # refused before the minutes of decoding
    before = listing(photos)
    load(miniimagenet, photos, "train", 12, photos.parent / "named")
    assert listing(photos) == before  # the data may be read-only


# files.py


def test_atomic_writes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with files.atomic(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.atomic(path) as file:
        file.write(b"half")
        file.write(1 // 0)
    assert path.read_bytes() == b"whole" and listing(path.parent) == ["file"]
    with refused("can't write", "name another folder"), files.atomic(path / "below"):
        pass


# Generated images: the same every time, and no class in two splits


@pytest.mark.parametrize("name, channels, size, expected", [
    (CHARACTERS, 1, 28, (232.12, 35.77, 22.84)), (PHOTOS, 3, 84, (121.44, 53.83, 35.85))])
def test_generated_images_are_those_of_earlier_versions_in_every_size(name, channels, size, expected):
    """By the mean of a pixel, its spread within a class, and that between classes."""
    images = generate(name, 0, 20, 20, size, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (20, 20, channels, size, size)
    means = images.float().mean(1)
    found = means.mean().item(), images.float().std(1).mean().item(), means.std(0).mean().item()
    assert found == pytest.approx(expected, abs=0.05)
    smaller = torch.nn.functional.interpolate(images[0].float(), (size // 2, size // 2), mode="area")
    assert (generate(name, 0, 1, 20, size // 2, seed=3)[0] - smaller).abs().mean() < 20
    assert generate(name, 0, 2, 3, 33, seed=0).shape[3:] == (33, 33)


@pytest.mark.parametrize("name, splits, images", [
    (CHARACTERS, {"train": 200, "val": 40, "test": 60}, 20), (PHOTOS, {"train": 64, "val": 16, "test": 20}, 40)])
def test_splits_share_no_class(name, splits, images):
    """A class does not depend on the others that are drawn."""
    before = torch.get_rng_state()
    dataset = synthetic.dataset(name, 1, (0.0,), (1.0,), 8)
    loaded = [dataset.load(split) for split in splits]
    assert list(map(len, loaded)) == list(splits.values())
    assert torch.equal(torch.cat(loaded), generate(name, 0, sum(splits.values()), images, 8, synthetic.SEED))
    assert torch.equal(torch.get_rng_state(), before)
