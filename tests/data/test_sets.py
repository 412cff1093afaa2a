"""Data sets from files: what is missing, broken or of another kind is told by its name."""

from __future__ import annotations

import io
import sys
import types
import zipfile

import numpy as np
import pytest

from rlmeta.data import sets
from rlmeta.errors import SettingError


def characters(**change):
    """Two alphabets of two characters, two drawings each."""
    made = {
        "image": np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((8, 28, 28), np.uint8),
        "alphabet": np.arange(8) // 4,
        "character": np.arange(8) // 2,
        "alphabet_names": np.array(["Greek", "Latin"]),
        "character_names": np.array(["01", "02", "01", "02"]),
    }
    return {name: value for name, value in {**made, **change}.items() if value is not None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLMETA_DATA", str(tmp_path))
    return tmp_path


def omniglot():
    return sets.omniglot.__wrapped__()


def test_characters_of_several_files_are_counted_over_all(folder):
    np.savez(folder / "omniglot-a.npz", **characters())
    further = characters(alphabet_names=np.array(["Latin", "Malay"]))
    np.savez(folder / "omniglot-b.npz", **{**further, "image": further["image"] + np.uint8(100)})
    found = omniglot()
    assert found.alphabet_names == ("Greek", "Latin", "Malay") and found.image.shape == (16, 28, 28)
    assert found.alphabet.bincount().tolist() == [4, 8, 4]  # Latin stands in both
    assert found.character.bincount().tolist() == [2, 2, 4, 4, 2, 2] and found.dropped == 0


def test_pictures_that_stand_in_several_files_are_taken_once(folder):
    first, second = characters(), characters(alphabet_names=np.array(["Latin", "Malay"]))
    second["image"] = np.concatenate([first["image"][4:], first["image"][4:] + np.uint8(100)])  # Latin is the first's
    second["image"][4] = first["image"][0]  # a picture that is Greek and Malay is neither
    for name, content in (("a", first), ("b", second)):
        np.savez(folder / f"omniglot-{name}.npz", **content)
    found = omniglot()
    assert found.image[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 105, 106, 107] and found.dropped == 6
    assert found.character.bincount().tolist() == [1, 2, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphabet_names": None}, "can't be read .*alphabet_names.* expected numpy's .npz with image, alphabet, char"),
        ({"character": np.arange(6)}, "image 8, alphabet 8, character 6 samples, expected as many"),
        ({"character": np.arange(8)}, "character goes to 7, there are names for 4"),
        ({"alphabet_names": np.array(["Greek", None], dtype=object)}, "can't be read"),
    ],
)
def test_files_of_something_else_are_refused(folder, change, message):
    np.savez(folder / "omniglot-a.npz", **characters(**change))
    with pytest.raises(SettingError, match=rf"omniglot-a\.npz.*{message}"):
        omniglot()


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_broken_files_are_refused(folder, content):
    np.savez_compressed(folder / "whole.npz", **characters(x=np.zeros((4, 9)), y=np.zeros(4)))
    content = (folder / "whole.npz").read_bytes()[:900] if content is None else content
    for file, read in (("omniglot-a.npz", omniglot), ("mnist-10k.npz", sets._mnist.__wrapped__)):
        (folder / file).write_bytes(content)
        with pytest.raises(SettingError, match=f"{file} can't be read .* put a whole copy there"):
            read()


def test_a_flipped_bit_is_found(folder):
    file = folder / "omniglot-a.npz"
    np.savez_compressed(file, **characters(image=np.random.default_rng(0).integers(0, 255, (8, 28, 28), np.uint8)))
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(SettingError, match=r"omniglot-a\.npz can't be read"):
        omniglot()


def header_of(shape, dtype="|u1"):
    """An array of numpy's format that has no numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("content", [header_of((10**15,)), header_of((10**9, 28, 28)), header_of((8,), "<U99999999")])
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_cannot_claim_more_than_its_bytes(folder, content, packed):
    file = folder / "omniglot-a.npz"
    np.savez(file, **characters(image=None))
    with zipfile.ZipFile(file, "a", packed) as archive:
        archive.writestr("image.npy", content)
    with pytest.raises(SettingError, match=r"omniglot-a\.npz can't be read \(image\.npy claims"):
        omniglot()


def test_an_archive_cannot_claim_that_its_bytes_are_more(folder):
    file = folder / "omniglot-a.npz"
    np.savez(file, **characters(image=None))
    content = header_of((10**9,))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("image.npy", content)
    raw, size = file.read_bytes(), len(content).to_bytes(4, "little")
    at = raw.rindex(b"image.npy") - 46  # of the entry in the list at the end
    assert raw[at : at + 4] == b"PK\1\2" and raw[at + 24 : at + 28] == size
    file.write_bytes(raw[: at + 24] + (2 * 10**9).to_bytes(4, "little") + raw[at + 28 :])
    with pytest.raises(SettingError, match=r"omniglot-a\.npz can't be read \(image\.npy claims"):
        omniglot()


def test_an_array_in_place_of_an_archive_is_refused_unread(folder):
    (folder / "omniglot-a.npz").write_bytes(header_of((10**15,)))
    with pytest.raises(SettingError, match=r"can't be read \(no archive\)"):
        omniglot()


def test_without_a_file_it_says_which_to_put_where(folder, monkeypatch):
    def retrieve(*_, **__):
        raise OSError("no network")

    fake = types.ModuleType("pooch")
    fake.retrieve, fake.os_cache = retrieve, lambda name: folder / name
    monkeypatch.setitem(sys.modules, "pooch", fake)
    with pytest.raises(SettingError, match=r"omniglot could not be fetched .*no network.* holds omniglot-\*\.npz by"):
        omniglot()
    monkeypatch.delenv("RLMETA_DATA")
    with pytest.raises(SettingError, match=r"holds mnist-10k\.npz by RLMETA_DATA \(it is not set\)"):
        sets._mnist.__wrapped__()
    monkeypatch.setenv("RLMETA_DATA", str(folder / "missing"))
    with pytest.raises(SettingError, match=r"RLMETA_DATA is .*missing', which is no folder"):
        omniglot()
