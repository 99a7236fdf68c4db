"""The settings that the study trains, and the groups of them that its tables and figures compare."""

from typing import NamedTuple

from study.logs import Run, describe


class Setting(NamedTuple):
    """A setting of the study. Its runs are NAME-seed1, NAME-seed2, ...; tables and figures show its label."""

    name: str
    label: str
    flags: str
    seeds: int = 2  # how many: 1, 2, ...
    script: str = "omniglot_train.py"


_ORIGINAL = "--task_num 8 --epoch 6000 --nc_every 30 --eval_every 250"
_PHOTO_DATA = "--data_name 'Tiny ImageNet in the miniImageNet layout'"
_PHOTOS = f"{_PHOTO_DATA} --task_num 2 --nc_every 30 --eval_every 150 --eval_tasks 50"
_SMALL = "--recipe paper --k_spt 1 --imgsz 32 --nc_every 100"
_TWENTY = "--data miniimagenet/folders-20 --data_name 'Tiny ImageNet, 20 images per training class'"
_CROPS = "--data miniimagenet/folders-crops --data_name 'crops of photographs'"  # study/variants.py makes the folders
_NOISE = "--data omniglot/folders-noise --data_name 'Omniglot in noise'"
_LONG = "--recipe paper --eval_every 1000 --keep_every 10000 --save_every 5000"
_SHORT = "--recipe paper --nc_every 100 --eval_every 1000 --save_every 5000"
_TWENTY_WAY = f"{_LONG} --n_way 20 --nc_every 100 --nc_every_late 300"
_CONTRAST, _ONE_CHANGE = f"{_SHORT} --epoch 10000", f"{_SHORT} --epoch 5000"
_SMALL_HEAD, _OTHER_NETWORK = f"{_ONE_CHANGE} --head_std 0.177", f"{_ONE_CHANGE} --net conv_bn_relu"
_IN_LAYOUT = "tinyimagenet-in-miniimagenet-layout-5w5s"
SETTINGS = {setting.name: setting for setting in (
    Setting("omniglot-5w1s", "1-shot, second order", _ORIGINAL, 3),
    Setting("omniglot-5w5s", "5-shot, second order", f"{_ORIGINAL} --k_spt 5", 3),
    Setting("omniglot-5w1s-first-order-original", "1-shot, first order, original network",
            f"{_ORIGINAL} --first_order --net original", 3),
    Setting("omniglot-5w1s-original", "1-shot, second order, original network", f"{_ORIGINAL} --net original", 3),
    Setting("omniglot-5w1s-first-order", "1-shot, first order", f"{_ORIGINAL} --first_order", 3),
    Setting(_IN_LAYOUT, "photographs, 5-shot, second order", f"{_PHOTOS} --epoch 1200", 1, "miniimagenet_train.py"),
    Setting(f"{_IN_LAYOUT}-first-order-original", "photographs, 5-shot, first order, original network",
            f"{_PHOTOS} --epoch 2000 --first_order --net original", 1, "miniimagenet_train.py"),
    Setting("contrast-maml", "MAML, second order", _CONTRAST, 5),
    Setting("contrast-first-order", "MAML, first order", f"{_CONTRAST} --first_order", 3),
    Setting("contrast-zero-head", "MAML, classifier kept at 0", f"{_CONTRAST} --head_std 0 --freeze_head", 3),
    Setting("contrast-anil", "ANIL", f"{_CONTRAST} --learner anil", 3),
    Setting("contrast-protonet", "ProtoNet", f"{_CONTRAST} --learner protonet", 3),
    Setting("contrast-classifier", "classifier", f"{_CONTRAST} --learner classifier", 3),
    Setting("contrast-boil", "BOIL", f"{_CONTRAST} --learner boil", 5),
    *(Setting(f"photographs-{name}", f"photographs of 32 x 32, {label}", f"{_PHOTO_DATA} {_SMALL} {flags}",
              script="miniimagenet_train.py")
      for name, label, flags in (
          ("maml", "MAML", "--epoch 40000 --learner maml"),
          ("anil", "ANIL", "--epoch 40000 --learner anil"),
          ("protonet", "ProtoNet", "--epoch 40000 --learner protonet"),
          ("classifier", "classifier", "--epoch 40000 --learner classifier"),
          ("omniglot-loop", "MAML, inner loop and classifier as on Omniglot",
           "--epoch 40000 --update_step 1 --update_lr 2 --update_step_test 3 --spatial_mean --head_std 1"),
          ("slow-head", "MAML, the classifier's inner rate 0.005", "--epoch 28000 --head_lr 0.005"),
          ("blocks-4-5", "MAML, inner loop of block 4 and the classifier", "--epoch 40000 --adapt_blocks 4 5"))),
    *(Setting(name, label, f"{_SMALL} {flags}", script="miniimagenet_train.py") for name, label, flags in (
        ("photographs-20-images", "photographs of 32 x 32, MAML, 20 per training class", f"{_TWENTY} --epoch 40000"),
        ("crops", "crops of one photograph per class", f"{_CROPS} --epoch 40000"),
        ("crops-zero-head", "crops of one photograph per class, classifier kept at 0",
         f"{_CROPS} --epoch 28000 --head_std 0 --freeze_head"),
        ("omniglot-as-photographs", "characters of 32 x 32",
         "--data omniglot/folders --data_name 'Omniglot in class folders' --epoch 40000"),
        ("omniglot-100-as-photographs", "100 characters of 32 x 32",
         "--data omniglot/folders-100 --data_name '100 characters of Omniglot' --epoch 12000"),
        ("omniglot-in-little-noise", "characters in noise of 0.2",
         "--data omniglot/folders-noise-0.2 --data_name 'Omniglot in little noise' --epoch 40000"),
        ("omniglot-in-less-noise", "characters in noise of 0.3",
         "--data omniglot/folders-noise-0.3 --data_name 'Omniglot in less noise' --epoch 40000"),
        ("omniglot-in-noise", "characters in noise of 0.4", f"{_NOISE} --epoch 40000"),
        ("omniglot-in-noise-5-shot", "characters in noise of 0.4, 5-shot",
         f"{_NOISE} --epoch 28000 --k_spt 5 --task_num 4"))),
    Setting("random-labels", "MAML, labels at random",
            "--recipe paper --epoch 2000 --nc_every 100 --eval_every 1000 --save_every 500 --random_labels"),
    Setting("cosine", "MAML, second order, cosine schedule", f"{_CONTRAST} --lr_schedule cosine"),
    Setting("blocks-4-5", "MAML, inner loop of block 4 and the classifier", f"{_CONTRAST} --adapt_blocks 4 5", 3),
    Setting("blocks-4-5-20-way", "20-way, MAML, inner loop of block 4 and the classifier",
            f"{_TWENTY_WAY} --epoch 6000 --adapt_blocks 4 5", 1),
    Setting("small-body-step-10000", "MAML, inner rate 0.2, the classifier's 2",
            f"{_CONTRAST} --update_lr 0.2 --head_lr 2"),
    Setting("kept-norms", "MAML, kernels of constant norm", f"{_CONTRAST} --keep_norms", 3),
    Setting("anil-small-step", "ANIL, 1 inner step at rate 0.4", f"{_CONTRAST} --learner anil --update_lr 0.4"),
    Setting("small-step", "1 inner step at rate 0.4", f"{_ONE_CHANGE} --update_lr 0.4"),
    Setting("small-head", "classifier from N(0, 0.18²)", _SMALL_HEAD),
    Setting("slow-head", "classifier from N(0, 0.18²), its inner rate 0.5", f"{_SMALL_HEAD} --head_lr 0.5"),
    Setting("fast-head", "classifier from N(0, 0.18²), its inner rate 8", f"{_SMALL_HEAD} --head_lr 8"),
    Setting("other-network", "conv-bn-relu", _OTHER_NETWORK, 3),
    Setting("other-network-no-scale", "conv-bn-relu, batch norm without scale", f"{_OTHER_NETWORK} --no-bn_scale"),
    Setting("other-network-xavier", "conv-bn-relu with Xavier convolutions", f"{_OTHER_NETWORK} --conv_init xavier"),
    Setting("other-network-large-images", "conv-bn-relu, images of 36 x 36", f"{_OTHER_NETWORK} --imgsz 36"),
    Setting("other-network-larger-head", "conv-bn-relu, images of 36 x 36, classifier from N(0, 0.18²)",
            f"{_OTHER_NETWORK} --imgsz 36 --head_std 0.177"),
    Setting("other-network-mean", "conv-bn-relu, images of 36 x 36, spatial mean",
            f"{_OTHER_NETWORK} --imgsz 36 --spatial_mean"),
    Setting("other-network-large-head", "conv-bn-relu, classifier from N(0, 1)",
            f"{_SHORT} --epoch 2000 --net conv_bn_relu --head_std 1"),
    *(Setting(f"first-order-{name}", f"classifier from N(0, 0.18²){rate}, first order",
              f"{_SMALL_HEAD} {flag} --first_order")
      for name, rate, flag in (("small-head", "", ""), ("slow-head", ", its inner rate 0.5", "--head_lr 0.5"),
                               ("fast-head", ", its inner rate 8", "--head_lr 8"))),
    Setting("first-order-zero-head", "classifier kept at 0, first order",
            f"{_ONE_CHANGE} --head_std 0 --freeze_head --first_order"),
    *(Setting(f"paper-omniglot-{name}", f"paper's recipe, {label}", flags, seeds) for name, label, seeds, flags in (
        ("5w1s", "5-way 1-shot", 3, _LONG),
        ("5w1s-first-order", "5-way 1-shot, first order", 1, f"{_LONG} --first_order"),
        ("5w1s-blocks-4-5", "5-way 1-shot, inner loop of block 4 and the classifier", 2,
         f"{_SHORT} --epoch 60000 --adapt_blocks 4 5"),
        ("5w5s", "5-way 5-shot", 1, f"{_LONG} --k_spt 5 --epoch 35000"),
        ("20w1s", "20-way 1-shot", 1, f"{_TWENTY_WAY} --epoch 24000"))),
    *(Setting(f"long-{name.lower()}", f"paper's recipe, 5-way 1-shot, {name}",
              f"{_SHORT} --epoch 40000 --learner {name.lower()}", seeds)
      for name, seeds in (("ANIL", 1), ("ProtoNet", 3), ("classifier", 3))),
)}


def _named(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in SETTINGS if name.startswith(prefix))


MAIN = ("omniglot-5w1s", "omniglot-5w5s", "omniglot-5w1s-first-order-original")
PHOTOGRAPHS = (_IN_LAYOUT, f"{_IN_LAYOUT}-first-order-original")
CELLS = ("omniglot-5w1s", "omniglot-5w1s-first-order", "omniglot-5w1s-original", "omniglot-5w1s-first-order-original")
LEARNERS, LONG = _named("contrast-"), _named("paper-")
LONG_LEARNERS = (*(f"paper-omniglot-5w1s{kind}" for kind in ("", "-first-order", "-blocks-4-5")), *_named("long-"))
DIFFICULTY = {  # one inner loop and network on images whose classes are hard or easy to tell apart
    "photographs": ("photographs-maml", "photographs-20-images", "crops"),
    "characters": ("omniglot-in-noise", "omniglot-in-less-noise", "omniglot-in-little-noise",
                   "omniglot-100-as-photographs", "omniglot-as-photographs")}
# photographs of 32 x 32, and their recipe on other images
SMALL_PHOTOGRAPHS = (*_named("photographs-"), "omniglot-as-photographs", "omniglot-100-as-photographs",
                     *_named("omniglot-in-"), *_named("crops"))
CHANGED_AT = 5_000  # the meta-step at which changed settings are compared
CHANGED = ("contrast-maml", "contrast-zero-head", "small-step", "small-head", "slow-head", "fast-head",
           *_named("other-network"), "contrast-first-order", *_named("first-order-"))
TWENTY_WAY = ("paper-omniglot-20w1s", "blocks-4-5-20-way")
# MAML with different inner loops in training
OTHER_LOOPS = ("contrast-maml", "contrast-zero-head", "blocks-4-5", "small-body-step-10000", "small-step", "small-head",
               "paper-omniglot-5w1s", "paper-omniglot-5w1s-blocks-4-5")
CONTROL_QUERIES, CONTROL_SHOTS = 15, 5  # per class in study/controls.py; the shots of its control "5-shot"
STEP_SIZES = (0.08, 0.03, 0.09, 0.6)  # about MAML's in blocks 1 to 4 (TABLES.md), to which other learners' are scaled

TASKS = {"train": "training tasks", "heldout": "held-out tasks"}
MODELS = {"meta": "before adaptation", "finetuned": "adapted"}
METRICS = {"relative_within": "relative within trace", "nc1": "tr(S_W S_B⁺)/C", "cdnv_unbiased": "CDNV, unbiased",
           "directional_cdnv": "directional CDNV", "etf_error": "ETF error"}
# On Omniglot, in percent, by ways and shots: MAML / first-order MAML (Finn, Abbeel, Levine 2017; Nichol et al. 2018).
PUBLISHED = {(5, 1): "98.7 ± 0.4 / 98.3 ± 0.5", (5, 5): "99.9 ± 0.1 / 99.2 ± 0.2", (20, 1): "95.8 ± 0.3 / 89.4 ± 0.5"}


def label(run: Run) -> str:
    """The label of the run's setting in the study if it lies in res/ or runs/study/; else its description."""
    *_, grandparent, parent, folder = ("", "", *run.path.resolve().parts)
    name = folder.rpartition("-seed")[0]
    in_study = parent == "res" or (grandparent, parent) == ("runs", "study")
    return SETTINGS[name].label if in_study and name in SETTINGS else describe(run)
