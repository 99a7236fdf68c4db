"""Runs of every learner and recipe: stopped and resumed, measured or not, they end with the same bits."""

import json
import os
import shutil
import sys
from dataclasses import replace
from unittest.mock import Mock, call

import kill
import pytest
import torch
from data_files import log_rows, read_json, refusal, write_classes
from test_resume import TINY, refused, resume, same, small, stop_at, train, whole  # noqa: F401

import miniimagenet_train
import omniglot_train
import settings
import synthetic
from baselines import BASELINES
from files import UserError
from meta import Meta
from study import controls
from tasks import with_rotations
from training import Data

FLAGS = {**{name: ["--learner", name] for name in ("anil", "boil", "protonet", "classifier")},
         "cosine": ["--lr_schedule", "cosine"], "kept norms": ["--keep_norms"],
         "not transductive": ["--no-transductive", "--keep_every", "3"]}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_stopped_and_resumed(flags, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *flags)
    stopped = stop_at(monkeypatch, tmp_path / "stopped", "__call__", 6, flags=[*TINY, *flags])
    resume(stopped)
    same(whole, stopped)
    if "cosine" in flags:
        said = refused("--resume", str(whole), "--epoch", "20")
        assert said.startswith("--epoch 20: the run's cosine ends at 8") and said.endswith(f"--from_args {whole}")


@pytest.mark.parametrize("learner", ["maml", *(pytest.param(name, marks=pytest.mark.slow) for name in BASELINES)])
def test_measuring_more_queries_changes_no_bit(learner, tmp_path, monkeypatch):
    """--nc_every 0 measures nothing, also with an --nc_every_late, which --recipe paper sets."""
    monkeypatch.setattr("meta.LATE", 4)
    weights, measured = [], []
    for flags in ("--nc_every 0 --nc_every_late 2", "--nc_every 1"):
        run = train(tmp_path / flags, *f"--k_qry 1 --learner {learner} {flags} --nc_qry 3".split())
        last = torch.load(run / "last.pt", weights_only=True)
        weights.append(last["weights"])
        measured.append([row["step"] for row in log_rows(run) if row.get("classes") == "train"])
        *_, validation = log_rows(run, "val")
        own_rule = validation["acc"][-1] if learner == "maml" else validation["nearest_mean"][0]
        assert last["val_accuracy"] == pytest.approx(own_rule, abs=1e-5)
    assert not kill.differences(*weights)
    assert measured == [[], list(range(8))]


def test_the_classifier_learns_the_training_class_of_each_label(tmp_path, monkeypatch):
    steps, original = [], Meta.__call__

    def watched(maml, tasks, every_step, measured, classes):
        steps.append((tasks, classes))
        return original(maml, tasks, every_step, measured, classes)

    monkeypatch.setattr(Meta, "__call__", watched)
    train(tmp_path / "run", "--learner", "classifier", "--epoch", "2", "--nc_every", "0")
    images = with_rotations(synthetic.generate(synthetic.CHARACTERS, *synthetic.CHARACTER_SPLITS["train"],
                                               synthetic.CHARACTER_IMAGES, 28, synthetic.SEED)) / 255
    for tasks, classes in steps:
        candidates = images[classes.gather(1, tasks.y_qry)]  # [T, N, images per class, c, h, w]
        assert (candidates == tasks.x_qry[:, :, None]).flatten(3).all(3).any(2).all()


def test_random_labels_mix_the_training_images_alone():
    args = omniglot_train.arguments("--synthetic --random_labels --no-rotations".split())
    dataset = omniglot_train.dataset(args)
    data = Data(args, dataset, torch.device("cpu"))
    ordered, mixed = (images.sum((2, 3, 4)) for images in (dataset.load("train"), data.load("train")))
    assert torch.equal(ordered.flatten().sort().values, mixed.flatten().sort().values)
    assert (ordered != mixed).double().mean() > 0.9
    assert torch.equal(dataset.load("val"), data.load("val"))
    with pytest.raises(UserError, match="--random_labels needs .*equally many images; .* give --no-random_labels"):
        settings.check(args, replace(dataset, counts=lambda: {"train": [20, 19], "val": [20] * 9, "test": [20] * 9}),
                       omniglot_train.network)


def test_weights_that_are_kept_and_tested(tmp_path):
    run = train(tmp_path / "run", "--keep_every", "3", "--test_weights", "last")
    assert sorted(path.name for path in run.glob("weights-*.pt")) == ["weights-0.pt", "weights-3.pt", "weights-6.pt"]
    result = read_json(run)
    assert result["last_step"] == 8 and result["test"]["inner_steps"] == result["test_nontransductive"]["inner_steps"]
    again = ["--test", str(run), "--no-transductive"]
    omniglot_train.main([*again, "--test_weights", "best", "--k_qry", "3", "--update_step_test", "2"])
    best = read_json(run, "test-6tasks-3qry-2steps-not-transductive.json")
    assert best["test"]["k_qry"] == 3 and best["best_step"] in (0, 3, 6, 8)
    assert best["test_nontransductive"]["inner_steps"] == [0, 1, 2]
    omniglot_train.main([*again, "--k_qry", "1"])  # a transductive test answers the first query of each class alone
    last = read_json(run, "test-6tasks-1qry-1steps-last-not-transductive.json")
    assert last["test_nontransductive"] == result["test_nontransductive"]
    omniglot_train.main(["--test", str(run), "--test_weights", "weights-3"])
    kept = read_json(run, "test-6tasks-2qry-1steps-weights-3.json")
    assert (kept["weights-3_step"], kept["val_accuracy"]) == (3, None)
    for flags, weights in (["--synthetic"], "weights-3"), (["--test", str(run)], "../weights-3"):
        assert f"--test_weights {weights}: must be best or last" in refused(*flags, "--test_weights", weights)
    assert "weights-4.pt: No such file" in refused("--test", str(run), "--test_weights", "weights-4")


def test_testing_on_other_images_needs_only_their_test_split(tmp_path, capsys):
    """Fewer classes and images than the run was trained with."""
    write_classes(tmp_path / "many", 12)
    for split, classes in (("train", 1), ("val", 1), ("test", 2)):
        write_classes(tmp_path / "few" / split, classes, count=2, name=split)
    own = "--no-synthetic --learner classifier --data_name mine --nc_every 0 --data"
    run = train(tmp_path / "run", *own.split(), str(tmp_path / "many"))
    other = ["--test", str(run), "--data", str(tmp_path / "few"), "--k_qry_test", "1"]
    omniglot_train.main([*other, "--task_chunk", "1"])
    result = f"test-6tasks-1qry-1steps-{tmp_path.name}_few.json"
    assert read_json(run, result)["data"] == "images in few"
    omniglot_train.main([*other, "--data_name", "a/../other"])
    assert read_json(run, result)["data"] == "a/../other"
    known = f"the test classes here are not those of {run}, which may have been trained on some of them"
    assert capsys.readouterr().out.count(f"note: {known}\n") == 2
    omniglot_train.main(["--test", str(run)])
    assert (run / "test-6tasks-2qry-1steps.json").read_text() == (run / "result.json").read_text()
    shutil.copytree(tmp_path / "many", tmp_path / "new copy")  # of the same class names, perhaps with other images
    omniglot_train.main(["--test", str(run), "--data", str(tmp_path / "new copy")])
    assert (run / f"test-6tasks-2qry-1steps-{tmp_path.name}_new_copy.json").exists()
    assert known not in capsys.readouterr().out
    shutil.copytree(tmp_path / "many/class 0", tmp_path / "many/aardvark")  # the shuffle of the names is another now
    for own_images in [], ["--data", f"{tmp_path / 'many'}/"]:
        assert refused("--test", run, *own_images).startswith(f"{known}; restore the images (class folders")
    assert f"{run} has other test classes than mine (" in refusal(controls.main, run)
    recorded = read_json(run, "args.json")
    recorded["data"]["splits"] = {}  # as an older version recorded it: no classes
    (run / "args.json").write_text(json.dumps(recorded))
    omniglot_train.main(["--test", str(run)])
    assert known not in capsys.readouterr().out


@pytest.mark.slow
def test_flags_reach_meta_and_torch(tmp_path, monkeypatch, whole):
    """--clip, --deterministic, --nc_every_late, --seed."""
    monkeypatch.setattr("meta.LATE", 4)
    train(tmp_path / "clipped", "--clip", "1e-4")
    run = train(tmp_path / "run", "--clip", "1e4", "--deterministic", "--nc_every", "1", "--nc_every_late", "3")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, two, none = (kill.state(folder)["weights"] for folder in (tmp_path / "clipped", run, whole))
    assert kill.differences(one, none) and not kill.differences(two, none)
    assert [row["step"] for row in log_rows(run) if row.get("classes") == "train"] == [0, 1, 2, 3, 6]
    other = train(tmp_path / "other", "--epoch", "1", "--seed", "3")
    assert not torch.are_deterministic_algorithms_enabled()
    assert log_rows(other, "train")[0] != log_rows(whole, "train")[0]


def test_recipes():
    """The paper's settings, case by case, as shared by its appendix and its code; a flag given overrides them."""
    paper, parsed = "--recipe paper".split(), omniglot_train.arguments
    five, twenty = parsed(paper), parsed([*paper, "--n_way", "20", "--k_spt", "5"])
    assert (five.update_lr, five.update_step, five.update_step_test, five.task_num, five.k_qry) == (2.0, 1, 3, 32, 1)
    assert (twenty.update_lr, twenty.update_step, twenty.task_num, twenty.k_qry, twenty.net) == (2.0, 5, 16, 5, "paper")
    mini = miniimagenet_train.arguments(paper)
    assert (mini.update_lr, mini.clip, mini.k_qry, mini.k_qry_test, mini.pixels) == (0.05, 0.667, 15, 5, "unit")
    assert settings.meta_steps(mini) == settings.meta_steps(five) == 60_000
    assert parsed([]).net == "conv_bn_relu" and parsed([]).recipe == "original"


# ---- --tensorboard; the package is not among the requirements


@pytest.mark.slow
def test_scalars_are_those_of_the_log(tmp_path, monkeypatch):
    made = Mock()
    writer = made.SummaryWriter.return_value
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    run = train(tmp_path / "run", "--tensorboard")
    scalars = {(name, step): value for (name, value, step), _ in writer.add_scalar.call_args_list}
    for row in log_rows(run):
        if row["kind"] == "train":
            assert scalars["train/loss", row["step"]] == row["loss"]
        if row["kind"] in ("train", "val"):
            assert scalars[f"{row['kind']}/accuracy", row["step"]] == row["acc"][-1]
        for model in ("meta", "finetuned") if row["kind"] == "nc" else ():
            value = row[model]["relative_within"]["mean"][-2]
            assert scalars.get((f"{row['classes']}/relative within trace, {model}", row["step"])) == value
    assert writer.close.called
    resume(run, "--epoch", "9")
    resume(run, "--epoch", "10", "--no-tensorboard")
    folder = str(run / "tensorboard")
    assert made.SummaryWriter.call_args_list == [call(folder, purge_step=0), call(folder, purge_step=8)]


@pytest.mark.parametrize("flag", ["--tensorboard", "--no-tensorboard"])
def test_without_the_package(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert (train(tmp_path / "run", "--epoch", "1", flag) / "result.json").exists()
    assert capsys.readouterr().out.count("pip install tensorboard") == (flag == "--tensorboard")
