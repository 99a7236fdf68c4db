"""MAML on Omniglot, with neural collapse measured on the way.

    python omniglot_train.py                            # 5-way 1-shot; downloads Omniglot when it is absent
    python omniglot_train.py --n_way 20 --task_num 16   # 20-way 1-shot
    python omniglot_train.py --synthetic --epoch 200    # generated characters, no download
    python omniglot_train.py --resume RUN_FOLDER        # go on with a stopped run
    python omniglot_train.py --test RUN_FOLDER          # test a finished run again
"""

import argparse
import math
from typing import Sequence

import omniglot
import settings
import synthetic
import training
from files import run
from learner import Config, output_shape
from tasks import Dataset

DEFAULTS = {
    "script": "omniglot_train", "epoch": 40000, "n_way": 5, "k_spt": 1, "k_qry": 15, "imgsz": 28, "imgc": 1,
    "task_num": 32, "meta_lr": 1e-3, "update_lr": 0.4, "update_step": 5, "update_step_test": 10, "root": "omniglot/",
    "rotations": True, "print_every": 50,
}


def layers(args: argparse.Namespace) -> Config:
    """Three convolutions of stride 2 and one of 2x2, 64 filters each, then a linear layer."""
    after = [("bn", [64]), ("relu", [True])]
    if args.net == "original":
        after.reverse()
    blocks = []
    for channels, kernel, stride in ((args.imgc, 3, 2), (64, 3, 2), (64, 3, 2), (64, 2, 1)):
        blocks += [("conv2d", [64, channels, kernel, kernel, stride, 0]), *after]
    features = math.prod(output_shape(blocks, args.imgc, args.imgsz))
    return blocks + [("flatten", []), ("linear", [args.n_way, features])]


def dataset(args: argparse.Namespace) -> Dataset:
    common = omniglot.CHANNELS, omniglot.MEAN, omniglot.STD
    if args.synthetic:
        sizes = {split: (classes, synthetic.CHARACTER_IMAGES)
                 for split, (_, classes) in synthetic.CHARACTER_SPLITS.items()}
        return Dataset(lambda: synthetic.CHARACTERS, *common, lambda: sizes,
                       lambda split: synthetic.load_characters(split, args.imgsz))
    sizes = {split: (classes, omniglot.DRAWINGS) for split, classes in omniglot.SPLITS.items()}
    return Dataset(lambda: "Omniglot", *common, lambda: sizes,
                   lambda split: omniglot.load(args.root, split, args.imgsz, args.cache))


def main(argv: Sequence[str] | None = None) -> None:
    args = settings.parse_args("MAML on Omniglot, with neural collapse measured on the way.", DEFAULTS, argv,
                               epoch_help="meta-steps in all")
    training.train(args, dataset(args), layers)


if __name__ == "__main__":
    run(main)
