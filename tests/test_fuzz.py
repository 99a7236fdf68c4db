"""Bad input ends in success or in one line and exit status 2, and writes nothing outside its folder.

First the faults once found; then hypothesis damages files, JSON, checkpoints and command lines, the same in every run
(`FUZZ_EXAMPLES=1000 python -m pytest tests/test_fuzz.py`: that many of each, and other ones each time).
Data sets have a few images here. Valid settings of --from_args and of command lines end where training would begin.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_files import cached, load, omniglot_entries, write_folders, write_photos, write_zips
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_plot_nc import write_run

import files
import miniimagenet
import miniimagenet_train
import omniglot
import omniglot_train
import plot_nc
import synthetic
from meta import Meta
from study import figures

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # of each test; 0: its own number
NOTES = ("decoding ", "downloading ", "the cache ", "note: ")  # lines that may precede the refusal
TINY = ("--synthetic --device cpu --n_way 2 --k_qry 1 --task_num 1 --epoch 1 --update_step 1 --update_step_test 1 "
        "--eval_tasks 2 --test_tasks 2 --nc_every 0").split()


def fuzzed(examples: int, **strategies):
    """Give a test `examples` inputs by hypothesis, or EXAMPLES."""
    chosen = settings(max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, deadline=None, database=None,
                      suppress_health_check=list(HealthCheck))
    return lambda test: chosen(given(**strategies)(test))


def outcome(call, around: Path, *results: Path) -> str:
    """Call a program in `around`: "accepted" or "refused"; what lies in `around` outside `results` stays as it is."""
    def snapshot() -> dict:
        paths = [path for path in around.rglob("*") if not any(path.is_relative_to(result) for result in results)]
        return {path: (path.is_dir() or (path.lstat().st_size, path.lstat().st_mtime_ns)) for path in paths}

    (around / "cwd").mkdir()
    before, status = snapshot(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, \
            pytest.MonkeyPatch.context() as patch:
        patch.chdir(around / "cwd")
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
    threads, count, save = torch.get_num_threads(), itertools.count(), figures.save
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
        patch.setattr(omniglot, "DRAWINGS", 2)
        patch.setattr(omniglot, "URL", "http://127.0.0.1:1")
        patch.setattr(synthetic, "CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 2), "test": (6, 2)})
        patch.setattr(synthetic, "CHARACTER_IMAGES", 3)
        patch.setattr(figures, "DPI", 10)
        patch.setattr(figures, "save", lambda figure, path: next(count) % 20 or save(figure, path))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sound(small, tmp_path_factory) -> Path:
    """Sound inputs of each kind, in a folder of its own."""
    folder = tmp_path_factory.mktemp("sound")
    drawings = {name: data for name, data in omniglot_entries().items() if name.endswith(("_01.png", "_02.png"))}
    for kind in ("photos", "pickles"):
        write_photos(folder / kind / "data", 2, 3, 8)
    cached(folder / "pickles/data")
    write_folders(folder / "drawings/data", drawings)
    write_zips(folder / "zips/data", drawings)
    write_run(folder / "log/run", update_step_test=10, first_order=False, net="conv_bn_relu")
    omniglot_train.main([*TINY, "--out", str(folder / "run/run")])
    return folder


def load_photos(around: Path) -> str:
    return outcome(lambda: load(miniimagenet, around / "data", "train", 8), around, around / "data/cache")


def load_drawings(around: Path) -> str:
    return outcome(lambda: [load(omniglot, around / "data", split, 28) for split in omniglot.SPLITS], around,
                   around / "data/cache")


def program(main, results: str, *flags: str):
    """A program with these flags, where AROUND stands for the folder."""
    def call(around: Path) -> str:
        return outcome(lambda: main([flag.replace("AROUND", str(around)) for flag in flags]), around, around / results)

    return call


@contextlib.contextmanager
def before_training():
    """Valid settings end, in success, where the network is handed to MAML: they might train for days."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meta, "__init__", lambda *_, **__: sys.exit(0))
        yield


plot = program(plot_nc.main, "out", "AROUND/run", "-o", "AROUND/out/figure.png")
retest = program(omniglot_train.main, "run", "--test", "AROUND/run")
resume = program(omniglot_train.main, "run", "--resume", "AROUND/run", "--epoch", "2")
repeat = before_training()(program(omniglot_train.main, "nothing", "--from_args", "AROUND/run/args.json"))

FILES = {  # a file that may be bad: its kind, its name, the program that reads it
    "csv": ("photos", "data/train.csv", load_photos), "photo": ("photos", "data/images/p00.png", load_photos),
    "pickle": ("pickles", "data/mini-imagenet-cache-train.pkl", load_photos),
    "drawing": ("drawings", "data/images_evaluation/Angelic/character01/0001_01.png", load_drawings),
    "zip": ("zips", "data/images_evaluation.zip", load_drawings),
    "log": ("log", "run/log.jsonl", plot), "plotted args": ("log", "run/args.json", plot),
    "resumed log": ("run", "run/log.jsonl", resume), "resumed args": ("run", "run/args.json", resume),
    "tested args": ("run", "run/args.json", before_training()(retest)),
    "repeated args": ("run", "run/args.json", repeat),
    "checkpoint": ("run", "run/checkpoint.pt", resume), "best": ("run", "run/best.pt", retest),
}


@contextlib.contextmanager
def bad(sound: Path, name: str):
    """A folder with a copy of a sound input, its file that may be bad, its program."""
    kind, path, program = FILES[name]
    with tempfile.TemporaryDirectory() as folder:
        around = Path(folder) / "around"
        shutil.copytree(sound / kind, around)  # with the files' times, which caches depend on
        yield around, around / path, program


# Faults once found


@pytest.mark.parametrize("kind", ["nothing", "folder", "empty", "dangling link"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_or_an_empty_one(name, kind, sound):
    with bad(sound, name) as (around, path, program):
        path.unlink()
        {"folder": Path.mkdir, "empty": Path.touch, "dangling link": lambda path: path.symlink_to("absent"),
         "nothing": lambda path: None}[kind](path)
        program(around)


@pytest.mark.parametrize("token", [
    "9" * 5000, "1e999", "NaN", '"\\ud800"', '"a\\nb"', '"\\u001b[31m"', '"$\\\\frac{$"', '"../x"',
    json.dumps("x" * 100_000), "[" * 100_000 + "]" * 100_000, "[1e999]"], ids=range(11))
@pytest.mark.parametrize("name, place", [
    ("repeated args", "n_way"), ("resumed args", "root"), ("plotted args", "name"), ("plotted args", "net"),
    ("log", "step"), ("log", "within")])
def test_json_that_python_takes_or_chokes_on(name, place, token, sound):
    with bad(sound, name) as (around, path, program):
        text = path.read_text()
        start = text.index(f'"{place}": ') + len(place) + 4
        _, length = json.JSONDecoder().raw_decode(text[start:])
        path.write_text(text[:start] + token + text[start + length:])
        program(around)


# Faults that hypothesis makes


NUMBERS = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f"])
CSV = st.text("p0123.ngclas,\"'\n\r \té;", min_size=1).map(str.encode)
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


TEXT = st.characters(exclude_characters="\0")
ODD_JSON = st.sampled_from([0, -1, 1, 2, 0.5, 1e308, 10**400, "nan", "", None, True]) | st.text(TEXT, max_size=9)
JSON = st.recursive(ODD_JSON | st.floats() | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(TEXT, max_size=5), inner, max_size=3), max_leaves=4)
TENSORS = st.sampled_from([
    (1,), torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.full((64, 1, 3, 3), float("inf")),
    torch.zeros(64, dtype=torch.complex64), torch.zeros(1).expand(64), torch.zeros(5056, dtype=torch.uint8),
    {"weights": {}, "step": 0, "val_accuracy": 0.5}])


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
@pytest.mark.parametrize("name", ["log", "plotted args", "resumed args", "tested args", "repeated args", "checkpoint",
                                  "best"])
def test_changed_contents(name, sound):
    outcomes, pickled = Counter(), name in ("checkpoint", "best")

    @fuzzed(100 if name == "log" else 50, way=st.lists(st.integers(0, 2**16), min_size=1, max_size=6),
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
    "１２", "½", "\udcff", "a\nb", "\u202e", "-", "@file", "%s", "{}", "None", "x" * 300, "cpu", "cpu:7", "cuda:-1",
    "meta", "mps", "paper", "bf16", "RUN", "RUN/args.json", "../data", "/dev/null"]) | st.text(TEXT, max_size=5)


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
