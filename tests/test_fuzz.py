"""Bad input of every kind ends in success or in one line and exit status 2, and writes nothing outside its folder.

First the faults once found; then hypothesis damages files, JSON, checkpoints and command lines, the same in every run
(`FUZZ_EXAMPLES=1000 python -m pytest tests/test_fuzz.py`: that many of each, and other ones each time).
Data sets have a few images here. Valid settings of --from_args and of command lines end where training would begin.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import encode, omniglot_entries, png_header, write_folders, write_photos, write_zips
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from test_plot_nc import write_run

import files
import miniimagenet
import miniimagenet_train
import omniglot
import omniglot_train
import plot_nc
import synthetic
from meta import Meta

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # of each test; 0: its own number
FIRST = "images_evaluation/Angelic/character01/0000_01.png"
NOTES = ("decoding ", "downloading ", "the cache ", "note: ")  # lines that may precede the refusal
TINY = ("--synthetic --device cpu --n_way 2 --k_qry 1 --task_num 1 --epoch 1 --update_step 1 --update_step_test 1 "
        "--eval_tasks 2 --test_tasks 2 --nc_every 0").split()


def fuzzed(examples: int, **strategies):
    """Give a test `examples` inputs by hypothesis, or EXAMPLES."""
    chosen = settings(max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, deadline=None, database=None,
                      suppress_health_check=list(HealthCheck))
    return lambda test: chosen(given(**strategies)(test))


@contextlib.contextmanager
def limits():
    """A hang ends in an error of its own kind, a bomb in a MemoryError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("a hang")))
    signal.alarm(600)  # far more than a busy machine takes
    with contextlib.suppress(FileNotFoundError):  # Linux
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)


def outcome(call, around: Path, *results: Path) -> str:
    """Call a program in `around`: "accepted" or "refused"; what lies in `around` outside `results` stays as it is."""
    def snapshot() -> dict:
        paths = [path for path in around.rglob("*") if not any(path.is_relative_to(result) for result in results)]
        return {path: (path.is_dir() or (path.lstat().st_size, path.lstat().st_mtime_ns)) for path in paths}

    (around / "cwd").mkdir()
    before, status = snapshot(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, \
            contextlib.chdir(around / "cwd"), limits():
        try:
            files.run(call)
        except SystemExit as ended:
            status = ended.code
    said = err.getvalue()
    assert status in (0, 2), (status, said)
    if status:
        *notes, line = said.removesuffix("\n").split("\n")
        assert line.startswith("error: ") and line.isprintable() and 15 < len(line) <= files.LONGEST + 12, line
        assert all(note.startswith(NOTES) for note in notes), said
    assert snapshot() == before, "something outside its folder changed"
    return "refused" if status else "accepted"


@pytest.fixture(autouse=True, scope="module")
def small():
    """Small data sets, no network, one thread, and of the figures one in twenty drawn."""
    threads, count, savefig = torch.get_num_threads(), itertools.count(), Figure.savefig
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
        patch.setattr(omniglot, "DRAWINGS", 2)
        patch.setattr(omniglot, "URL", "http://127.0.0.1:1")
        patch.setattr(synthetic, "CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 2), "test": (6, 2)})
        patch.setattr(synthetic, "CHARACTER_IMAGES", 3)
        patch.setattr(Figure, "savefig", lambda figure, file, **options:
                      next(count) % 20 or savefig(figure, file, **options | {"dpi": 10}))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sound(small, tmp_path_factory) -> Path:
    """Sound inputs of each kind, in a folder of its own."""
    folder = tmp_path_factory.mktemp("sound")
    drawings = {name: data for name, data in omniglot_entries().items() if name.endswith(("_01.png", "_02.png"))}
    write_photos(folder / "photos/data", 2, 3, 8)
    (folder / "photos/secret.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    write_folders(folder / "drawings/data", drawings)
    write_zips(folder / "zips/data", drawings)
    write_run(folder / "log/run", update_step_test=10, first_order=False, net="conv_bn_relu")
    omniglot_train.main([*TINY, "--out", str(folder / "run/run")])
    return folder


def load_photos(around: Path) -> str:
    def load() -> None:
        miniimagenet.sizes(around / "data")
        assert miniimagenet.load(around / "data", "train", 8).shape[2:] == (3, 8, 8)

    return outcome(load, around, around / "data/cache")


def load_drawings(around: Path) -> str:
    def load() -> None:
        for split, classes in (("val", 1), ("test", 2)):
            assert omniglot.load(around / "data", split, 28).shape == (classes, 2, 1, 28, 28)

    return outcome(load, around, around / "data/cache")


def program(main, results: str, *flags: str):
    """A program with these flags, where AROUND stands for the folder."""
    def call(around: Path) -> str:
        return outcome(lambda: main([flag.replace("AROUND", str(around)) for flag in flags]), around, around / results)

    return call


plot = program(plot_nc.main, "out", "AROUND/run", "-o", "AROUND/out/figure.png")
retest = program(omniglot_train.main, "run", "--test", "AROUND/run")
resume = program(omniglot_train.main, "run", "--resume", "AROUND/run", "--epoch", "2")


@contextlib.contextmanager
def before_training():
    """Valid settings end, in success, where the network is handed to MAML: they might train for days."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meta, "__init__", lambda *_, **__: sys.exit(0))
        yield


repeat = before_training()(program(omniglot_train.main, "nothing", "--from_args", "AROUND/run/args.json"))
retest_args = before_training()(program(omniglot_train.main, "run", "--test", "AROUND/run"))

FILES = {  # a file that may be bad: its kind, its name, the program that reads it
    "csv": ("photos", "data/train.csv", load_photos), "photo": ("photos", "data/images/p00.png", load_photos),
    "drawing": ("drawings", f"data/{FIRST}", load_drawings),
    "zip": ("zips", "data/images_evaluation.zip", load_drawings),
    "log": ("log", "run/log.jsonl", plot), "plotted args": ("log", "run/args.json", plot),
    "resumed log": ("run", "run/log.jsonl", resume), "resumed args": ("run", "run/args.json", resume),
    "tested args": ("run", "run/args.json", retest_args), "repeated args": ("run", "run/args.json", repeat),
    "checkpoint": ("run", "run/checkpoint.pt", resume), "best": ("run", "run/best.pt", retest),
}


@contextlib.contextmanager
def bad(sound: Path, name: str):
    """A folder with a copy of a sound input, its file that may be bad, its program."""
    kind, path, program = FILES[name]
    with tempfile.TemporaryDirectory() as folder:
        around = Path(folder) / "around"
        shutil.copytree(sound / kind, around)  # with the files' times, which caches depend on
        path, = around.glob(path)
        yield around, path, program


@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe", "socket", "empty", "link out", "link to itself",
                                  "dangling link", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file(name, kind, sound):
    with bad(sound, name) as (around, path, program):
        links = {"link out": "../../secret.png", "link to itself": path.name, "dangling link": "absent",
                 "device": "/dev/zero"}
        path.unlink()
        if kind == "socket":
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
                listener.bind("s")
                os.rename("s", path.name)
        elif kind in links:
            path.symlink_to(links[kind])
        else:
            {"folder": os.mkdir, "pipe": os.mkfifo, "empty": Path.touch, "nothing": lambda _: None}[kind](path)
        program(around)


NOT_THERE = ["../secret.png", "/etc/hostname", "images/../../secret.png", "..\\secret.png", "..", ".", "C:\\secret.png",
             "sub/p00.png", "~/secret.png", "//host/x.png", "p00.png\0", "\x1b[2J.png", "x" * 200_000, '"p00.png']


@pytest.mark.parametrize("change, allowed", [
    *((lambda good, name=name: good.replace("p00.png", name).encode(), ["refused"]) for name in NOT_THERE),
    *((lambda good, code=code: good.replace("class", "Größe").encode(code), ["refused", "accepted"]) for code in
      ("utf-8-sig", "utf-16", "utf-32", "utf-7", "cp037", "latin-1")),
    *((lambda good, end=end: good.replace("\n", end).encode(), ["refused", "accepted"]) for end in
      ("\r\n", "\r", "\n\n", "\x0b", "\u2028", ";", "\0\n")),
    *((lambda good, first=first: (first + good[good.index("\n"):]).encode(), ["refused", "accepted"]) for first in
      ("", "filename", "filename;label", "label,filename", "filename,filename,label", "\ufeff" * 2)),
    *((lambda good, data=data: data, ["refused"]) for data in (b"filename,label\n", b"," * 10_000, b"<html>"))])
def test_odd_csv_files(change, allowed, sound):
    with bad(sound, "csv") as (around, path, program):
        path.write_bytes(change(path.read_text()))
        assert program(around) in allowed


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG, with the right checksum: a decoder sees what is wrong only when it looks inside."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pictures() -> dict[str, bytes]:
    """Images of many kinds; those that must be refused begin with "bad"."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
    rgb, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 0])
    made = {"JPEG": rgb, "JPEG CMYK": rgb.convert("CMYK"), "PNG": rgb, "PNG alpha": Image.fromarray(noise),
            "PNG palette": rgb.quantize(16), "PNG 1 bit": grey.convert("1"),
            "PNG LA": Image.fromarray(noise).convert("LA"),
            "PNG 16 bit": Image.fromarray(noise[..., 0].astype(np.uint16) << 8), "GIF": rgb.quantize(8), "BMP": rgb,
            "bad TIFF": rgb, "bad PPM": rgb, "bad EPS": rgb, "bad ICO": rgb, "bad PDF": rgb}
    found = {"bad text": b"hello\n", "bad XBM": b"#define i_width 8\n",
             "bad EPS script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"}
    for name, image in made.items():
        data = io.BytesIO()
        image.save(data, name.removeprefix("bad ").split()[0])
        found[name] = data.getvalue()
    for side in (0, 9_000, 65_535, 2**31 - 1, 2**32 - 1):
        found[f"bad size {side}"] = png_header(side, side)
    header, rest, bomb = found["PNG"][:33], found["PNG"][33:], zlib.compress(bytes(3 * 10**7))
    jpeg, frame = found["JPEG"], found["JPEG"].index(b"\xff\xc0")
    return found | {
        "bad JPEG size": jpeg[:frame + 5] + b"\xff" * 4 + jpeg[frame + 9:], "bad header alone": header,
        "PNG text bomb": header + chunk(b"zTXt", b"a\0\0" + bomb) + rest,
        "PNG profile bomb": header + chunk(b"iCCP", b"a\0\0" + bomb) + rest,
        "PNG pixel bomb": png_header(8, 8)[:33] + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")}


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("place", ["photo", "drawing"])
def test_images_of_every_kind(name, place, sound):
    with bad(sound, place) as (around, path, program):
        path.write_bytes(PICTURES[name])
        said = program(around)
        assert "bomb" in name or said == ("refused" if name.startswith("bad") else "accepted")


@pytest.mark.parametrize("name, data", [
    *((name, b"") for name in ("../evil.png", "images_evaluation/../../evil.png", "/tmp/evil.png", "..\\evil.png",
      FIRST, "C:/evil.png", f"images_evaluation/a/{'b' * 60_000}/c.png", "images_evaluation/a/b/\x1b[2J.png")),
    (FIRST, bytes(10**8)), ("__MACOSX/._x", b""), ("images_evaluation/Angelic/character01/.0001.png", b"")])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_files_with_one_entry_more(name, data, method, sound):
    with bad(sound, "zip") as (around, path, program):
        with zipfile.ZipFile(path) as archive:
            entries = [(entry, archive.read(entry)) for entry in archive.namelist() if data == b"" or entry != name]
        with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
            for entry in [*entries, (name, data)]:
                archive.writestr(*entry)
        drawn = name.startswith("images_evaluation/") and "/.0001" not in name  # what lies elsewhere is no drawing
        assert program(around) == ("refused" if drawn or method == zipfile.ZIP_LZMA else "accepted")


TOKENS = ["9" * 5000, "1e999", "-Infinity", "NaN", '"\\ud800"', '"\\u0000"', '"a\\nb"', '"\\u001b[31m"',
          '"$\\\\frac{$"', '"../x"', json.dumps("x" * 100_000), "[" * 100_000 + "]" * 100_000,
          '{"a":' * 50_000 + "1" + "}" * 50_000, "[1e999]"]


@pytest.mark.parametrize("token", TOKENS, ids=range(len(TOKENS)))
@pytest.mark.parametrize("name, place", [
    ("repeated args", "n_way"), ("repeated args", "net"), ("resumed args", "root"), ("plotted args", "name"),
    ("plotted args", "net"), ("log", "step"), ("log", "layers"), ("log", "within")])
def test_json_that_python_takes_or_chokes_on(name, place, token, sound):
    with bad(sound, name) as (around, path, program):
        text = path.read_text()
        start = text.index(f'"{place}": ') + len(place) + 4
        _, length = json.JSONDecoder().raw_decode(text[start:])
        path.write_text(text[:start] + token + text[start + length:])
        program(around)


class Code:
    """Unpickled, it makes a folder outside the run."""

    def __reduce__(self):
        return os.mkdir, ("../run-by-a-pickle",)


@pytest.mark.parametrize("content", [Code(), [Code()], {"weights": Code(), "step": 0, "val_accuracy": 0.5}, b"hello",
                                     pickle.dumps({}), b"\x80\x02", b"PK\5\6" + bytes(18), pickle.dumps(Code())])
@pytest.mark.parametrize("name", ["checkpoint", "best"])
def test_weights_that_are_code_or_none(name, content, sound):
    for zipped in (False, True):
        with bad(sound, name) as (around, path, program):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            if isinstance(content, bytes):
                path.write_bytes(content)
            assert program(around) == "refused"


NUMBERS = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f"])
CSV = st.text("p0123.ngclas,\"'\n\r \t\0é;", min_size=1).map(str.encode)
EDITS = st.lists(st.tuples(st.sampled_from(["cut", "flip", "insert", "remove", "replace", "repeat"]),
                           st.integers(0, 2**20) | st.integers(-400, -1),  # from the end, where zip has its directory
                           st.binary(min_size=1, max_size=8) | NUMBERS | CSV), min_size=1, max_size=4)


def damaged(data: bytes, edits: list) -> bytes:
    for what, place, new in edits:
        place %= len(data) + 1
        end = min(len(data), place + new[0] % 64)
        flipped = bytes(byte ^ 1 << new[0] % 8 for byte in data[place:place + 1])
        data = {"cut": data[:place], "insert": data[:place] + new + data[place:], "remove": data[:place] + data[end:],
                "flip": data[:place] + flipped + data[place + 1:],
                "replace": data[:place] + new + data[place + len(new):], "repeat": data[:end] + data[place:]}[what]
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, sound):
    outcomes = Counter()

    @fuzzed(40, edits=EDITS)
    def test(edits):
        with bad(sound, name) as (around, path, program):
            path.write_bytes(damaged(path.read_bytes(), edits))
            outcomes[program(around)] += 1

    test()
    assert outcomes["refused"], outcomes


@pytest.mark.slow
@fuzzed(60, edits=EDITS, inside=st.booleans())
def test_damage_inside_a_png(edits, inside, sound):
    good = PICTURES["PNG"]
    header, pixels = good[16:29], good[41:-16]
    header, pixels = (header, damaged(pixels, edits)) if inside else (damaged(header, edits), pixels)
    with bad(sound, "photo") as (around, path, program):
        path.write_bytes(good[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + good[-12:])
        program(around)


ODD_JSON = st.sampled_from([0, -1, 1, 2, 0.5, 1e308, 10**400, "nan", "", None, True]) | st.text(max_size=9)
JSON = st.recursive(ODD_JSON | st.floats() | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=4)
TENSORS = st.sampled_from([
    (1,), torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.full((64, 1, 3, 3), float("inf")),
    torch.zeros(64, dtype=torch.complex64), torch.zeros(1).expand(64), torch.zeros(16, dtype=torch.uint8),
    torch.zeros(5056, dtype=torch.uint8), {"weights": {}, "step": 0, "val_accuracy": 0.5}])


def changed(value, way: list[int], new):
    """`value` with the part at the end of the way changed to `new`, or removed where that is "remove"."""
    holder, key = [value], 0
    for number in way:
        if isinstance(holder[key], (dict, list)) and holder[key]:
            holder = holder[key]
            key = list(holder)[number % len(holder)] if isinstance(holder, dict) else number % len(holder)
    holder[key] = new
    if isinstance(new, str) and new == "remove":
        del holder[key]
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name, examples", [
    ("log", 120), ("plotted args", 40), ("resumed args", 40), ("tested args", 40), ("repeated args", 40),
    ("checkpoint", 60), ("best", 60)])
def test_changed_contents(name, examples, sound):
    outcomes, pickled = Counter(), name in ("checkpoint", "best")

    @fuzzed(examples, way=st.lists(st.integers(0, 2**16), min_size=1, max_size=6),
            new=st.just("remove") | JSON | (TENSORS if pickled else JSON))
    def test(way, new):
        with bad(sound, name) as (around, path, program):
            if pickled:
                torch.save(changed(torch.load(path, weights_only=True), way, new), path)
            else:
                lines = path.read_text().splitlines() if name == "log" else [path.read_text()]
                path.write_text("\n".join(map(json.dumps, changed([json.loads(line) for line in lines], way, new))))
            outcomes[program(around)] += 1

    test()
    assert outcomes["refused"] and (outcomes["accepted"] or name == "best"), outcomes


VALUES = st.sampled_from([
    "", " ", "0", "-1", "1", "2", "5", "28", "2147483648", "9" * 5000, "1.5", "nan", "-inf", "1e400", "1e-320", "0x10",
    "１２", "½", "\udcff", "a\0b", "a\nb", "\u202e", "--", "-", "@file", "%s", "{}", "None", "x" * 300, "cpu", "cpu:7",
    "cuda:-1", "meta", "mps", "paper", "bf16", "RUN", "RUN/args.json", "../data", "/dev/null",
    "/proc/self"]) | st.text(max_size=5)


@pytest.mark.slow
@pytest.mark.parametrize("main", [omniglot_train.main, miniimagenet_train.main, plot_nc.main],
                         ids=["omniglot", "photos", "plot"])
def test_command_lines(main, sound):
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main(["--help"])
    flag = st.sampled_from(sorted(set(re.findall(r"(?<!\S)\[?(--?[\w-]+)", said.getvalue()))))
    pair = st.tuples(flag, VALUES)
    words = pair | pair.map(lambda words: ("=".join(words),)) | st.tuples(flag | VALUES)

    @fuzzed(100, chosen=st.lists(words, max_size=4), synthetic=st.booleans())
    def test(chosen, synthetic):
        with bad(sound, "best") as (around, *_), before_training():
            first, last = ["--synthetic", "--device", "cpu"] * synthetic, []
            if main == plot_nc.main:  # without a RUN it draws the README's figures; of two -o the last one holds
                first, last = ["RUN"], ["-o", str(around / "out.png")]
            flags = [word.replace("RUN", f"{around}/run") for words in [first, *chosen, last] for word in words]
            outcome(lambda: main(flags), around, around / "out.png", around / "run")

    test()


ODD = {"--seed": ["0", "2147483647"], "--meta_lr": ["1e308", "5e-324"], "--update_lr": ["1e308", "1e-320", "1e30"],
       "--clip": ["1e-300", "1e308"], "--nc_every": ["1", "2147483647"], "--task_chunk": ["2147483647"],
       "--n_way": ["3"], "--save_every": ["2147483647"], "--eval_every": ["1"], "--cache": ["\udcff", "/dev/null"],
       "--root": [""], "--imgsz": ["29", "64"],
       "--out": ["AROUND/out/é \udcff \n/deeper", "AROUND/out" + "x" * 300, "AROUND/run/best.pt/below"]}


@pytest.mark.slow
@fuzzed(25, chosen=st.lists(st.sampled_from([(flag, value) for flag in ODD for value in ODD[flag]]), max_size=3))
def test_trainings_with_odd_settings(chosen, sound):
    with bad(sound, "best") as (around, *_):
        program(omniglot_train.main, "out", *TINY, "--out", "AROUND/out", *itertools.chain(*chosen))(around)
