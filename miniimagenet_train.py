"""MAML on miniImageNet, with neural collapse measured on the way.

    python miniimagenet_train.py                        # 5-way 5-shot; the data in miniimagenet/
    python miniimagenet_train.py --k_spt 1              # 5-way 1-shot
    python miniimagenet_train.py --synthetic --epoch 400    # 100 meta-steps on generated photos, no data
"""

from files import run  # first: the others do not parse on an older Python  # noqa: I001

import argparse
from collections.abc import Sequence

import folders
import images
import miniimagenet
import settings
import synthetic
import training
from learner import CONV_INIT, Config, Learner, output_shape
from tasks import Dataset, normalisation

DEFAULTS = {
    "script": "miniimagenet_train", "epoch": 60000, "n_way": 5, "k_spt": 5, "k_qry": 15, "imgsz": 84, "imgc": 3,
    "task_num": 4, "meta_lr": 1e-3, "update_lr": 0.01, "update_step": 5, "update_step_test": 10,
    "root": "miniimagenet/", "pixels": "normalised", "print_every": 100,
    "synthetic_tasks": {"eval_tasks": 10, "test_tasks": 20},
}
PAPER = {  # Finn, Abbeel, Levine 2017, appendix A.1, and the paper's code; epoch counts tasks
    # clip: the code sums the loss over 75 queries, divides by k_spt and clips at 10
    (5, k_spt): {
        "epoch": 240000, "net": "paper", "pixels": "unit", "task_num": 4, "k_qry": 15, "k_qry_test": k_spt,
        "update_lr": 0.05, "update_step": 5, "update_step_test": 10, "meta_lr": 1e-3, "clip": round(10 * k_spt / 75, 3),
        "first_order": False, "test_weights": "last", "test_tasks": 600, "nc_every": 30, "nc_every_late": 100}
    for k_spt in (1, 5)}


def layers(args: argparse.Namespace) -> Config:
    """Four 3x3 convolutions of 32 filters, each followed by a max-pool, then a linear layer."""
    paper = args.net == "paper"  # padded, and every pool halves
    scale = not paper if args.bn_scale is None else args.bn_scale
    after = [("bn" if scale else "bn_shift", [32]), ("relu", [True])]
    if args.net == "original":
        after.reverse()
    blocks = []
    for channels, stride in ((args.imgc, 2), (32, 2), (32, 2), (32, 2 if paper else 1)):
        blocks += [("conv2d", [32, channels, 3, 3, 1, "same" if paper else 0]), *after, ("max_pool2d", [2, stride, 0])]
    blocks.append(("mean" if args.spatial_mean else "flatten", []))
    return [*blocks, ("linear", [args.n_way, *output_shape(blocks, args.imgc, args.imgsz)])]


def network(args: argparse.Namespace) -> Learner:
    own = "xavier" if args.net == "paper" else "kaiming"
    initial = {"conv2d": CONV_INIT[args.conv_init or own], "linear": CONV_INIT[own]}
    return Learner(layers(args), args.imgc, args.imgsz, initial, args.head_std)


def dataset(args: argparse.Namespace) -> Dataset:
    common = miniimagenet.CHANNELS, *normalisation(args.pixels, miniimagenet.MEAN, miniimagenet.STD)
    if args.synthetic:
        return synthetic.dataset(synthetic.PHOTOS, *common, args.imgsz)
    if args.data is not None:
        return folders.dataset(args, *common[1:], miniimagenet.RESAMPLE)

    def name() -> str:
        real = photos.sizes() == {"train": (64, 600), "val": (16, 600), "test": (20, 600)}
        return args.data_name or ("miniImageNet" if real else "photos in the miniImageNet layout")

    photos = images.dataset(lambda: miniimagenet.find(args.root, args.cache), name, *common, args.imgsz)
    return photos


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for: argv, or sys.argv's if None."""
    return settings.parse_args(__doc__, DEFAULTS, PAPER, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    training.train(args, dataset(args), network)


if __name__ == "__main__":
    run(main)
