"""Labelled data by name: from a folder named by RLMETA_DATA, a checksummed download, or what a package ships."""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlmeta.data.samples import Samples
from rlmeta.errors import SettingError, missing_extra, unknown_name

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
MOST_PACKED = 1100
"""Bytes that one byte of a zip file can hold at most, about."""
OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
OMNIGLOT_FILES = {"images_background.zip": "md5:68d2efa1b9178cc56df9314c21c6e718"}


class Labelled(NamedTuple):
    """A data set for classification."""

    train: Samples
    test: Samples
    num_classes: int


class Characters(NamedTuple):
    """Drawings of characters, for few-shot classification."""

    image: Tensor
    """`[n, H, W]` uint8, ink is high."""
    character: Tensor
    """`[n]` int64: which character, counted over all alphabets."""
    alphabet: Tensor
    """`[n]` int64."""
    alphabet_names: tuple[str, ...]
    dropped: int = 0
    """How many pictures of the files are not here: copies of those that are."""


def labelled(name: str) -> Labelled:
    """The data set "digits" or "mnist".

    "digits" is scikit-learn's 1,797 digits of 8 x 8 (every fifth is for testing). "mnist" is read from `mnist-10k.npz`
    in the folder RLMETA_DATA (`x` uint8 [n, 28, 28], `y`; the first four fifths to train), else downloaded whole.

    Raises:
        UnknownNameError: there is no such data set.
        MissingExtraError: the package that ships or downloads it is not installed.
    """
    loaders = {"digits": _digits, "mnist": _mnist}
    if name not in loaders:
        raise unknown_name("data set", name, loaders)
    return loaders[name]()


@functools.cache
def _digits() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_extra("scikit-learn", "data", "the data set 'digits'") from None
    images, classes = load_digits(return_X_y=True)
    held_out = np.arange(len(classes)) % 5 == 4
    pixels = np.round(images * (255 / 16)).astype(np.uint8)
    return Labelled(_samples(pixels[~held_out], classes[~held_out]), _samples(pixels[held_out], classes[held_out]), 10)


@functools.cache
def _mnist() -> Labelled:
    folder = data_folder()
    if folder is not None and (folder / "mnist-10k.npz").is_file():
        arrays = _arrays(folder / "mnist-10k.npz", ("x", "y"))
        images, classes = arrays["x"].reshape(len(arrays["x"]), -1), arrays["y"]
        cut = len(classes) * 4 // 5
        return Labelled(_samples(images[:cut], classes[:cut]), _samples(images[cut:], classes[cut:]), 10)
    parts = [
        _idx(download("mnist", MNIST_URL, file, checksum, "mnist-10k.npz")) for file, checksum in MNIST_FILES.items()
    ]
    train, test = (_samples(x.reshape(len(x), -1), y) for x, y in (parts[:2], parts[2:]))
    return Labelled(train, test, 10)


@functools.cache
def omniglot() -> Characters:
    """Omniglot's drawings, 28 x 28, 20 of each character; an alphabet that stands in several files is one alphabet.

    Read from `omniglot-*.npz` in the folder RLMETA_DATA (`image`, `alphabet`, `character`, `alphabet_names`,
    `character_names`), else the background set is downloaded. Equal pictures are here once: the two small background
    sets have alphabets in common.
    """
    folder = data_folder()
    files = sorted(folder.glob("omniglot-*.npz")) if folder is not None else []
    parts = [_characters_of(file) for file in files] or [_downloaded_omniglot()]
    names = tuple(sorted({name for part in parts for name in part[2]}))
    images = np.concatenate([part[0] for part in parts])
    alphabet = np.concatenate([np.array([names.index(n) for n in part[2]])[part[1]] for part in parts])
    drawn = [f"{names[a]}/{c}" for a, c in zip(alphabet, np.concatenate([part[3] for part in parts]))]
    _, character = np.unique(drawn, return_inverse=True)
    repeated, ambiguous = equal_pictures(images, character)
    kept = np.setdiff1d(np.arange(len(images)), [*repeated, *ambiguous])
    image, of, within = (torch.from_numpy(array[kept]) for array in (images, character, alphabet))
    return Characters(image, of, within, names, len(images) - len(kept))


def equal_pictures(images: NDArray[Any], labels: NDArray[np.integer]) -> tuple[list[int], list[int]]:
    """Pictures that must not stand beside each other in a data set, by their numbers.

    A query that is its own support picture is no question. Nor is one that is also a picture of another class.

    Args:
        images: `[n, ...]`.
        labels: `[n]`.

    Returns:
        Those that stand before in their class; and all that stand in several classes.
    """
    places: dict[bytes, list[int]] = {}
    for number, image in enumerate(images):
        content = hashlib.blake2b((image + 0).tobytes(), digest_size=16).digest()  # + 0 makes -0.0 a 0.0
        places.setdefault(content, []).append(number)
    repeated: list[int] = []
    ambiguous: list[int] = []
    for numbers in places.values():
        if len({int(labels[number]) for number in numbers}) > 1:
            ambiguous += numbers
        else:
            repeated += numbers[1:]
    return sorted(repeated), sorted(ambiguous)


Part = tuple[NDArray[np.uint8], NDArray[np.int64], list[str], NDArray[np.str_]]
"""Images, alphabet of each, alphabet names, name of each one's character within its alphabet."""


def _characters_of(path: Path) -> Part:
    arrays = _arrays(path, ("image", "alphabet", "character"), ("alphabet_names", "character_names"))
    names = [str(name) for name in arrays["alphabet_names"]]
    for array, many in (("alphabet", len(names)), ("character", len(arrays["character_names"]))):
        if len(arrays[array]) and not 0 <= int(arrays[array].min()) <= int(arrays[array].max()) < many:
            raise SettingError(f"{path}: {array} goes to {int(arrays[array].max())}, there are names for {many}")
    characters = np.array([str(name) for name in arrays["character_names"]])[arrays["character"]]
    return arrays["image"], arrays["alphabet"].astype(np.int64), names, characters


def _arrays(path: Path, samples: Sequence[str], others: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of these names in a file; those of the samples have one entry for each.

    Raises:
        SettingError: the file is broken, lacks one of them, or they disagree on how many samples there are.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no archive")
        with np.load(path, allow_pickle=False) as content:
            for name in (*samples, *others):
                _check_size(content.zip, f"{name}.npy")
            arrays = {name: content[name] for name in (*samples, *others)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise SettingError(
            f"{path} can't be read ({error}): expected numpy's .npz with {', '.join((*samples, *others))}; put a whole "
            "copy there"
        ) from None
    sizes = {name: len(arrays[name]) for name in samples}
    if len(set(sizes.values())) > 1:
        raise SettingError(f"{path}: {', '.join(f'{n} {size}' for n, size in sizes.items())} samples, expected as many")
    return arrays


def _check_size(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array that claims more room than its bytes fill: numpy takes the room first and reads then.

    Raises:
        ValueError, KeyError: it does, or is none.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    entry = archive.getinfo(name)
    with archive.open(entry) as file:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    size = math.prod(shape) * dtype.itemsize
    if size > entry.file_size or entry.file_size > MOST_PACKED * (entry.compress_size + 1):
        raise ValueError(f"{name} claims {dtype} {shape} in {entry.compress_size} bytes")


def _downloaded_omniglot() -> Part:
    import io

    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "data", "Omniglot's pictures") from None
    file, checksum = next(iter(OMNIGLOT_FILES.items()))
    images, alphabets, characters = [], [], []
    with zipfile.ZipFile(download("omniglot", OMNIGLOT_URL, file, checksum, "omniglot-*.npz")) as archive:
        for entry in sorted(name for name in archive.namelist() if name.endswith(".png")):
            _, alphabet, character, _ = entry.split("/")
            picture = Image.open(io.BytesIO(archive.read(entry))).convert("L").resize((28, 28), Image.Resampling.BOX)
            images.append(255 - np.asarray(picture))
            alphabets.append(alphabet)
            characters.append(character)
    names, of = np.unique(alphabets, return_inverse=True)
    return np.stack(images).astype(np.uint8), of.astype(np.int64), [str(n) for n in names], np.array(characters)


def data_folder() -> Path | None:
    """The folder that RLMETA_DATA names.

    Raises:
        SettingError: it names something else.
    """
    folder = os.environ.get("RLMETA_DATA", "")
    if folder and not Path(folder).is_dir():
        raise SettingError(f"RLMETA_DATA is {folder!r}, which is no folder: name one that holds the data, or unset it")
    return Path(folder) if folder else None


def download(name: str, url: str, file: str, checksum: str, instead: str) -> Path:
    """The file, downloaded once into the user's cache and checked; `instead` may lie in the folder RLMETA_DATA.

    Raises:
        MissingExtraError: pooch is not installed.
        SettingError: it can't be fetched, or its checksum is another.
    """
    try:
        import pooch
    except ImportError:
        raise missing_extra("pooch", "data", f"downloading {name}") from None
    try:
        return Path(pooch.retrieve(url + file, checksum, fname=file, path=pooch.os_cache("rlmeta") / name))
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{name} could not be fetched from {url}{file} ({error}): connect to the internet, or name a folder that "
            f"holds {instead} by RLMETA_DATA (it is {os.environ.get('RLMETA_DATA') or 'not set'})"
        ) from None


def _idx(path: Path) -> NDArray[np.uint8]:
    """An array in MNIST's own format."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _samples(images: NDArray[np.uint8], classes: NDArray[np.integer]) -> Samples:
    return Samples(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(classes.astype(np.int64)))
