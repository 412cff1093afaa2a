"""Film files, MP4 by PyAV and GIF by Pillow, and a window that shows pictures as they come."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlmeta.envs.native.drawing import Picture
from rlmeta.errors import SettingError, require_extra

FORMATS = {".mp4": "av", ".gif": "PIL"}
"""Endings of a film's name, and the package that writes such films."""
_GIF_FPS = 50
"""Most pictures a second in a GIF, whose unit of time is a hundredth of a second."""


def check_film(path: Path) -> None:
    """Refuse the name of a film that cannot be written, before anything is played.

    Raises:
        SettingError: it ends neither in .mp4 nor in .gif, or its folder does not exist.
        MissingExtraError: the package that writes such films is not installed.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise SettingError(f"the film {path} ends in {ending!r}, expected {' or '.join(FORMATS)}")
    require_extra(FORMATS[ending], "video", f"a film that ends in {ending}")
    if path.parent.exists() and not path.parent.is_dir():
        raise SettingError(f"the film {path} is to be written into {path.parent}, which is no folder: use another name")


def write_film(path: Path, frames: Iterable[Picture | None], fps: int) -> int:
    """Write a film, and put it in its place once it is whole.

    Args:
        path: the file, whose ending is one of `FORMATS`; its folder is created.
        frames: RGB pictures `[height, width, 3]` of the size of the first; taken one by one.
        fps: pictures a second; of a GIF at most 50.

    Returns:
        The number of pictures.

    Raises:
        SettingError: the file cannot be written, or a picture has another size than the first.
    """
    counted = _Counted(frames)
    unfinished = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        (_write_mp4 if path.suffix.lower() == ".mp4" else _write_gif)(unfinished, counted, fps)
        os.replace(unfinished, path)
    except OSError as error:
        raise SettingError(f"the film {path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return counted.count


class _Counted:
    """Iterator over pictures that counts them and checks that all are of one size."""

    def __init__(self, frames: Iterable[Picture | None]) -> None:
        self._frames, self.count = frames, 0

    def __iter__(self) -> Iterator[Picture]:
        first: tuple[int, ...] = ()
        for frame in self._frames:
            assert frame is not None
            first = first or frame.shape
            if frame.shape != first:
                raise SettingError(f"a film's pictures have one size, got {frame.shape} after {first}")
            self.count += 1
            yield frame


def _write_mp4(path: Path, frames: Iterable[Picture], fps: int) -> None:
    """Encode H.264, whose pictures have an even number of rows and columns: an odd one gets its last one twice."""
    import av

    with av.open(os.fspath(path), "w") as container:
        stream: Any = None
        for frame in frames:
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), "edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = *even.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Iterable[Picture], fps: int) -> None:
    from PIL import Image

    # an octree for each palette: the median cut, Pillow's own choice, takes most of the time
    images = (Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames)
    duration = 10 * max(2, round(100 / min(fps, _GIF_FPS)))
    next(images).save(path, "GIF", save_all=True, append_images=images, duration=duration, loop=0)


def require_display() -> None:
    """Refuse a window where there is no display.

    Raises:
        SettingError: neither an X server nor Wayland is named, on another system than macOS.
    """
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise SettingError(
            "there is no display to show a window on (neither DISPLAY nor WAYLAND_DISPLAY is set): write a film with "
            "out=, on the command line --out FILE"
        )


class Window:
    """Window that shows pictures at a fixed rate, for environments without a window of their own.

    Args:
        title: the window's.
        fps: pictures a second.

    Raises:
        MissingExtraError: pygame is not installed.
        SettingError: the display cannot be used.
    """

    def __init__(self, title: str, fps: int) -> None:
        require_extra("pygame", "video", "a window")
        import pygame

        self._pygame: Any = pygame
        self._screen: Any = None
        self._title, self._fps, self._clock = title, fps, pygame.time.Clock()

    def show(self, frame: Picture) -> None:
        """Show a picture for its share of a second.

        Raises:
            KeyboardInterrupt: the window was closed.
        """
        pygame, size = self._pygame, (frame.shape[1], frame.shape[0])
        if self._screen is None:
            try:
                pygame.display.init()
                self._screen = pygame.display.set_mode(size)
            except pygame.error as error:
                raise SettingError(f"no window can be opened ({error}): write a film with --out FILE") from error
            pygame.display.set_caption(self._title)
        self._screen.blit(pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            raise KeyboardInterrupt
        self._clock.tick(self._fps)

    def close(self) -> None:
        """Close the window."""
        if self._screen is not None:
            self._pygame.display.quit()
