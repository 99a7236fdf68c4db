"""Damaged files and odd command lines end in success or in one line and exit status 2.

hypothesis makes them, the same in every run (`FUZZ_EXAMPLES=1000 python -m pytest tests/test_fuzz.py`: that many of
each, and other ones each time). Data sets have a few images here, and valid command lines end where training would
begin.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from data_files import cached, load, omniglot_entries, write_folders, write_photos, write_zips
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nc_logs import write_run

import files
import miniimagenet
import miniimagenet_train
import omniglot
import omniglot_train
import plot_nc
from meta import Meta

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


def outcome(call, around: Path, trains: bool = False) -> str:
    """Call a program in `around` -> "accepted" or "refused"; unless it `trains`, it ends where MAML would begin."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, \
            pytest.MonkeyPatch.context() as patch:
        patch.chdir(around)
        if not trains:
            patch.setattr(Meta, "__init__", lambda *_, **__: sys.exit(0))
        try:
            files.run(call)
        except SystemExit as ended:
            status = ended.code
    said = err.getvalue()
    assert status in (0, 2), (status, said)
    if status:
        *notes, line = said.removesuffix("\n").split("\n")
        assert line.startswith("error: ") and line.isprintable() and len(line) > 15, line
        assert all(note.startswith(NOTES) for note in notes), said
    return "refused" if status else "accepted"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound inputs of each kind, small, in a folder of its own; no network, and figures are drawn but not saved."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
        patch.setattr(omniglot, "DRAWINGS", 4)
        patch.setattr(omniglot, "URL", "http://127.0.0.1:1")
        patch.setattr("synthetic.CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 2), "test": (6, 2)})
        patch.setattr("synthetic.CHARACTER_IMAGES", 3)
        patch.setattr("study.figures.save", lambda figure, path: None)
        for kind in ("photos", "pickles"):
            write_photos(folder / kind / "data", 2, 3, 8)
        cached(folder / "pickles/data")
        write_folders(folder / "drawings/data", omniglot_entries())
        write_zips(folder / "zips/data", omniglot_entries())
        write_run(folder / "log/run")
        omniglot_train.main([*TINY, "--out", str(folder / "run/run")])
        yield folder


PROGRAMS = {
    "photos": lambda: load(miniimagenet, Path("data"), "train", 8),
    "drawings": lambda: [load(omniglot, Path("data"), split, 28) for split in omniglot.SPLITS],
    "plot": lambda: plot_nc.main(["run", "-o", "figure.png"]),
    "test": lambda: omniglot_train.main(["--test", "run"]),
    "resume": lambda: omniglot_train.main(["--resume", "run", "--epoch", "2"]),
    "repeat": lambda: omniglot_train.main(["--from_args", "run"]),
}
FILES = {  # a file that may be bad: its kind, its name, the program that reads it
    "csv": ("photos", "data/train.csv", "photos"), "photo": ("photos", "data/images/p00.png", "photos"),
    "pickle": ("pickles", "data/mini-imagenet-cache-train.pkl", "photos"),
    "drawing": ("drawings", "data/images_evaluation/Angelic/character01/0001_01.png", "drawings"),
    "zip": ("zips", "data/images_evaluation.zip", "drawings"),
    "log": ("log", "run/log.jsonl", "plot"), "plotted args": ("log", "run/args.json", "plot"),
    "resumed log": ("run", "run/log.jsonl", "resume"), "resumed args": ("run", "run/args.json", "resume"),
    "tested args": ("run", "run/args.json", "test"), "repeated args": ("run", "run/args.json", "repeat"),
    "checkpoint": ("run", "run/checkpoint.pt", "resume"), "best": ("run", "run/best.pt", "test"),
}


@contextlib.contextmanager
def bad(sound: Path, name: str):
    """A folder with a copy of a sound input, its file that may be bad, a call of its program."""
    kind, path, program = FILES[name]
    with tempfile.TemporaryDirectory() as folder:
        around = Path(folder) / "around"
        shutil.copytree(sound / kind, around)  # with the files' times, which caches depend on
        yield around, around / path, lambda: outcome(PROGRAMS[program], around, trains=not name.endswith(" args"))


@pytest.mark.parametrize("kind", ["nothing", "folder", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_or_an_empty_one(name, kind, sound):
    with bad(sound, name) as (_, path, program):
        path.unlink()
        {"folder": Path.mkdir, "empty": Path.touch, "nothing": lambda path: None}[kind](path)
        program()


NUMBERS = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f"])
CSV = st.text("p0123.ngclas,\"'\n\r \té;", min_size=1).map(str.encode)
EDITS = st.lists(st.tuples(st.integers(0, 2**20) | st.integers(-400, -1),  # from the end, where zip has its directory
                           st.integers(0, 64) | st.just(2**20),
                           st.binary(max_size=8) | NUMBERS | CSV), min_size=1, max_size=4)


def damaged(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """With other bytes in place of some, at each edit's place."""
    for place, removed, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + removed:]
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, sound):
    outcomes = Counter()

    @fuzzed(40, edits=EDITS)
    def test(edits):
        with bad(sound, name) as (_, path, program):
            path.write_bytes(damaged(path.read_bytes(), edits))
            outcomes[program()] += 1

    test()
    assert outcomes["refused"], outcomes


VALUES = st.sampled_from([
    "", " ", "0", "-1", "1", "2", "5", "28", "2147483648", "1.5", "nan", "-inf", "1e400", "1e-320", "0x10", "１２", "½",
    "\udcff", "a\nb", "\u202e", "-", "@file", "%s", "{}", "None", "cpu", "cpu:7", "cuda:-1", "meta", "mps", "paper",
    "bf16", "run", "run/args.json", "../data", "/dev/null"])


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
        with bad(sound, "best") as (around, *_):
            first, last = ["--synthetic", "--device", "cpu"] * synthetic, []
            if main == plot_nc.main:  # without a RUN it draws the README's figures; of two -o the last one holds
                first, last = ["run"], ["-o", "out.png"]
            outcome(lambda: main([*first, *(word for words in chosen for word in words), *last]), around)

    test()
