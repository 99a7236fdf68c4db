"""Draws neural collapse while MAML trains, from the training scripts' logs.

    python plot_nc.py                          result.png and the report's figures, from the logs under res/
    python plot_nc.py RUN                      a run's traces, before and after adaptation, into RUN/result.png
    python plot_nc.py RUN RUN RUN -o FILE.png  several seeds of one setting: thin lines, and their mean
    python plot_nc.py RUN --layer block2       another layer than the classifier's input: RUN/traces-block2.png
    python plot_nc.py RUN RUN --figure metrics another figure, into the first RUN; other settings in other colours

A RUN is a run's folder, or its log next to args.json. The meta model has the weights before adaptation, the finetuned
one those after the inner steps. study/figures.py and study/report.py draw; nothing here needs torch.
"""

import files  # first: the others do not parse on an older Python  # noqa: I001

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style

from files import Parser, UserError, home_path, one_line
from study import figures, report
from study.logs import HOME, Study, read_groups


def main(arguments: Sequence[str] | None = None, home: Path = HOME) -> None:
    """Draw the runs that the command line names, or the report's figures; print what was written.

    Raises:
        UserError: a run can't be read or drawn.
    """
    parser = Parser(description="Draw neural collapse against meta-steps from training logs.",
                    epilog="With no RUN: redraw result.png and the report's figures from the logs under res/.")
    parser.add_argument("runs", nargs="*", type=home_path, metavar="RUN",
                        help="a run's folder or log; several: seeds of a setting, or settings to compare")
    parser.add_argument("--figure", choices=figures.ANY, help="which figure of the RUNs (default: traces)")
    parser.add_argument("-o", "--output", type=home_path, metavar="FILE",
                        help="PNG, PDF or SVG to write (default: a PNG in the first RUN)")
    parser.add_argument("--layer", metavar="NAME", help="not with --figure layers (default: the classifier's input)")
    options = parser.parse_args(arguments)
    if not options.runs and (options.output or options.layer or options.figure):
        raise UserError("name a RUN: without one, all figures are redrawn, and -o, --layer and --figure have no effect")
    if options.layer and options.figure == "layers":
        raise UserError("--figure layers draws all layers; leave --layer out")
    if options.output is not None and options.output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"-o {options.output}: name a file that ends in .png, .pdf or .svg")
    with matplotlib.style.context(figures.STYLE, after_reset=True):  # not the user's matplotlibrc
        if options.runs:
            groups = read_groups(options.runs)
            for run, *_ in groups:
                if options.layer and options.layer not in run.layers:
                    raise UserError(f"no layer {options.layer!r} in {run.path}; there are: {', '.join(run.layers)}")
            figure = options.figure or "traces"
            name = f"{figure}-{options.layer}" if options.layer else "result" if figure == "traces" else figure
            path = options.output or groups[0][0].path / f"{name}.png"
            figure_of_path = {path: figures.ANY[figure](groups, options.layer)}
        else:
            figure_of_path = {home / name: figure for name, figure in report.all_figures(Study(home / "res")).items()}
        for path, figure in figure_of_path.items():
            figures.save(figure, path)
            print(one_line(f"wrote {path}"))


if __name__ == "__main__":
    files.run(main)
