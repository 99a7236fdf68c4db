"""Pickled images, opened without running code from them.

The caches in which miniImageNet is passed on are dicts, in two forms: `image_data` uint8 [N, 84, 84, 3] with
`class_dict` (class -> indices), or `data` with `labels` (one per image) and perhaps `catname2label`.
"""

import functools
import operator
import os
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError, reading, short
from images import ImageFile, normal

REMEDY = "put the cache file there again, or the images as folders train/, val/ and test/ of class folders"


class _Type:
    """What a pickle holds for numpy.dtype: numbers and text alone."""

    def __init__(self, code: str | bytes, *_):
        code = _text(code)
        if not re.fullmatch(r"[<>|=]?([?bBhHiIlLqQfd]|[biufSU]\d+|O8?)", code):
            raise pickle.UnpicklingError(f"an array of type {code}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if _text(state[1]) in ("<", ">", "="):
            self.code = _text(state[1]) + self.code.lstrip("<>|=")


class _Array:
    """What a pickle holds for numpy.ndarray; `value` is the array, or the list that an array of objects holds."""

    def __init__(self, *_):
        self.value = []

    def __setstate__(self, state: tuple) -> None:
        shape, kind, fortran, data = state[-4:]
        self.value = data if isinstance(data, list) else _array(data, kind, shape, "F" if fortran else "C").value


def _array(data: bytes, kind: _Type, shape: Sequence[int], order: str = "C") -> _Array:
    array = _Array()
    array.value = np.frombuffer(data, kind.code).reshape(shape, order=_text(order))
    return array


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


BUILT = {  # all that a pickle may call, and what is called instead
    "_reconstruct": _Array, "ndarray": object(), "dtype": _Type, "_frombuffer": _array,
    "scalar": lambda kind, data: np.frombuffer(data, kind.code)[0].item(),
    "encode": lambda text, _: text.encode("latin1"),  # bytes, in pickles of protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in BUILT:
            return BUILT[name]
        raise pickle.UnpicklingError(f"it would call {module}.{name}, and only arrays, dicts, lists, text and numbers "
                                     "are read")


def classes(path: Path, split: str) -> dict[str, list[ImageFile]]:
    """The images of each class of a cache file, in the file's order.

    Raises:
        UserError: it holds anything but arrays, dicts, lists, tuples, text and numbers, or isn't of the two forms.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; {REMEDY}")
    with reading(path, REMEDY, "can't be opened"):
        stamp, size = os.stat(path).st_mtime_ns, os.path.getsize(path)
        if size > 10**8:
            print(f"reading {path}, {size / 10**6:,.0f} MB", file=sys.stderr, flush=True)
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        content = {_text(key): _plain(value) for key, value in content.items()}
        if "image_data" in content and "class_dict" in content:
            pixels = content["image_data"]
            members = {_label(label): [int(index) for index in _plain(indices)]
                       for label, indices in content["class_dict"].items()}
        elif "data" in content and "labels" in content:
            pixels, members = content["data"], {}
            names = {number: _label(name) for name, number in content.get("catname2label", {}).items()}
            if len(content["labels"]) != len(pixels):
                raise ValueError(f"{len(content['labels']):,} labels of {len(pixels):,} images")
            for index, label in enumerate(content["labels"]):  # numbers mean nothing outside their file
                label = f"{split} {label}" if isinstance(label, (int, np.integer)) and not names else label
                members.setdefault(names.get(label) or _label(label), []).append(index)
        else:
            raise ValueError(f"its keys are {', '.join(map(short, list(content)[:9]))}, and not image_data and "
                             "class_dict, or data and labels")
        indices = [index for members_of_class in members.values() for index in members_of_class]
        if len(set(indices)) < len(indices) or not all(0 <= index < len(pixels) for index in indices):
            raise ValueError(f"class_dict names an image twice, or one of {len(pixels):,} that isn't there")
        return {label: [_image(path, pixels, index, stamp) for index in members[label]] for label in members}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _label(label: Any) -> str:
    return normal(_text(label) if isinstance(label, (str, bytes)) else str(label))


def _image(path: Path, pixels: Sequence, index: int, stamp: int) -> ImageFile:
    image = _plain(pixels[index])
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image {index} is {kind}, and not uint8 [height, width, 3]")
    return ImageFile(f"{path.name}/{index}", image.size, stamp, f"image {index} of {path}",
                     functools.partial(operator.getitem, pixels, index) if isinstance(pixels, np.ndarray)
                     else lambda: image)
