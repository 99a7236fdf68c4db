"""Draws neural collapse while MAML trains, from the training scripts' logs.

    python plot_nc.py                          every figure of the README, from the logs committed under res/
    python plot_nc.py --figure layers          one of them
    python plot_nc.py RUN                      draw another run's traces into RUN/result.png
    python plot_nc.py RUN RUN RUN -o FILE.png  several seeds of one setting: their mean with a 95% band
    python plot_nc.py RUN --layer block2       another layer than the last hidden one
    python plot_nc.py RUN RUN --figure nc      another figure, into the first RUN; different settings side by side

A RUN is a run's folder (log.jsonl or log.jsonl.gz, and args.json) or the log itself with args.json beside it.

    traces                 the original's panels (result.png): the meta model's traces and its relative within trace
                           over the first 7,500 meta-steps, then both models' traces over the whole run
    nc                     NC1 to NC4 and CDNV against meta-steps, with their permuted-label nulls
    layers                 collapse by layer, one line a checkpoint
    inner_steps            traces and accuracy after each inner step
    collapse_vs_accuracy   CDNV against held-out error over all checkpoints
    original               the relative within trace as the original measured it, and by label, of the same logits
    accuracy               validation accuracy against meta-steps, one line a setting

The meta model is theta, before adaptation; the finetuned one theta'_K, after the inner steps. figures.py says what the
curves and their bands are.
"""

import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import matplotlib

import drawing
import figures
import files
import nc_statistics
import runs as logs
from runs import Run

HERE = Path(__file__).resolve().parent

FIGURES = {  # what --figure takes: the function, and the name of its picture
    "traces": (figures.traces_figure, "result.png"),
    "nc": (figures.nc_figure, "nc.png"),
    "layers": (figures.layers_figure, "layers.png"),
    "inner_steps": (figures.inner_steps_figure, "inner_steps.png"),
    "collapse_vs_accuracy": (figures.collapse_figure, "collapse_vs_accuracy.png"),
    "original": (figures.original_figure, "original.png"),
    "accuracy": (figures.accuracy_figure, "accuracy.png"),
}


class Picture(NamedTuple):
    """What is drawn of which runs, and where it goes."""

    figure: str
    groups: list[list[Run]]
    path: Path


def committed_pictures() -> list[Picture]:
    """Every figure of the README, of the study's runs in res/; accuracy.png of all Omniglot runs there.

    Raises:
        UserError: there are none, or one is broken.
    """
    res = HERE / "res"
    study = nc_statistics.committed_study(res)
    omniglot = [runs for runs in study if runs[0].data["name"] == "Omniglot"] or study[:1]
    pictures = [Picture("traces", study[:1], HERE / "result.png")]
    pictures += [Picture(name, omniglot, res / FIGURES[name][1])
                 for name in ("nc", "layers", "inner_steps", "collapse_vs_accuracy", "original")]  # fmt: skip
    pictures += [Picture("nc", [runs], res / "photographs.png") for runs in study if runs not in omniglot]
    everything = logs.grouped(sorted({log.parent for log in res.glob("*/log.jsonl*")}))
    compared = [runs for runs in everything if runs[0].data["name"] == omniglot[0][0].data["name"]]
    return [*pictures, Picture("accuracy", compared, res / "accuracy.png")]


def draw(picture: Picture, layer: str | None) -> None:
    """Draw the picture, write it, say where it is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same picture whatever the user's matplotlibrc says
        matplotlib.rcParams.update(drawing.STYLE)
        drawn = FIGURES[picture.figure][0](picture.groups, layer)
        with files.atomic(picture.path) as file:
            drawn.savefig(file, format="png", metadata={"Software": None})  # same input, same bytes
    runs = [run for group in picture.groups for run in group]
    print(files.one_line(f"wrote {picture.path}: {len(runs)} run(s), {drawing.data_names(picture.groups)}"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs that the command line names, draw them, write the pictures, say where they are."""
    parser = files.Parser(
        description="Draw neural collapse against meta-steps from training logs.",
        epilog="With no RUN: rewrite the README's figures from the logs committed under res/.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder or log; several: seeds, settings")
    parser.add_argument("--figure", choices=FIGURES, help="default: traces of the RUNs; with no RUN, all figures")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="PNG to write (default: in the first RUN)")
    parser.add_argument("--layer", metavar="NAME", help="layer to draw (default: the last hidden layer)")
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.suffix.lower() != ".png":
        raise files.UserError(f"{options.output}: pictures are PNG files; name one that ends in .png")

    if options.runs:
        name = options.figure or "traces"
        groups = logs.grouped(options.runs)
        pictures = [Picture(name, groups, groups[0][0].path / FIGURES[name][1])]
    else:
        pictures = [one for one in committed_pictures() if options.figure in (None, one.figure)]
    if options.output is not None:
        if len(pictures) > 1:
            raise files.UserError("-o takes one picture: name a RUN, or a --figure of which there is one")
        pictures = [pictures[0]._replace(path=options.output)]
    for picture in pictures:
        if picture.figure != "accuracy":
            _note_unequal(picture.groups)
        draw(picture, options.layer)


def _note_unequal(groups: Sequence[Sequence[Run]]) -> None:
    for runs in groups:
        ends = [max(logs.measurements(run, "train"), default=0) for run in runs]
        if min(ends) < max(ends):
            shortest = runs[ends.index(min(ends))].path
            print(f"note: drawn up to meta-step {min(ends):,}, where {shortest} ends", file=sys.stderr)


if __name__ == "__main__":
    files.run(main)
