"""The pickled caches in which miniImageNet is passed on, read without running code from them.

A pickle may name any function to be called; what is called here is listed in REPLACED.
"""

import pickle
from collections.abc import Sequence
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
                if file.peek(1)[:1] == b"<":
                    raise ValueError("it is a web page, as a download page that asks for a confirmation gives")
                content = _Unpickler(file, encoding="latin1").load()  # of text from Python 2
        except MemoryError as error:  # a damaged file may give sizes that fit into no memory
            raise ValueError("it doesn't fit into memory") from error
        content = {key: _plain(value) for key, value in content.items()}
        if "image_data" in content and "class_dict" in content:
            pixels = content["image_data"]
            for label, indices in content["class_dict"].items():
                if not len(_plain(indices)):
                    raise ValueError(f"class_dict names no image of {label!r}")
            labelled = [(label, int(index)) for label, indices in content["class_dict"].items()
                        for index in _plain(indices)]
        elif "data" in content and "labels" in content:
            pixels, labels = content["data"], content["labels"]
            if len(labels) != len(pixels):
                raise ValueError(f"{len(labels):,} labels of {len(pixels):,} images")
            names = {number: name for name, number in content.get("catname2label", {}).items()}
            labelled = [(names.get(label, f"{split} {label}") if isinstance(label, (int, np.integer)) else label, index)
                        for index, label in enumerate(labels)]  # a number is another class in another split's file
        else:
            raise ValueError(f"its keys are {', '.join(map(short, map(str, content)))}, and not image_data and "
                             "class_dict, or data and labels")
        indices = {index for _, index in labelled}
        if len(indices) < len(labelled) or not indices <= set(range(len(pixels))):
            raise ValueError(f"class_dict names an image twice, or one of {len(pixels):,} that isn't there")
        return images.by_class((_label(label), _image(path, pixels, index, status.st_mtime_ns))
                               for label, index in labelled)


def _label(label: Any) -> str:
    return normal(label.decode("latin1") if isinstance(label, bytes) else str(label))


def _image(path: Path, pixels: Sequence, index: int, stamp: int) -> ImageFile:
    image = np.asarray(_plain(pixels[index]))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image {index} is {image.dtype} {list(image.shape)}, and not uint8 [height, width, 3]")
    return ImageFile(f"{path.name}/{index}", image.size, stamp, f"image {index} of {path}",
                     lambda: _plain(pixels[index]))


class _Type:
    """Stands in for numpy.dtype: a damaged pickle that sets a real one's state can crash Python."""

    def __init__(self, code: str, *_):
        self.type = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray. `value` is the array, or the list in an array of objects."""

    def __init__(self, *_):
        self.value = []

    def __setstate__(self, state: tuple) -> None:
        *_, shape, dtype, fortran, data = state
        self.value = data if dtype.type.hasobject else _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: bytes | str, dtype: _Type, shape: Sequence[int] = (-1,), order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # from Python 2
    return np.frombuffer(data, dtype.type).reshape(shape, order=order)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


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
