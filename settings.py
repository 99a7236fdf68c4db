"""The settings of a training run: its flags, the settings of an earlier run, and checks."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import device as devices
from baselines import BASELINES, inner_rates
from files import Parser, UserError, quoted, reading, same_place
from learner import Learner
from record import read_args, say
from tasks import Dataset

MODES = ("resume", "test", "from_args")  # flags that name the run whose settings hold; not settings themselves
PLACE = ("root", "data", "cache", "device")  # where a run happens; not part of the experiment
PATHS = (*MODES, "root", "data", "cache", "out")  # ~ is the home folder, as in a shell
LEAST = {"n_way": 2, "eval_tasks": 2, "test_tasks": 2, "nc_every": 0, "nc_every_late": 0, "keep_every": 0,
         "save_every": 0, "task_chunk": 0, "seed": 0}  # smallest value of an integer flag, if not 1
NC_QRY = 15  # --nc_qry where it is not given and the classes have enough images
RATES = ("meta_lr", "update_lr", "head_lr")  # may not be 0
MAY_CHANGE = {  # flags that may change a run's settings
    "resume": ("epoch", *PLACE, "save_every", "task_chunk", "cuda_graph", "tensorboard"),
    "test": ("k_spt", "k_qry", "k_qry_test", "update_step_test", "test_tasks", "test_weights", "transductive",
             "task_chunk", "data_name", *PLACE),
}


def parse_args(usage: str, defaults: dict, paper: dict, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a training script; with --resume, --test and --from_args the settings of the run named there.

    Args:
        usage: the script's docstring, at the top of --help.
        defaults: of the flags whose default is the script's own; "rotations" only where the data has them.
        paper: what --recipe paper sets instead, (n_way, k_spt) -> flag -> value.
        argv: arguments without the program's name; sys.argv's if None.
    Raises:
        UserError: unknown or malformed flags; a run that can't be read, or isn't of this script.
    """
    parser = _parser(usage, defaults, paper)
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # None: not on the command line
    flags = {name: value for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    modes = [mode for mode in MODES if mode in flags]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} exclude each other; give one")
    args = (_settings_of_run(modes[0], flags, parser) if modes
            else _settings_of_new_run(flags, parser, defaults, paper))
    args.adapt_blocks = args.adapt_blocks or None
    if "root" in flags and "resume" not in flags and (args.synthetic or args.data is not None):
        raise UserError(f"--root {args.root}: the images are generated, or those of --data; leave --root out, give "
                        "--no-synthetic, or name other images with --data FOLDER")
    for name in ("cuda_graph", "precision"):
        if flags.get(name) in (True, "tf32") and args.device.startswith("cpu"):
            say(f"note: --{name} has no effect on a CPU")
    return args


def _settings_of_new_run(flags: dict, parser: argparse.ArgumentParser, defaults: dict,
                         paper: dict) -> argparse.Namespace:
    """The script's defaults, what --recipe paper and --synthetic set instead, and the flags on the command line."""
    if flags.get("recipe") == "paper":
        n_way, k_spt = flags.get("n_way", defaults["n_way"]), flags.get("k_spt", defaults["k_spt"])
        if (n_way, k_spt) not in paper:
            cases = ", ".join(f"{way}-way {shot}-shot" for way, shot in paper)
            raise UserError(f"--recipe paper: the paper has no {n_way}-way {k_spt}-shot; there are {cases}")
        parser.set_defaults(**paper[n_way, k_spt])
    if "rotations" in defaults and "data" in flags:
        parser.set_defaults(rotations=False, rotate_heldout=False)
    fewer_tasks = defaults["synthetic_tasks"] if flags.get("synthetic") else {}
    return argparse.Namespace(**vars(parser.parse_args([])) | fewer_tasks | flags)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """With the default, where there is one; the other texts say what holds if the flag is not given."""
        return action.help if action.default is None else super()._get_help_string(action)


def _parser(usage: str, defaults: dict, paper: dict) -> argparse.ArgumentParser:
    recipes = (f"  {way}-way {shot}-shot: {' '.join(_as_flags(values, values))}"
               for (way, shot), values in paper.items())
    parser = Parser(usage="python %(prog)s [flags]", description=usage, formatter_class=_Help, allow_abbrev=False,
                    epilog="\n".join(["what --recipe paper sets (other flags override it):", *recipes]))

    def flag(name: str, default, text: str, **options):
        default = defaults.get(name, default)
        if "action" not in options:
            plain = str if default is None else type(default)
            options.setdefault("type", os.path.expanduser if name in PATHS else plain)
        group.add_argument(f"--{name}", default=default, help=text, **options)

    def choice(name: str, default: bool | None, text: str):
        flag(name, default, text, action=argparse.BooleanOptionalAction)

    fewer = defaults["synthetic_tasks"]
    group = parser.add_argument_group("what is trained")
    flag("recipe", "original", "defaults of the other flags: the original code's, or MAML's paper's (see the end)",
         choices=["original", "paper"])
    flag("learner", "maml", "anil: the inner loop adapts the last layer alone; boil: all but the last; without an "
         "inner loop in training: protonet, a prototypical network; classifier, an ordinary one over all training "
         "classes", choices=["maml", "anil", "boil", *BASELINES])
    flag("epoch", None, "meta-steps in all; miniimagenet_train.py: tasks in all, TASK_NUM per meta-step")
    flag("seed", 222, "of the initial weights and the training tasks")
    flag("from_args", None, "repeat a run in a new folder; other flags change its settings", metavar="RUN_FOLDER")
    group = parser.add_argument_group("tasks")
    flag("n_way", None, "classes per task")
    flag("k_spt", None, "support images per class (k-shot)")
    flag("k_qry", None, "query images per class")
    flag("k_qry_test", None, "query images per class in validation and testing; K_QRY if not given", type=int)
    flag("nc_qry", None, f"query images per class that neural collapse is measured on; if not given {NC_QRY}, or all "
         "images that are not support, if these are fewer", type=int)
    flag("task_num", None, "tasks per meta-step (the meta-batch)")
    group = parser.add_argument_group("images")
    flag("root", None, "folder of the data")
    flag("data", None, "your own images instead: a folder of class folders, or of train/, val/ and test/ with class "
         "folders (--test needs only test/); IMGC 1 or 3 makes them greyscale or colour", metavar="FOLDER")
    flag("data_name", None, "name of the data in logs and figures; the data's own if not given")
    if "split" in defaults:
        flag("split", None, "how characters are split into training, validation and test: a fixed shuffle, or the "
             "alphabets of Vinyals et al. (2016)", choices=["shuffled", "vinyals"])
    flag("cache", None, "folder of the decoded images; if not given, ROOT/cache, or FOLDER/.cache with --data FOLDER")
    choice("synthetic", False, "train on generated images, with no data at all, and evaluate on fewer tasks")
    flag("imgsz", None, "height and width, in pixels, to which images are resized")
    flag("imgc", None, "channels per image")
    flag("pixels", None, "normalised: by ImageNet's mean and standard deviation (omniglot_train.py: as unit); unit: "
         "0..1; inverted: 1..0", choices=["normalised", "unit", "inverted"])
    if "rotations" in defaults:
        choice("rotations", None, "in training, turn each class of a task by a random multiple of 90 degrees; off with "
               "--data if not given")
        choice("rotate_heldout", False, "the same in validation and testing; off with --data if not given")
    choice("random_labels", False, "put the training images into classes at random: a control with nothing to learn")
    group = parser.add_argument_group("network")
    flag("net", "conv_bn_relu", "original: blocks of conv, relu, batch norm; conv_bn_relu: of conv, batch norm, relu; "
         "paper: network and initial weights of the paper's code (padded, batch norm without scale)",
         choices=["original", "conv_bn_relu", "paper"])
    choice("bn_scale", None, "batch norm has a scale, and the inner loop adapts scale and shift; --no-bn_scale: only a "
           "shift, which it doesn't adapt. The network's own if neither is given")
    choice("spatial_mean", None, "the classifier takes the last map's mean over height and width; --no-spatial_mean: "
           "all its values. The network's own if neither is given")
    flag("conv_init", None, "the convolutions' initial weights, Kaiming normal or Xavier uniform; the network's own if "
         "not given", choices=["kaiming", "xavier"])
    flag("head_std", None, "standard deviation of the last layer's initial weights; the network's own if not given",
         type=float)
    choice("freeze_head", False, "the last layer's initial weights are not trained, only adapted by the inner loop; "
           "with --head_std 0 they stay 0 (the zeroing trick of Kao et al. 2022)")
    group = parser.add_argument_group("inner and outer loop")
    flag("update_lr", None, "learning rate of the inner loop, SGD on the mean cross-entropy; the paper's code sums "
         "over the classes, so that its 0.4 is 2.0 here in 5-way")
    flag("head_lr", None, "the same for the last layer alone; UPDATE_LR if not given", type=float)
    flag("adapt_blocks", None, "blocks that MAML's inner loop adapts, 1 the first convolution with its batch norm, the "
         "highest the last layer; all if none is given", type=int, nargs="*", metavar="BLOCK")
    flag("update_step", None, "inner steps in training")
    flag("update_step_test", None, "inner steps in validation and testing")
    choice("first_order", False, "treat the inner gradients as constants (first-order MAML)")
    flag("meta_lr", None, "learning rate of the outer loop, Adam")
    flag("lr_schedule", "constant", "of the outer learning rate: constant, or half a cosine that ends at 0",
         choices=["constant", "cosine"])
    flag("clip", 0.0, "clip each value of the outer gradient to -CLIP..CLIP; 0: none")
    choice("keep_norms", False, "scale every convolution's kernel back to its initial norm after each meta-step; where "
           "batch norm follows, a kernel's norm only decides how large its inner steps are")
    choice("skip_nonfinite", False, "skip and count updates with a loss, gradient or new weight that is not finite, "
           "instead of stopping there")
    group = parser.add_argument_group("measuring, validating, testing")
    flag("nc_every", 100, "meta-steps between two neural-collapse measurements on training tasks; 0: none at all")
    flag("nc_every_late", None, "as --nc_every, from meta-step 7,500 on; NC_EVERY if not given", type=int)
    flag("eval_every", 500, "meta-steps between two validations, with metrics on the same held-out tasks")
    flag("eval_tasks", 100, f"tasks per validation, always the same; with --synthetic {fewer['eval_tasks']}")
    flag("test_tasks", 600, f"tasks of the test at the end; with --synthetic {fewer['test_tasks']}")
    flag("test_weights", "best", "test the weights of the best validation, or the last; with --test also weights-STEP, "
         "of --keep_every")
    choice("transductive", True, "validate, and choose the best weights, with batch norm over the whole query set; "
           "--no-transductive: over the support set and one query. A test reports both accuracies; the one without "
           "transduction is of one query per class, or of all with --no-transductive")
    flag("test", None, f"test a finished run again, on its own settings; {_flags(MAY_CHANGE['test'])} may be changed",
         metavar="RUN_FOLDER")
    group = parser.add_argument_group("the run's folder")
    flag("out", None, "folder of the run; runs/SCRIPT-<n>w<k>s-seed<seed>-<time>-<process> if not given")
    flag("save_every", 500, "meta-steps between two checkpoints; 0: only at the start, at the end and when stopped")
    flag("keep_every", 0, "meta-steps between two copies of the weights that are kept, weights-STEP.pt; 0: none")
    choice("tensorboard", False, "also write loss, accuracy and relative within traces to OUT/tensorboard")
    flag("resume", None, f"resume a stopped run on its own settings; {_flags(MAY_CHANGE['resume'])} may be changed "
         "(EPOCH may end the run earlier or later)", metavar="RUN_FOLDER")
    group = parser.add_argument_group("machine")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "where to compute: cpu, cuda, cuda:1, ...")
    flag("task_chunk", 0, "maximum tasks in memory at once; lower saves memory; a step is the same up to rounding; "
         "0: all on a GPU, fewer on a CPU, by their size")
    choice("cuda_graph", None, "on CUDA, capture the training step once and replay it: the same result, faster; if not "
           "given, where it can be captured")
    flag("precision", "float32", "of CUDA's matrix products and convolutions: tf32 is faster and less precise",
         choices=["float32", "tf32"])
    choice("deterministic", False, "on CUDA, only kernels that repeat bit for bit, as a CPU always does")
    parser.set_defaults(script=defaults["script"], print_every=defaults["print_every"])
    return parser


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _settings_of_run(mode: str, flags: dict, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings that a run's args.json holds, changed by the flags on the command line.

    Where these name other images, the settings of the run's own images are left out.
    """
    settings = _recorded(Path(flags[mode]), mode, parser)
    if flags.get("recipe", settings["recipe"]) != settings["recipe"]:
        raise UserError(f"--recipe can't be set with --{mode}: the run's settings hold; give single flags")
    if mode != "resume":
        if settings["device"].startswith("cuda") and not torch.cuda.is_available():
            settings["device"] = "cpu"  # a run that was made on a GPU can be repeated and tested anywhere
        if settings["data"] is None:  # --root may hold other images here than where the run was made
            settings["data_name"] = None
        to_synthetic = flags.get("synthetic", False) and not settings["synthetic"]
        other_folder = not same_place(flags.get("data", settings["data"]), settings["data"])
        if to_synthetic or other_folder:
            other = {"data": None, "data_name": None, "synthetic": False, "split": "shuffled"}
            if other_folder:
                other |= {"rotations": False, "rotate_heldout": False}
            settings |= {name: value for name, value in other.items() if name in settings}
    if mode == "from_args":
        run = Path(flags[mode])
        with reading(run / "args.json", wrong="is not what a run writes"):
            splits = read_args(run).get("data", {}).get("splits", {})
            smallest = [split["images_per_class"] for split in splits.values()]
        if settings["nc_qry"] == _measured_queries(settings["k_spt"], smallest):  # `check` sets it again
            settings["nc_qry"] = None
        return argparse.Namespace(**settings | {"out": None} | flags)
    for name, value in flags.items():
        if name not in MAY_CHANGE[mode] and name != mode and (name == "out" or value != settings[name]):
            raise UserError(f"--{name} can't be set with --{mode}: the run's value is kept; "
                            f"flags that may be set: {_flags(MAY_CHANGE[mode])}")
    if mode == "test":
        queries = flags.get("k_qry_test", flags.get("k_qry", settings["k_qry_test"] or settings["k_qry"]))
        one_query_set = {"k_qry": queries, "k_qry_test": queries, "nc_qry": None}  # a test measures no neural collapse
        return argparse.Namespace(**settings | flags | one_query_set)
    epoch = flags.get("epoch", settings["epoch"])
    if epoch != settings["epoch"] and settings["lr_schedule"] == "cosine":
        raise UserError(f"--epoch {epoch}: the run's cosine ends at {settings['epoch']}; "
                        f"start another with --from_args {quoted(flags['resume'])}")
    return argparse.Namespace(**settings | flags | {"out": flags["resume"]})


def _recorded(run: Path, mode: str, parser: argparse.ArgumentParser) -> dict:
    """The settings in a run's args.json, checked as strictly as a command line is.

    A file of an older version lacks newer flags, which take their defaults. A run is resumed only by the version that
    began it, because a new flag's default need not be what the old code did.
    """
    recorded, defaults = read_settings(run, f"--{mode} takes the folder of a run"), vars(parser.parse_args([]))
    script, differs = recorded.get("script"), f"{run / 'args.json'} is not of this script and version"
    if script != defaults["script"]:
        raise UserError(f"{differs} (script {script}); use that script, or the code that made the run")
    different = recorded.keys() - defaults.keys()
    if mode == "resume":
        different |= defaults.keys() - recorded.keys() - {*MODES, *MAY_CHANGE["resume"]}
    if different:
        raise UserError(f"{differs} ({', '.join(sorted(different))}); use the code that made the run")
    try:
        return vars(parser.parse_args(_as_flags(recorded, defaults)))
    except UserError as error:
        raise UserError(f"{run / 'args.json'}: {error}") from error


def read_settings(run: Path, takes: str) -> dict:
    """What a run's args.json holds under "settings"."""
    with reading(run / "args.json", takes, "is not what a run writes"):
        return dict(read_args(run)["settings"].items())


def _as_flags(settings: dict, defaults: dict) -> list[str]:
    """The command line that gives these settings."""
    flags = []
    for name, value in settings.items():
        if name in MODES or name in ("script", "print_every") or value is None and defaults[name] is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif name == "adapt_blocks" and isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def recorded_settings(args: argparse.Namespace) -> dict:
    """The settings that args.json holds."""
    return {name: value for name, value in vars(args).items() if name not in MODES}


def meta_steps(args: argparse.Namespace) -> int:
    """How many meta-steps the run takes: --epoch counts meta-steps, or tasks on miniImageNet, as in the original."""
    return args.epoch if args.script == "omniglot_train" else args.epoch // args.task_num


def check(args: argparse.Namespace, dataset: Dataset, network: Callable[[argparse.Namespace], Learner]) -> None:
    """Refuse settings that can't work, before any image is decoded; set `nc_qry` where it was not given.

    Raises:
        UserError: one line that names the flag and what it can be.
    """
    for name, value in vars(args).items():
        least = LEAST.get(name, 1)
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value < 2**31:
            raise UserError(f"--{name} {value}: must be a whole number from {least} to {2**31 - 1}")
        if isinstance(value, float):
            bound = "above" if name in RATES else "from"
            largest = torch.finfo(torch.float32).max / (11 if name == "meta_lr" else 1)  # Adam takes up to 10 times it
            if not 0 <= value <= largest or bound == "above" and value == 0:
                raise UserError(f"--{name} {value}: must be a number {bound} 0, at most {largest:.1e}")
    for name in ("data", "data_name"):
        if args.synthetic and (value := getattr(args, name)) is not None:
            raise UserError(f"--{name} {value}: with --synthetic the images are generated; leave --{name} out, "
                            "or give --no-synthetic")
    if args.adapt_blocks is not None and args.learner != "maml":
        raise UserError(f"--adapt_blocks: --learner {args.learner} has its own inner loop; give --learner maml, or "
                        "--adapt_blocks without a number")
    for name in ("first_order", "freeze_head"):
        if getattr(args, name) and args.learner in BASELINES:
            raise UserError(f"--{name}: --learner {args.learner} trains without an inner loop; give --no-{name}")
    if getattr(args, "split", "shuffled") != "shuffled" and (args.synthetic or args.data is not None):
        raise UserError(f"--split {args.split}: these images are not Omniglot's; give --split shuffled")
    if not len(dataset.mean) == len(dataset.std) == dataset.channels or 0 in dataset.std:
        raise UserError(f"{dataset.name()}: mean and std must have a value per channel ({dataset.channels}), no std "
                        f"may be 0; they are {tuple(dataset.mean)} and {tuple(dataset.std)}")
    if args.imgc != dataset.channels:
        raise UserError(f"--imgc {args.imgc}: {dataset.name()} has {dataset.channels}; give --imgc {dataset.channels}")
    if meta_steps(args) < 1:
        raise UserError(f"--epoch {args.epoch}: it counts tasks here, and a meta-step takes {args.task_num}; give "
                        f"{args.task_num} or more")
    tests_only = args.test is not None
    if not re.fullmatch(r"best|last|weights-\d+" if tests_only else "best|last", args.test_weights):
        raise UserError(f"--test_weights {args.test_weights}: must be best or last; with --test also weights-STEP, "
                        "as in weights-1000")
    if args.learner == "classifier" and not tests_only and (devices.size() > 1 or args.task_chunk):
        raise UserError("--learner classifier: batch norm is over all images of a step, so one process takes them "
                        "together; give --task_chunk 0, and start one process")
    if args.random_labels and not tests_only and len(set(dataset.counts()["train"])) > 1:
        raise UserError("--random_labels needs training classes with equally many images; remove the surplus, or give "
                        "--no-random_labels")
    if args.task_num % devices.size() and not tests_only:
        raise UserError(f"--task_num {args.task_num}: {devices.size()} processes need a multiple of {devices.size()}")
    with torch.device("meta"):  # shapes alone: a huge --n_way is refused below, and doesn't run out of memory
        _check_network(args, network)
    sizes = {split: size for split, size in dataset.sizes().items() if split == "test" or not tests_only}
    for split, (classes, images) in sizes.items():
        if args.n_way > classes:
            folders = "put them into test/" if tests_only else "divide them into train/, val/ and test/ yourself"
            divided = f" or {folders}" if args.data else ""
            raise UserError(f"--n_way {args.n_way}: {dataset.name()} has {classes} classes in its {split} split; lower "
                            f"it, or add classes{divided}")
        for name in ("k_qry" if split == "train" or args.k_qry_test in (None, args.k_qry) else "k_qry_test", "nc_qry"):
            if args.k_spt + (getattr(args, name) or 0) > images:
                unequal = args.data and images < max(dataset.counts()[split])
                remedy = f", or remove the smallest classes ({dataset.found()})" if unequal else ""
                raise UserError(f"--k_spt {args.k_spt} --{name} {getattr(args, name)}: {dataset.name()} has {images} "
                                f"images per class in its {split} split; lower their sum to {images}{remedy}")
    if args.nc_qry is None:
        args.nc_qry = _measured_queries(args.k_spt, [images for _, images in sizes.values()])
    if args.nc_every and args.nc_qry < 2 and not tests_only:
        raise UserError(f"--nc_qry {args.nc_qry}: within-class spread needs 2 query images per class; "
                        f"change --nc_qry or --k_spt {args.k_spt}, or measure nothing with --nc_every 0")


def _measured_queries(k_spt: int, images: Sequence[int]) -> int:
    """--nc_qry where it is not given, for splits whose smallest class has so many images."""
    return min([NC_QRY, *(number - k_spt for number in images)])


def _check_network(args: argparse.Namespace, network: Callable[[argparse.Namespace], Learner]) -> None:
    """Refuse `layers` that can't be built or trained, or that don't end in one output per class."""
    try:
        net = network(args)
    except ValueError as error:
        too_small = any(text in str(error) for text in ("Kernel size can't be greater", "Output size is too small"))
        hint = "; a larger --imgsz or --net paper may fit" if too_small else ""
        raise UserError(f"layers at --imgsz {args.imgsz}: {error}{hint}") from error
    if not isinstance(net, Learner):
        raise UserError(f"network: it must return a Learner, and returns {type(net)}")
    name, params = net.config[-1]
    if name != "linear" or net.shapes[-1] != [args.n_way]:
        raise UserError(f"layers: the last layer is {name}{params}; with --n_way {args.n_way} it must be "
                        f"linear[{args.n_way}, features]")
    try:
        rates = inner_rates(net, args.learner, args.update_lr, args.head_lr, args.adapt_blocks)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if args.head_lr is not None and net.classifier not in rates:
        raise UserError("--head_lr: the inner loop does not adapt the last layer; leave --head_lr out, or change "
                        "--learner or --adapt_blocks")
    if args.freeze_head and args.head_std == 0 and net.classifier not in rates:
        raise UserError("--freeze_head: with --head_std 0 the last layer stays 0, and nothing is trained; give another "
                        "--head_std, or have the inner loop adapt the last layer (--learner, --adapt_blocks)")
    if args.learner == "protonet" and len(net.weights) == len(net.head):
        raise UserError("layers: --learner protonet trains the layers before the last, and none of them has weights")
