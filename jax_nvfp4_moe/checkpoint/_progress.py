"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax_nvfp4_moe.checkpoint.files import require


@contextmanager
def progress_bar(what: str, show: bool | None, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that is told of bytes; `show` None means where stderr is a terminal."""
    disable = None if show is None else not show
    with require("tqdm").tqdm(
        desc=what, total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, disable=disable
    ) as bar:
        yield bar.update
        bar.update(nbytes - bar.n)  # what is too small to be told of
