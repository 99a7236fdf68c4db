"""A trained model on images of one's own: every answer is recomputed from the plain inner loop."""

import json
import shutil

import numpy as np
import oracle
import pytest
import torch
from data_files import read_json, refused
from PIL import Image

import miniimagenet_train
import omniglot_train
import predict
from measuring import class_means, squared_distances

FLAGS = ("--synthetic --device cpu --task_num 2 --epoch 2 --k_qry 3 --update_step 2 --update_step_test 3 "
         "--eval_every 9 --eval_tasks 2 --test_tasks 2 --nc_every 0 --keep_every 1 --n_way 3").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:  # few characters, drawn in no time
        patch.setattr("synthetic.CHARACTER_SPLITS", {"train": (0, 6), "val": (6, 4), "test": (10, 4)})
        for name, flags in {"maml": ["--pixels", "inverted", "--test_weights", "last"],
                            "classifier": ["--learner", "classifier"]}.items():
            omniglot_train.main([*FLAGS, *flags, "--out", str(folder / name)])
    shutil.copy(folder / "maml/weights-0.pt", folder / "maml/best.pt")  # best and last differ
    for learner in ("anil", "boil", "protonet"):  # the same network
        shutil.copytree(folder / "maml", folder / learner)
        path = folder / learner / "args.json"
        path.write_text(path.read_text().replace('"learner": "maml"', f'"learner": "{learner}"'))
    return folder


IMAGES = list(np.random.default_rng(0).integers(0, 256, (13, 40, 30), dtype=np.uint8))  # greyscale
SUPPORT, QUERIES = IMAGES[:4], IMAGES[4:]
LABELS, NAMES, INDEX = ["ka", 7, ("x",), 7], ["ka", 7, ("x",)], torch.tensor([0, 1, 2, 1])


def as_input(images, inverted=False):
    resized = [np.array(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in images]
    x = torch.from_numpy(np.stack(resized)).float()[:, None] / 255
    return 1 - x if inverted else x


def answers(model, support, queries, learner, index=INDEX):
    """The scores of each query, normalised with the support set alone: the plain inner loop, a pass per query."""
    steps, n_way = 3 if learner in ("maml", "anil", "boil") else 0, len(set(index.tolist()))
    *body, (_, (_, features)) = model.net.config
    config = [*body, ("linear", [n_way, features])]
    theta = {name: weight[:n_way] if "linear" in name else weight for name, weight in model.net.weights.items()}
    if n_way > 3:  # more rows than there are; no nearest mean depends on them
        theta |= {name: torch.ones(n_way, *weight.shape[1:]) for name, weight in theta.items() if "linear" in name}
    changes = {"anil": lambda name: "linear" in name, "boil": lambda name: "linear" not in name}.get(learner, bool)
    weights = oracle.adapt(config, theta, support, index, 0.4, steps, changes=changes)[-1]
    rows = []
    for query in queries:
        logits, layers = oracle.forward(config, weights, torch.cat([support, query[None]]))
        distances = squared_distances(layers[-2][-1:], class_means(layers[-2][:-1], index, n_way))
        rows.append(-distances[0] if learner in ("protonet", "classifier") else logits[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("learner", ["maml", "anil", "boil", "protonet", "classifier"])
def test_each_query_is_answered_with_the_support_set_alone(runs, learner):
    model = predict.load(runs / learner)
    labels = model.predict(SUPPORT, LABELS, QUERIES)
    x = as_input(IMAGES, inverted=learner != "classifier")
    assert labels == [NAMES[i] for i in answers(model, x[:4], x[4:], learner).argmax(1)]
    with torch.inference_mode():
        assert labels == predict.load(runs / learner).predict(SUPPORT, LABELS, QUERIES)
        assert labels == [model.predict(SUPPORT, LABELS, [image])[0] for image in QUERIES]
    assert model.predict(SUPPORT, LABELS, []) == []


def test_features_after_adaptation(runs):
    model = predict.load(runs / "maml")
    weights, names, x, y = model.adapt(SUPPORT, LABELS)
    assert names == NAMES and torch.equal(y[0], INDEX)
    last = oracle.adapt(model.net.config, model.net.weights, x[0], INDEX, 0.4, 3)[-1]
    _, layers = oracle.forward(model.net.config, last, as_input(IMAGES, inverted=True))
    features = model.net(model.pixels(IMAGES), weights, features=True)[1][-2]
    torch.testing.assert_close(features[0], layers[-2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learner, index", [("maml", [1, 0, 1, 0]), ("protonet", [1, 1, 0, 0]),
                                            ("protonet", [0, 1, 2, 3])])
def test_other_numbers_of_classes_than_in_training(runs, learner, index):
    model = predict.load(runs / learner)
    x = as_input(IMAGES, inverted=True)
    order = torch.tensor([list(dict.fromkeys(index)).index(label) for label in index])
    expected = answers(model, x[:4], x[4:], learner, order).argmax(1)
    assert model.predict(SUPPORT, index, QUERIES) == [list(dict.fromkeys(index))[i] for i in expected]
    assert len(set(expected.tolist())) > 1


def test_queries_together(runs, monkeypatch):
    """As MAML's tests: the logits of all queries in one batch."""
    monkeypatch.setattr(predict, "QUERIES_PER_PASS", 2)
    model = predict.load(runs / "maml")
    model.args.update_step_test = 0
    expected = [NAMES[i] for i in model.net(as_input(QUERIES, inverted=True)).argmax(1)]
    assert model.predict(SUPPORT, LABELS, QUERIES, transductive=True) == expected
    with pytest.warns(UserWarning, match="2 queries of 3 classes") as warned:
        model.predict(SUPPORT, LABELS, QUERIES[:2], transductive=True)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="2 support images, in training 3 or more"):
        model.predict(SUPPORT[:2], LABELS[:2], QUERIES)


@pytest.mark.parametrize("name, weights", [("last", None), ("weights-0", "weights-0.pt")])
def test_which_weights(runs, name, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    kept = torch.load(runs / "maml" / f"{name}.pt")["weights"]
    loaded = predict.load("~/maml", weights).net.state_dict()
    assert loaded.keys() == kept.keys() and all(torch.equal(loaded[key], kept[key]) for key in kept)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_arrays_and_pil_images_are_the_same(tmp_path, runs, channels, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = predict.load(runs / "maml")
    model.args.imgc = channels
    colour = [np.stack([image, image.T.reshape(image.shape), 255 - image], 2) for image in IMAGES]
    files = [tmp_path / f"{i}.png" for i in range(len(colour))]
    for file, image in zip(files, colour):
        Image.fromarray(image).save(file)
    expected = model.pixels(files)
    assert expected.shape == (1, 13, channels, 28, 28)
    named = [f"~/{file.name}" for file in files]
    for pictures in (named, map(Image.open, files), colour, np.stack(colour), torch.tensor(np.stack(colour))):
        assert torch.equal(model.pixels(pictures), expected)
    drawn = [Image.fromarray(image > 99) for image in IMAGES]  # of mode "1", as Omniglot's files
    assert torch.equal(model.pixels(drawn), model.pixels([np.array(one) for one in drawn]))


def test_photographs():
    args = miniimagenet_train.arguments(["--imgsz", "48"])
    model = predict.Model(miniimagenet_train.network(args), args, miniimagenet_train.dataset(args))
    image = np.random.default_rng(1).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    x = torch.from_numpy(np.array(Image.fromarray(image).resize((48, 48), Image.Resampling.BILINEAR))) / 255
    expected = (x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(model.pixels([image])[0, 0], expected.permute(2, 0, 1))


def test_layers_other_than_the_run_s_are_refused_or_taken_from_it(tmp_path, runs):
    """With the same weights, so that nothing else tells."""
    net = predict.load(runs / "maml").net
    shutil.copytree(runs / "maml", tmp_path / "run")
    args, layers = read_json(tmp_path / "run", "args.json"), [list(layer) for layer in net.config]
    layers[2] = ["tanh", []]
    (tmp_path / "run/args.json").write_text(json.dumps(args | {"layers": layers}))
    for mode in ("--test", "--resume"):
        with refused("args.json: layer 2 was tanh[] in the run and is relu[True] here; use the code that made the run"):
            omniglot_train.main([mode, str(tmp_path / "run")])
    assert predict.load(tmp_path / "run").net.config[2] == ("tanh", [])  # it has the run's
    (tmp_path / "run/args.json").write_text(json.dumps(args | {"layers": [1]}))
    with refused("args.json is not what a run writes"):
        predict.load(tmp_path / "run")


@pytest.mark.parametrize("wrong, said", [
    (lambda run, model, four: predict.load(run.parent), "args.json: No such file"),
    (lambda run, model, four: predict.load(run, "weights-9"), "the weights here are best, last, weights-0, weights-1"),
    (lambda run, model, four: predict.load(run, device="mps"), "--device mps"),
    (lambda run, model, four: model.predict(four, [0, 1, 2, 3], four), "4 different labels; this run's network takes"),
    (lambda run, model, four: model.predict(four[:3], LABELS, four), "3 support images and 4 labels"),
    (lambda run, model, four: model.predict(four, [[0], [0], [1], [1]], four), "give one label per support image, a"),
    (lambda run, model, four: model.predict(four, LABELS, "query.png"), "give a list"),
    (lambda run, model, four: model.predict(four, LABELS, [run / "absent.png"]), "absent.png: No such file"),
    (lambda run, model, four: model.predict(four, LABELS, [run / "args.json"]), "args.json is none of JPEG"),
    (lambda run, model, four: model.predict(four, LABELS, [four[0] / 255]), "is float64 [40, 30]; give uint8"),
    (lambda run, model, four: model.predict(four, LABELS, [four[0] // 128]), "image 0 has only pixels 0 and 1"),
    (lambda run, model, four: model.predict(four, LABELS, [(four[0], 1)]), "image 0 is not an image"),
    (lambda run, model, four: model.predict(four, LABELS, [four[0][:0]]), "image 0 is uint8 [0, 30]; give"),
    (lambda run, model, four: model.predict(four, LABELS, np.stack([four[0]] * 3, 2)), "a single image was given"),
    (lambda run, model, four: model.predict(four, LABELS, [Image.fromarray(four[0] / np.float32(255))]), "floats"),
    (lambda run, model, four: [setattr(model.args, "update_lr", 1e38), model.predict(four, LABELS, four)],
     "answers are not finite")])
def test_errors(runs, wrong, said):
    with refused(said):
        wrong(runs / "maml", predict.load(runs / "maml"), SUPPORT)
