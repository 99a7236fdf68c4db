"""What both data sets share: image files in, one uint8 tensor a split out, decoded once and cached.

`load` takes the image files of a split, class by class, decodes them in
parallel threads into one array [class, image, c, s, s] and keeps it in a cache
file: the .npy format, so `numpy.load` reads it too, followed by a line that
ties it to the very files it was made from. `picture` is the program behind
`python omniglot.py` and `python miniimagenet.py`: it draws a few sampled tasks.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from files import Parser, UserError, atomic, locked, one_line, remove_stale

if TYPE_CHECKING:
    from tasks import Tasks

SPLITS = ("train", "val", "test")
FORMATS = ("JPEG", "PNG", "GIF", "BMP")  # what data sets hold: few parsers, none that starts a program
MAX_PIXELS = 64 * 2**20  # ImageNet's largest photograph has 61 million
MAX_BYTES = 256 * 2**20  # of one encoded file
LARGE = 16 * 2**20  # pixels or bytes of an image that is decoded alone: a thread for each would fill the memory
CACHE_VERSION = 1  # goes up whenever the same files would give other pixels

_alone = threading.RLock()


class ImageFile(NamedTuple):
    """One encoded image, not read yet."""

    name: str  # relative to the data folder, with '/'
    size: int  # bytes, encoded
    stamp: int  # changes with the content: the time of change in ns, or the CRC-32 that a zip holds
    path: str  # what a message calls it
    read: Callable[[], bytes]


def load(
    classes: Sequence[Sequence[ImageFile]],
    *,
    dataset: str,
    split: str,
    channels: int,
    imgsz: int,
    resample: Image.Resampling,
    cache: Path,
) -> torch.Tensor:
    """The images of one split, from the cache folder or decoded into it.

    Args:
        classes: the same number of files for each class.
        dataset: goes into the cache file's name.
        channels: 3 for RGB, 1 for greyscale.
        imgsz: images are resized to this square.
        resample: the filter of the resize.
        cache: the folder; made when absent.

    Returns:
        uint8 [class, image, channels, imgsz, imgsz]

    Raises:
        UserError: an image can't be read or decoded, the cache folder can't be
            written, or the array doesn't fit into memory.
    """
    shape = (len(classes), len(classes[0]), channels, imgsz, imgsz)
    _check_memory(shape, split)
    key = _key(classes, split, channels, imgsz, resample)
    path = Path(cache) / f"{dataset}-{split}-{imgsz}px-{key[:16]}.npy"
    remedy = "free some space, or name another folder with --cache FOLDER"
    try:
        array, _ = _read_cache(path, key, shape)
        if array is None:
            with locked(path.parent / ".cache.lock", remedy=remedy) as alone:
                array, fault = _read_cache(path, key, shape)  # again: another process may have built it
                if array is None:
                    if fault:
                        _say(f"the cache {path} {fault}: building it again")
                    if alone:
                        remove_stale(path.parent, f"{dataset}-*px-*.npy")
                    array = decode_all(classes, f"{dataset} {split}", channels, imgsz, resample)
                    _write_cache(path, key, array, remedy)
    except MemoryError as error:
        raise UserError(f"no memory for the {split} images at {imgsz} x {imgsz}; lower --imgsz") from error
    return torch.from_numpy(array)


def check_request(split: str, imgsz: int) -> None:
    """Refuse a split or an image size that can't be, before anything is read."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose train, val or test")
    if not isinstance(imgsz, int) or imgsz < 1:
        raise UserError(f"the image size must be a whole number of at least 1, not {imgsz!r}; change --imgsz")


def folder_files(folder: Path) -> dict[str, os.DirEntry]:
    """What lies in `folder`, by name; hidden files aside.

    Raises:
        UserError: the folder can't be read, or a symbolic link in it leads out of it.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(f"can't read the folder {folder}: {error.strerror}; check path and rights") from error
    for entry in found.values():
        # realpath, for Path.resolve raises at a link to itself
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{entry.path} is a link that leads out of its folder; put the file itself there")
    return found


def image_file(entry: os.DirEntry, name: str) -> ImageFile:
    """The file `entry` as an image named `name`.

    Raises:
        UserError: it isn't a regular file (a folder, a dangling link, a pipe).
    """
    try:
        if entry.is_file():
            status = entry.stat()
            read = Path(entry.path).read_bytes
            return ImageFile(name, status.st_size, status.st_mtime_ns, entry.path, read)
    except OSError as error:
        raise UserError(f"can't read {entry.path}: {error.strerror}; check its rights") from error
    raise UserError(f"{entry.path} is not a file; put the image there")


def decode(data: bytes, name: str, channels: int, imgsz: int, resample: Image.Resampling) -> np.ndarray:
    """One encoded image -> uint8 [channels, imgsz, imgsz].

    Palette, CMYK and greyscale images are converted; transparent ones are laid
    on white, so that ink drawn on nothing doesn't become black on black.

    Raises:
        UserError: it can't be decoded, is cut, or has more than MAX_PIXELS pixels; names `name`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before any pixel is decoded
                raise Image.DecompressionBombError
            with _alone if image.width * image.height > LARGE else contextlib.nullcontext():
                image = _opaque(image).convert("RGB" if channels == 3 else "L").resize((imgsz, imgsz), resample)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 10**6
        raise UserError(f"{name} has more than {limit} million pixels; put a smaller image there") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is none of {', '.join(FORMATS)}; put the image there again") from error
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise UserError(f"{name} can't be decoded ({error}); put the image there again") from error
    return np.asarray(image).reshape(imgsz, imgsz, channels).transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


def decode_all(
    classes: Sequence[Sequence[ImageFile]], what: str, channels: int, imgsz: int, resample: Image.Resampling
) -> np.ndarray:
    """Decode in parallel threads, with a bar -> uint8 [class, image, c, s, s].

    Neither the array nor the error, where there is one, depends on the number
    of threads: each image has its place, and the first bad one is reported.
    """
    array = np.empty((len(classes), len(classes[0]), channels, imgsz, imgsz), np.uint8)
    places = [(row, column) for row in range(array.shape[0]) for column in range(array.shape[1])]

    def put(place: tuple[int, int]) -> None:
        file = classes[place[0]][place[1]]
        with _alone if file.size > LARGE else contextlib.nullcontext():
            array[place] = decode(_read(file), file.path, channels, imgsz, resample)

    terminal = sys.stderr.isatty()
    if not terminal:
        _say(f"decoding {len(places):,} images, {what}")
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        warnings.simplefilter("ignore")  # PIL's, about a file that it then decodes or that gets its own line
        try:
            decoded = pool.map(put, places)
            for _ in tqdm(decoded, f"decoding {what}", len(places), disable=not terminal, unit=" images"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return array


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(file: ImageFile) -> bytes:
    if file.size > MAX_BYTES:
        raise UserError(f"{file.path} has {file.size:,} bytes, too many for an image; put it there again")
    try:
        return file.read()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged zip entry raises zlib.error, BadZipFile, RuntimeError, ...
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {file.path}: {reason}; put the file there again") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The cache


def _check_memory(shape: tuple[int, ...], split: str) -> None:
    """Systems that overcommit would grant the array, then kill the process that fills it."""
    size = 1
    for length in shape:
        size *= length
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(f"the {split} images at {shape[-1]} x {shape[-1]} take {size // 10**9:,} GB, "
                        "more than this machine's memory; lower --imgsz")


def _key(
    classes: Sequence[Sequence[ImageFile]], split: str, channels: int, imgsz: int, resample: Image.Resampling
) -> str:
    """A hash of all that the array depends on: other files, classes, size or filter give another key."""
    made_from = [[(file.name, file.size, file.stamp) for file in row] for row in classes]
    parts = [CACHE_VERSION, split, channels, imgsz, int(resample), made_from]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _trailer(key: str, checksum: int) -> bytes:
    return f"\n{key} {checksum:08x}\n".encode()


def _write_cache(path: Path, key: str, array: np.ndarray, remedy: str) -> None:
    with atomic(path, remedy=remedy) as file:
        file.write(_header(array.shape))
        file.write(array.data)
        file.write(_trailer(key, zlib.crc32(array.data)))


def _read_cache(path: Path, key: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, str]:
    """(the array, "") where the cache is there and sound, else (None, what is wrong with it or "").

    All that the file may say about itself is known beforehand, so nothing in it
    is parsed or trusted: it is compared.
    """
    if not os.path.isfile(path):
        return None, ""
    header, trailer_size = _header(shape), len(_trailer(key, 0))
    try:
        with open(path, "rb", buffering=0) as file:
            size = len(header) + int(np.prod(shape, dtype=np.int64)) + trailer_size
            if os.fstat(file.fileno()).st_size != size or file.read(len(header)) != header:
                return None, "is cut or not of this program"
            # mapped, not read: several processes share one copy; a page that is written to becomes private
            array = np.memmap(file, np.uint8, "c", offset=len(header), shape=shape)
            file.seek(-trailer_size, os.SEEK_END)
            if file.read(trailer_size) != _trailer(key, zlib.crc32(array)):
                return None, "is damaged (wrong checksum)"
    except OSError as error:
        return None, f"can't be read ({error.strerror})"
    return array, ""


# The picture


def check_tasks(images: torch.Tensor, n_way: int, k_spt: int, k_qry: int) -> None:
    """Refuse tasks that can't be drawn from `images` [class, image, c, h, w].

    Raises:
        UserError: fewer than 1 asked for, more classes than there are, or more images of a class.
    """
    classes, count = images.shape[:2]
    if min(n_way, k_spt, k_qry) < 1:
        raise UserError(f"--n_way {n_way}, --k_spt {k_spt} and --k_qry {k_qry} must be at least 1")
    if n_way > classes:
        raise UserError(f"--n_way {n_way} is more than the {classes} classes of this split; lower it")
    if k_spt + k_qry > count:
        raise UserError(f"--k_spt {k_spt} and --k_qry {k_qry} need {k_spt + k_qry} images of a class, "
                        f"and there are {count}; lower one")


def picture(
    load: Callable[..., torch.Tensor],
    synthesise: Callable[..., torch.Tensor],
    root: str,
    imgsz: int,
    mean: Sequence[float],
    std: Sequence[float],
    description: str,
) -> None:
    """The program of a data set's module: draw a few tasks as the model sees them into a PNG file.

    Args:
        load: the module's own `load`.
        synthesise: what stands in for it under --synthetic: (split, imgsz) -> such a tensor.
        root: default data folder; its name also names the picture.
        imgsz: default image size.
        mean, std: the module's own.
        description: for --help.
    """
    from tasks import sample_tasks

    parser = Parser(description=description)
    parser.add_argument("--root", type=Path, default=Path(root), help="data folder (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(f"{root}-tasks.png"),
                        help="the PNG file (default %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="its classes (default %(default)s)")
    parser.add_argument("--n_way", type=int, default=5, help="classes a task (default %(default)s)")
    parser.add_argument("--k_spt", type=int, default=1, help="support images a class (default %(default)s)")
    parser.add_argument("--k_qry", type=int, default=5, help="query images a class (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=3, help="how many tasks (default %(default)s)")
    parser.add_argument("--imgsz", type=int, default=imgsz, help="image size in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=222, help="draws other tasks (default %(default)s)")
    parser.add_argument("--cache", type=Path,
                        help="folder of the decoded images (default: cache/ in the data folder)")
    parser.add_argument("--synthetic", action="store_true", help="generated images, no data needed")
    args = parser.parse_args()
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out} is not a name of a PNG file; let it end in .png")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be from 0 to 2**63 - 1")
    if not 1 <= args.tasks <= 20:
        raise UserError(f"--tasks {args.tasks} must be from 1 to 20")
    check_request(args.split, args.imgsz)
    if args.tasks * args.n_way * (args.k_spt + args.k_qry) * args.imgsz**2 > MAX_PIXELS:
        raise UserError(f"a picture has at most {MAX_PIXELS // 10**6} million pixels; "
                        "lower --tasks, --n_way, --k_spt, --k_qry or --imgsz")
    if args.synthetic:
        if args.imgsz < 8:
            raise UserError(f"--imgsz {args.imgsz} is too small for --synthetic; give at least 8")
        images, source = synthesise(args.split, args.imgsz), "synthetic"
    else:
        images, source = load(args.root, args.split, args.imgsz, args.cache), args.root.resolve().name
    check_tasks(images, args.n_way, args.k_spt, args.k_qry)
    generator = torch.Generator().manual_seed(args.seed)
    tasks = sample_tasks(images, args.tasks, args.n_way, args.k_spt, args.k_qry, generator, mean, std)
    title = (f"{source}, {args.split} classes: {args.n_way}-way {args.k_spt}-shot tasks, "
             f"{args.imgsz} x {args.imgsz} pixels")
    draw_tasks(tasks, title, mean, std, args.out)
    print(one_line(str(args.out)))


def draw_tasks(tasks: "Tasks", title: str, mean: Sequence[float], std: Sequence[float], path: Path) -> None:
    """Draw each task as a panel, a row for each label: support images on the left, queries on the right.

    Raises:
        UserError: `path` can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_panel(*task, mean, std) for task in zip(*tasks)]
    height, width = panels[0][0].shape[:2]
    n_way = int(tasks.y_spt.max()) + 1
    panel_width = min(4.2 * width / height, 12.0)
    figure = Figure(figsize=(min((panel_width + 0.7) * len(panels), 60.0), 5.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03)
    figure.suptitle(one_line(title), fontsize=13, parse_math=False)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axes, (panel, border)) in enumerate(zip(all_axes, panels)):
        axes.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"task {number + 1}", fontsize=11, pad=24)
        for middle, name in ((border / 2, "support"), ((border + width) / 2, "query")):
            axes.text(middle, -0.02 * height, name, ha="center", va="bottom", fontsize=10, color="0.35")
        axes.set_yticks([(label + 0.5) * height / n_way for label in range(n_way)], range(n_way))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("label", color="0.35")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _panel(
    x_spt: torch.Tensor, y_spt: torch.Tensor, x_qry: torch.Tensor, y_qry: torch.Tensor,
    mean: Sequence[float], std: Sequence[float],
) -> tuple[np.ndarray, float]:
    """One task -> (an image [h, w] or [h, w, 3] in 0..1, where the queries begin in pixels)."""
    size = x_spt.shape[-1]
    line, gap, wide = max(size // 42, 1), max(size // 20, 1), max(size // 3, 1)  # the frame and the spaces

    def tiles(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        x = torch.nn.functional.pad(x.clamp(0, 1), (line,) * 4, value=0.85)
        x = torch.nn.functional.pad(x, (gap,) * 4, value=1.0)
        rows = [torch.cat(list(x[y == label]), dim=2) for label in range(int(y.max()) + 1)]
        return torch.cat(rows, dim=1)  # [c, rows * h, columns * w]

    support, query = tiles(x_spt, y_spt), tiles(x_qry, y_qry)
    between = torch.ones(support.shape[0], support.shape[1], wide)
    panel = torch.cat([support, between, query], dim=2).permute(1, 2, 0).numpy()
    return (panel if panel.shape[-1] == 3 else panel[..., 0]), support.shape[2] + wide / 2
