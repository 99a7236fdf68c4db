"""MAML on Omniglot, with neural collapse measured on the way.

    python omniglot_train.py                            # 5-way 1-shot; downloads Omniglot when it is absent
    python omniglot_train.py --n_way 20 --task_num 16   # 20-way 1-shot
    python omniglot_train.py --synthetic --epoch 200    # generated characters, no download
"""

from files import run  # first: the others do not parse on an older Python  # noqa: I001

import argparse
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

import folders
import images
import omniglot
import settings
import synthetic
import training
from learner import CONV_INIT, Config, Learner, output_shape
from tasks import Dataset, normalisation

DEFAULTS = {
    "script": "omniglot_train", "epoch": 40000, "n_way": 5, "k_spt": 1, "k_qry": 15, "imgsz": 28, "imgc": 1,
    "task_num": 32, "meta_lr": 1e-3, "update_lr": 0.4, "update_step": 5, "update_step_test": 10, "root": "omniglot/",
    "split": "shuffled", "rotations": True, "pixels": "unit", "print_every": 50,
    "synthetic_tasks": {"eval_tasks": 50, "test_tasks": 100},
}
PAPER = {  # Finn, Abbeel, Levine 2017, appendix A.1, and the paper's code
    (n_way, k_spt): {
        "epoch": 60000, "net": "paper", "pixels": "inverted", "rotations": True, "rotate_heldout": True,
        "task_num": 32 if n_way == 5 else 16, "k_qry": k_spt, "update_lr": 2.0, "update_step": 1 if n_way == 5 else 5,
        "update_step_test": 3 if n_way == 5 else 5, "meta_lr": 1e-3, "clip": 0.0, "first_order": False,
        "test_weights": "last", "test_tasks": 600, "nc_every": 30, "nc_every_late": 100}
    for n_way in (5, 20) for k_spt in (1, 5)}


def layers(args: argparse.Namespace) -> Config:
    """Four convolutions of 64 filters, each with batch norm and relu, then a linear layer."""
    paper = args.net == "paper"  # padded, and the mean over the last 2 x 2
    scale = not paper if args.bn_scale is None else args.bn_scale
    mean = paper if args.spatial_mean is None else args.spatial_mean
    after = [("bn" if scale else "bn_shift", [64]), ("relu", [True])]
    if args.net == "original":
        after.reverse()
    blocks = []
    for channels, kernel, stride in ((args.imgc, 3, 2), (64, 3, 2), (64, 3, 2), (64, 3, 2) if paper else (64, 2, 1)):
        blocks += [("conv2d", [64, channels, kernel, kernel, stride, "same" if paper else 0]), *after]
    blocks.append(("mean" if mean else "flatten", []))
    return [*blocks, ("linear", [args.n_way, *output_shape(blocks, args.imgc, args.imgsz)])]


def network(args: argparse.Namespace) -> Learner:
    paper = args.net == "paper"
    initial = {"conv2d": CONV_INIT[args.conv_init or ("xavier" if paper else "kaiming")],
               "linear": nn.init.normal_ if paper else nn.init.kaiming_normal_}
    return Learner(layers(args), args.imgc, args.imgsz, initial, args.head_std)


def dataset(args: argparse.Namespace) -> Dataset:
    common = omniglot.CHANNELS, *normalisation(args.pixels, omniglot.MEAN, omniglot.STD)
    if args.synthetic:
        return synthetic.dataset(synthetic.CHARACTERS, *common, args.imgsz)
    if args.data is not None:
        return folders.dataset(args, *common[1:], omniglot.RESAMPLE)
    splits = omniglot.VINYALS if args.split == "vinyals" else omniglot.SPLITS
    counts = {split: [omniglot.DRAWINGS] * classes for split, classes in splits.items()}
    characters = images.dataset(lambda: omniglot.find(args.root, args.cache, args.split),
                                lambda: args.data_name or "Omniglot", *common, args.imgsz)
    return replace(characters, counts=lambda: counts)  # known before anything is downloaded


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for: argv, or sys.argv's if None."""
    return settings.parse_args(__doc__, DEFAULTS, PAPER, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    training.train(args, dataset(args), network)


if __name__ == "__main__":
    run(main)
