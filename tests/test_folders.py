"""Your own images, in folders of class folders, with either script."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from data_files import listing, read_json, refused, write_classes
from PIL import Image

import folders
import images
import miniimagenet
import miniimagenet_train
import omniglot_train

BILINEAR = Image.Resampling.BILINEAR
find = partial(folders.find, resample=BILINEAR)
TINY = ("--device cpu --n_way 2 --k_spt 1 --k_qry 2 --task_num 1 --epoch 1 --update_step 1 --update_step_test 1 "
        "--eval_tasks 2 --test_tasks 2 --nc_every 0").split()


def test_classes_are_split_by_their_names_alone(tmp_path, capsys):
    write_classes(tmp_path / "mine", 10)
    Image.new("L", (8, 8)).save(tmp_path / "mine/preview.png")
    (tmp_path / "mine/docs").mkdir()
    (tmp_path / "mine/docs/notes.txt").write_text("no image")
    image_set = find(tmp_path / "mine")
    assert {split: list(classes) for split, classes in image_set.splits.items()} == {
        "train": ["class 0", "class 1", "class 2", "class 5", "class 6", "class 8"], "val": ["class 3", "class 4"],
        "test": ["class 7", "class 9"]}
    assert image_set.summary.startswith("class folders, split by a shuffle of their names with seed 2015: train 6 "
                                        "classes of 4 ('class 0') to 12 images, val 2 classes of 7 ('class 3') to 8 im")
    said = capsys.readouterr().err
    assert said.startswith(f"note: 2 files and folders in {tmp_path / 'mine'} are left out, as only images in class")
    assert said.endswith(" are read: 'docs', 'preview.png'\n")
    data = {channels: image_set.load("val", 8, channels) for channels in (1, 3)}
    assert data[1].shape == (2, 8, 1, 8, 8) and data[3].shape == (2, 8, 3, 8, 8) and image_set.counts()["val"] == [7, 8]
    picture = Image.open(tmp_path / "mine/class 4/7.png")
    assert np.array_equal(data[3][1, 7], np.asarray(picture.resize((8, 8), BILINEAR)).transpose(2, 0, 1))
    assert np.array_equal(data[1][1, 7, 0], np.asarray(picture.convert("L").resize((8, 8), BILINEAR)))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "testing"),
                                   ("base", "val", "novel")])
def test_split_folders_are_used_as_they_are(tmp_path, names):
    for first, name in enumerate(names):
        write_classes(tmp_path / "top" / name, 2 + first, first, name=name)
    assert find(tmp_path).summary == f"folders {', '.join(names)} of class folders: " + ", ".join(
        f"{split} {2 + i} classes of 4 ('{names[i]} 0') to {5 + i} images" for i, split in enumerate(images.SPLITS))


@pytest.mark.parametrize("top, cache", [("", None), ("cache/cache", None), ("pictures", "decoded")])
def test_decoded_images_are_no_class_and_hide_no_folder(tmp_path, top, cache):
    """In a hidden folder by default, so that a class may be named cache."""
    write_classes(tmp_path / top, 3)
    (tmp_path / top / "class 0").rename(tmp_path / top / "cache")
    (tmp_path / "__MACOSX" / "class 0").mkdir(parents=True)
    for _ in range(2):  # the second finds what the first has written
        image_set = find(tmp_path, cache=cache and tmp_path / cache)
        assert sorted(label for classes in image_set.splits.values() for label in classes) == [
            "cache", "class 1", "class 2"]
        image_set.load("val", 8, 3)
    assert len(listing(tmp_path / (cache or ".cache"))) == 1


def test_what_lies_next_to_classes_and_images_is_noted(tmp_path, capsys):
    """But not text, tables and what operating systems write."""
    for first, split in enumerate(images.SPLITS):
        write_classes(tmp_path / "top" / split, 3, first, name=split)
    write_classes(tmp_path / "top", 1, name="extra")
    for name in ("preview.png", "top/train/train 0/3", "top/train/train 0/boxes.txt", "top/train/train 0/Thumbs.db"):
        shutil.copy(tmp_path / "top/train/train 0/0.png", tmp_path / name)
    (tmp_path / "top/train/train 0/empty").mkdir()
    find(tmp_path)
    loose, extra, strange = capsys.readouterr().err.splitlines()
    assert loose.startswith(f"note: 1 files and folders in {tmp_path} are") and loose.endswith(": 'preview.png'")
    assert extra == f"note: 1 folders with images next to them in {tmp_path / 'top'} are left out: 'extra 0'"
    assert strange.startswith("note: 1 files and folders in ") and strange.endswith(": 'train 0/3'")


def test_folders_of_runs_among_the_classes_are_not_classes(tmp_path):
    write_classes(tmp_path, 6)
    for run in ("run", "runs/omniglot_train-1", "class 0/run"):
        shutil.copytree(tmp_path / "class 5", tmp_path / run)  # its figures
        for name in ("args.json", "log.jsonl"):
            (tmp_path / run / name).touch()
    (tmp_path / "class 1/args.json").touch()
    classes = [label for labels in find(tmp_path).splits.values() for label in labels]
    assert sorted(classes) == [f"class {label}" for label in range(6)]


def test_copies_and_csv_files_are_noted(tmp_path, capsys):
    write_classes(tmp_path, 3)
    shutil.copytree(tmp_path / "class 0", tmp_path / "class 3")
    for split in images.SPLITS:
        (tmp_path / f"{split}.csv").touch()
    image_set = find(tmp_path)
    assert capsys.readouterr().err.startswith("note: with --data the CSV files in ")
    split = next(split for split, classes in image_set.splits.items() if "class 3" in classes)
    for number, file in enumerate(image_set.splits[split]["class 3"]):
        shutil.copy(file.path, tmp_path / f"class 3/copy {number}.png")
    find(tmp_path).load(split, 8, 3)
    assert f"note: 4 images of {split} have the same pixels as another one" in capsys.readouterr().err


def test_the_images_of_a_class_may_lie_in_a_folder_images(tmp_path):
    """As in Tiny ImageNet's train/, whose val/ and test/ have one folder of images without classes."""
    write_classes(tmp_path / "plain", 3)
    for label in range(3):
        inner = tmp_path / f"tiny/train/class {label}/images"
        shutil.copytree(tmp_path / f"plain/class {label}", inner)
        (inner.parent / "boxes.txt").write_text("0 0 9 9")
    plain, tiny = find(tmp_path / "plain"), find(tmp_path / "tiny/train")
    assert plain.summary == tiny.summary
    assert all(torch.equal(plain.load(split, 8, 3), tiny.load(split, 8, 3)) for split in images.SPLITS)
    for split in ("val", "test"):
        shutil.copytree(tmp_path / "plain/class 0", tmp_path / "tiny" / split / "images")
    for find_images in (find, miniimagenet.find):
        with refused("tiny/val has one folder, images", f"train/ alone split, with --data {tmp_path}/tiny/train"):
            find_images(tmp_path / "tiny")


def split_folders(*splits: str):
    return lambda root: [write_classes(root / split, 3) for split in splits]


@pytest.mark.parametrize("make, words", [
    (lambda root: None, ["there is no folder", "--data FOLDER"]),
    (lambda root: write_classes(root, 3) or (root / "class 0/a.TIF").write_text("image"),
     ["in other formats than JPEG, PNG", "class 0/a.TIF; convert"]),
    (lambda root: write_classes(root, 3) or write_classes(root / "class 0", 1, name="more"),
     ["folders in the class folders of", "mine have images that would be left out: 'class 0/more 0'; move"]),
    (lambda root: write_classes(root, 3) or write_classes(root / "class 0/deep/er", 1),
     ["mine have images that would be left out: 'class 0/deep/er/class 0'; move"]),
    (lambda root: write_classes(root, 3) or (root / "class 9").symlink_to("gone"),
     ["links in ", "mine lead nowhere, and their classes would be left out: 'class 9'; correct"]),
    (lambda root: write_classes(root, 3) or (root / "loop").symlink_to("loop"), ["lead nowhere", "'loop'; correct"]),
    (lambda root: write_classes(root, 2), ["holds 2 class folders", "at least 3 classes"]),
    (lambda root: [write_classes(root / alphabet, 3) for alphabet in ("Greek", "Latin")],
     ["6 class folders lie too deep in ", "such as Greek/class 0; move them up into"]),
    (lambda root: write_classes(root / "data", 3) or (root / "splits/a").mkdir(parents=True),
     ["3 class folders lie too deep in ", "such as data/class 0; give --data ", "/mine/data"]),
    (lambda root: write_classes(root.parent, 1) or (root.parent / "class 0").rename(root),
     ["0 class folders (4 images outside them)"]),
    (split_folders("train", "test"), ["has train, test and no val/"]),
    (split_folders("train", "val", "valid", "test"), ["two folders of one split", "valid", "move one away"]),
    (lambda root: split_folders("train")(root) and [(root / split).mkdir() for split in ("val", "test")],
     ["the val split has no class with images"]),
    (lambda root: write_classes(root, 5, count=1), ["'class 0' in", "at least 2 images"]),
    (split_folders("train", "val", "test"),
     ["in both train and val", "'class 0'; 'class 1'; 'class 2'", "have the classes split with --data"])])
def test_faults_are_named_in_one_line(tmp_path, make, words):
    make(tmp_path / "mine")
    with refused(*words):
        find(tmp_path / "mine")


@pytest.mark.parametrize("script, flags", [(omniglot_train, ["--imgsz", "28"]), (omniglot_train, ["--imgc", "3"]),
                                           (miniimagenet_train, "--imgsz 48 --imgc 1 --data_name mine".split())])
def test_training_on_images_of_ones_own(tmp_path, script, flags, capsys):
    write_classes(tmp_path / "pictures", 12)
    script.main([*TINY, *flags, "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run")])
    data = read_json(tmp_path / "run", "args.json")["data"]
    assert data["name"] == ("mine" if "mine" in flags else "images in pictures")
    assert sum(split["images"] for split in data["splits"].values()) == len([*tmp_path.glob("pictures/*/*.png")])
    train = data["splits"]["train"]
    assert (train["classes"], train["images_per_class"], len(train["classes_digest"])) == (8, 4, 16)
    assert data["found"].startswith("class folders, split by a shuffle of their names with seed 2015: train 8 classes")
    assert data["found"] in capsys.readouterr().out


def test_resuming_needs_the_same_classes_in_a_folder_of_any_name(tmp_path):
    write_classes(tmp_path / "pictures", 12)
    out = str(tmp_path / "run")
    omniglot_train.main([*TINY, "--data", str(tmp_path / "pictures"), "--out", out])
    write_classes(tmp_path / "others", 12, name="other")
    with refused("is of a run with classes_digest of train", "restore that, or start again: "):
        omniglot_train.main(["--resume", out, "--data", str(tmp_path / "others"), "--epoch", "2"])
    (tmp_path / "pictures").rename(tmp_path / "renamed")
    omniglot_train.main(["--resume", out, "--data", str(tmp_path / "renamed"), "--epoch", "2"])
    assert read_json(tmp_path / "run")["data"] == "images in renamed"
    (tmp_path / "renamed/class 11/0.png").unlink()
    with refused("is of a run with images of val 26, and here it is 25; restore that, or start again: "):
        omniglot_train.main(["--resume", out, "--data", str(tmp_path / "renamed"), "--epoch", "3"])


def test_query_images_are_needed_where_they_are_drawn_alone(tmp_path):
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        write_classes(tmp_path / "pictures" / split, 3, len(split), count, name=split)
    flags = [*TINY, "--data", str(tmp_path / "pictures"), "--k_qry", "4", "--nc_qry", "2"]
    with refused("--k_spt 1 --k_qry 4", "3 images per class in its val split; lower their sum to 3, or remove the "
                 "smallest classes (folders train, val, test", "val 3 classes of 3 ('val 0') to 5 images"):
        omniglot_train.main([*flags, "--out", str(tmp_path / "run")])
    omniglot_train.main([*flags, "--k_qry_test", "1", "--out", str(tmp_path / "run")])
    assert read_json(tmp_path / "run")["test"]["k_qry"] == 1


def test_a_folder_test_is_enough_to_test_a_trained_model_on_all_its_classes(tmp_path, capsys):
    write_classes(tmp_path / "pictures", 12)
    omniglot_train.main([*TINY, "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run")])
    again = ["--test", str(tmp_path / "run"), "--data", str(tmp_path / "own")]
    write_classes(tmp_path / "own", 2)
    with refused("holds 2 class folders", f"into its own folder in {tmp_path / 'own/test'}"):
        omniglot_train.main(again)
    write_classes(tmp_path / "own", 3, name="more")  # one of them becomes the test split
    (tmp_path / "own/more 2").rename(tmp_path / "own/novel")  # a class
    with refused("--n_way 2: images in own has 1 classes in its test split; lower it, or add classes or put"):
        omniglot_train.main(again)
    shutil.rmtree(tmp_path / "own")
    write_classes(tmp_path / "own/test", 5)
    omniglot_train.main(again)
    result, = (tmp_path / "run").glob("test-*.json")
    assert read_json(tmp_path / "run", result.name)["test_classes"] == 5
    assert "note: the test classes here are not those of " in capsys.readouterr().out
    write_classes(tmp_path / "pictures again", 15)  # other classes become the test split
    omniglot_train.main([*again[:3], str(tmp_path / "pictures again")])
    assert "note: the test classes here are not those of " in capsys.readouterr().out
    with refused("own has test and no train/, val/; add what is missing, or put"):
        omniglot_train.main([*TINY, "--data", str(tmp_path / "own"), "--out", str(tmp_path / "other")])
