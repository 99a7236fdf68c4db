"""The pickled caches in which miniImageNet is distributed, read without running code from them.

A pickle may name any function to be called; what is called here is listed in REPLACED.
"""

import functools
import pickle
from collections.abc import Sequence
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

import images
from files import note, reading, short
from images import ImageFile, normal

REMEDY = "put the cache file there again, or the images as folders train/, val/ and test/ of class folders"


def read(path: Path, split: str) -> dict[str, list[ImageFile]]:
    """The images of each class, in the order of the cache file, which is a dict in one of two forms.

    `image_data` uint8 [N, 84, 84, 3] with `class_dict` (class -> indices), or `data` with `labels` (one per image) and
    perhaps `catname2label`.
    """
    with reading(path, REMEDY, "can't be read as a cache of miniImageNet"):
        status = path.stat()
        if status.st_size > 10**8:
            note(f"reading {path}, {status.st_size / 10**6:,.0f} MB")
        try:
            with open(path, "rb") as file:
                content = _plain(_Unpickler(file, encoding="latin1").load())  # of text from Python 2
        except MemoryError as error:  # a damaged file may give sizes that fit into no memory
            raise ValueError("it doesn't fit into memory") from error
        if content.keys() >= {"image_data", "class_dict"}:
            pixels = content["image_data"]
            labelled = [(label, index) for label, indices in content["class_dict"].items() for index in indices]
        elif content.keys() >= {"data", "labels"}:
            pixels = content["data"]
            if len(content["labels"]) != len(pixels):
                raise ValueError(f"{len(content['labels']):,} labels of {len(pixels):,} images")
            names = {number: name for name, number in content.get("catname2label", {}).items()}
            labelled = [(names.get(label, f"{split} {label}") if isinstance(label, (int, np.integer)) else label, index)
                        for index, label in enumerate(content["labels"])]  # another split's numbers are other classes
        else:
            raise ValueError(f"its keys are {', '.join(map(short, map(str, content)))}, and not image_data and "
                             "class_dict, or data and labels")
        indices = {index for _, index in labelled}
        if len(indices) < len(labelled) or not indices <= set(range(len(pixels))):
            raise ValueError(f"class_dict names an image twice, or one of {len(pixels):,} that isn't there")
        return images.by_class(
            (normal(str(label)), ImageFile(f"{path.name}/{index}", pixels[index].size, status.st_mtime_ns,
                                           f"image {index} of {path}", functools.partial(getitem, pixels, index)))
            for label, index in labelled)


# ---- stand-ins: with a forged state, NumPy's own dtype and ndarray read memory that is not theirs


class _Type:
    def __init__(self, code: str, *_):
        self.type = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.type = self.type.newbyteorder(state[1])


class _Array:
    """`value` is the array, or the list in an array of objects."""

    def __init__(self, *_):
        self.value = []

    def __setstate__(self, state: tuple) -> None:
        *_, shape, dtype, fortran, data = state
        self.value = data if dtype.type.hasobject else _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: bytes | str, dtype: _Type, shape: Sequence[int] = (-1,), order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # from Python 2
    return np.frombuffer(data, dtype.type).reshape(shape, order=order)


def _plain(value: Any) -> Any:
    """What the pickle holds, with arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


REPLACED = {  # all functions that a pickle may name, and what is called in their place
    "ndarray": None, "dtype": _Type, "_reconstruct": _Array, "_frombuffer": _array,
    "scalar": lambda dtype, data: _array(data, dtype).item(),
    "encode": lambda text, _: text.encode("latin1"),  # bytes, in pickles of protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in REPLACED:
            return REPLACED[name]
        raise pickle.UnpicklingError(f"it would call {module}.{name}, and only arrays, dicts, lists, text and numbers "
                                     "are read")
