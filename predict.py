"""A trained model on your own images, in three lines.

    import predict
    model = predict.load("runs/RUN")
    labels = model.predict(support_images, support_labels, query_images)

Images are file names, PIL images or uint8 arrays of any size. They are resized and normalised as in training.
"""

import files  # first: the others do not parse on an older Python  # noqa: I001

import argparse
import os
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import checkpoint
import miniimagenet
import miniimagenet_train
import omniglot
import omniglot_train
import record
import settings
from baselines import BASELINES, inner_rates
from device import select_device
from files import UserError, home_path, reading
from images import decode
from learner import Learner
from measuring import scores
from meta import adapt
from tasks import Dataset, Tasks, as_tasks, chunks

Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor
SCRIPTS = {"omniglot_train": (omniglot_train, omniglot.RESAMPLE),
           "miniimagenet_train": (miniimagenet_train, miniimagenet.RESAMPLE)}
QUERIES_PER_PASS = 64  # unless all are normalised together


@torch.inference_mode(False)  # its weights could not be adapted
def load(run: str | os.PathLike, weights: str | None = None, device: str = "cpu") -> "Model":
    """Load the model that a run trained, from its folder and with the network that it recorded.

    Args:
        weights: "best", "last" or "weights-STEP"; None: those that the run tests (--test_weights).
        device: where to compute, as --device. On CUDA convolutions are in tf32 unless you switch it off in torch.
    Raises:
        UserError: the folder, the weights or the device can't be used.
    """
    run = home_path(run)
    script, args = settings_of(run, f"--device={device}")
    torch_device = select_device(args.device)
    with reading(run / "args.json", wrong="is not what a run writes"):
        net = Learner(record.read_args(run).get("layers") or script.layers(args), args.imgc, args.imgsz)
    checkpoint.load_weights(run, (weights or args.test_weights).removesuffix(".pt"), net)
    return Model(net.to(torch_device), args, script.dataset(args))


def settings_of(run: str | os.PathLike, *flags: str) -> tuple[ModuleType, argparse.Namespace]:
    """The script that a run was started with, and the run's settings as for --test, changed by `flags`."""
    name = str(settings.read_settings(Path(run), "name the folder of a run").get("script"))
    if name not in SCRIPTS:
        raise UserError(f"{run} is of {name!r}, not of {' or '.join(SCRIPTS)}; use the code that made the run")
    script, _ = SCRIPTS[name]
    return script, script.arguments([f"--test={run}", *flags])


@dataclass(frozen=True)
class Model:
    """A trained network, with the settings by which its run adapts it and reads images."""

    net: Learner  # with the trained weights
    args: argparse.Namespace  # the run's settings
    dataset: Dataset  # its mean and deviation normalise the images; its own images are not read

    @torch.inference_mode(False)  # the inner loop needs gradients
    @torch.no_grad()
    def adapt(self, support_images: Iterable[Picture], support_labels: Iterable[Hashable]
              ) -> tuple[dict[str, Tensor], list[Hashable], Tensor, Tensor]:
        """The inner loop of the run's test, from the trained weights; ProtoNet and the classifier have none.

        It takes `args.update_step_test` steps, which you may change: fewer can be better with more images per class
        than in training.

        For fewer than n_way classes it adapts the first rows of the classifier. Features after adaptation:
        `model.net(model.pixels(images), model.adapt(support_images, support_labels)[0], features=True)`.

        Args:
            support_images: one or more of each class.
            support_labels: one per image; any hashable objects. Two different ones or more, and for MAML, ANIL and BOIL
                n_way at most.
        Returns:
            The weights, each [1, ...]; the label of each output of the network, a list; the support set as the network
            takes it, images [1, N, c, h, w] and labels [1, N].
        Raises:
            UserError: an image can't be read, or labels and images don't fit.
        """
        try:
            labels = [label.item() if hasattr(label, "item") else label for label in support_labels]
            classes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError("give one label per support image, a number or a string, not a row") from error
        by_mean = self.args.learner in BASELINES
        if len(classes) < 2 or len(classes) > self.args.n_way and not by_mean:
            most = "or more" if by_mean else f"to {self.args.n_way}"
            raise UserError(f"the support set has {len(classes)} different labels; this run's network takes 2 {most}")
        x = self.pixels(support_images)
        if x.shape[1] != len(labels):
            raise UserError(f"there are {x.shape[1]} support images and {len(labels)} labels; give one label per image")
        if len(labels) < self.args.n_way:
            warnings.warn(f"{len(labels)} support images, in training {self.args.n_way} or more: batch norm's "
                          "statistics of so few mean little; give more per class", stacklevel=4)
        y = torch.tensor([[classes[label] for label in labels]], device=x.device)
        theta = dict(self.net.weights)
        for name in self.net.head:  # a row per class; nearest means need none
            rows = theta[name][:len(classes)]
            theta[name] = torch.cat([rows, rows.new_zeros(len(classes) - len(rows), *rows.shape[1:])])
        rates = inner_rates(self.net, self.args.learner, self.args.update_lr, self.args.head_lr, self.args.adapt_blocks)
        *_, weights = adapt(self.net, theta, x, y, rates, 0 if by_mean else self.args.update_step_test)
        return weights, list(classes), x, y

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict(self, support_images: Iterable[Picture], support_labels: Iterable[Hashable],
                query_images: Iterable[Picture], transductive: bool = False) -> list[Hashable]:
        """The label of each query image, after `adapt` with the support set.

        MAML, ANIL and BOIL answer with their classifier, ProtoNet and the ordinary classifier with the label of the
        nearest support mean. Each query is normalised with the support set alone, so its answer does not depend on the
        others.

        Args:
            transductive: normalise all queries together, as MAML's tests do. Answers then depend on the other queries,
                which should be balanced over the classes; with fewer queries than classes there is a warning.
        Raises:
            UserError: as `adapt`, or an answer is not finite.
        """
        weights, names, x_spt, y_spt = self.adapt(support_images, support_labels)
        x_qry, answers = self.pixels(query_images), []
        total = x_qry.shape[1]
        if transductive and 0 < total < len(names):
            warnings.warn(f"{total} queries of {len(names)} classes are normalised together: their "
                          "statistics mean little; leave transductive out", stacklevel=4)
        for queries, in chunks(total if transductive else QUERIES_PER_PASS, total, x_qry[0]) if total else ():
            tasks = Tasks(x_spt, y_spt, queries[None], y_spt)  # the last, the queries' labels, is not used
            logits, similarity, _ = scores(self.net, tasks, weights, transductive)
            answer = (similarity if self.args.learner in BASELINES else logits)[0]
            if not answer.isfinite().all():
                raise UserError("the network's answers are not finite: the inner loop diverges on these images, or the "
                                "weights diverged in training")
            answers += [names[i] for i in answer.argmax(-1).tolist()]
        return answers

    def pixels(self, pictures: Iterable[Picture]) -> Tensor:
        """The network's input, one task [1, N, c, h, w]: resized, scaled to 0..1 and normalised (--pixels)."""
        shape = getattr(pictures, "shape", ())
        if isinstance(pictures, (str, os.PathLike, Image.Image)) or len(shape) == 2 or shape[2:] == (3,):
            raise UserError("a single image was given; give a list of images")
        pictures = list(pictures)
        size, (_, resample) = self.args.imgsz, SCRIPTS[self.args.script]
        images = np.zeros((len(pictures), self.args.imgc, size, size), np.uint8)
        for i, picture in enumerate(pictures):
            images[i], _ = decode(*_content(picture, f"image {i}"), self.args.imgc, size, resample)
        weight = self.net.weights[self.net.classifier]
        one_class = torch.from_numpy(images).to(weight.device)[None, None]  # [T, n_way, N, c, h, w]
        return as_tasks(one_class, len(images), self.dataset.mean, self.dataset.std).x_spt.to(weight.dtype)


def _content(picture: Picture, name: str) -> tuple[bytes | np.ndarray | Image.Image, str]:
    """What `images.decode` takes, and the name that messages use."""
    if isinstance(picture, Image.Image):
        return picture, name
    if isinstance(picture, (str, os.PathLike)):
        with reading(picture, "give the file name of an image"):
            return home_path(picture).read_bytes(), str(picture)
    with reading(name, "give an array or an image, without its label", "is not an image"):
        array = picture.cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.dtype == bool:  # a PIL image of mode "1"
        array = np.uint8(255) * array
    if array.dtype != np.uint8 or array.ndim != 2 and array.shape[2:] != (3,) or not array.size:
        raise UserError(f"{name} is {array.dtype} {list(array.shape)}; give uint8 [h, w] or [h, w, 3] in 0..255")
    if array.max() == 1:
        raise UserError(f"{name} has only pixels 0 and 1; multiply them by 255")
    return array, name


def main() -> None:
    raise UserError('predict.py is used from Python: model = predict.load("RUN"), then '
                    "model.predict(support_images, support_labels, query_images)")


if __name__ == "__main__":
    files.run(main)
