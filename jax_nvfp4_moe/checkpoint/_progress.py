"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax_nvfp4_moe.checkpoint.files import import_extra


@contextmanager
def progress_bar(what: str, show: bool | None, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr and yields the function that advances it by a number of bytes.

    `show` None shows it where stderr is a terminal.
    """
    disable = None if show is None else not show
    with import_extra("tqdm").tqdm(
        desc=what, total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, disable=disable
    ) as bar:
        yield bar.update
        bar.update(nbytes - bar.n)  # small tensors are not reported
