"""Ranks: processes that train one model together, each on a share of the images.

``torchrun`` or ``accelerate launch`` starts the processes, :func:`start` connects them. Each rank holds all trained
weights, and draws and learns from its own images. They meet in a few places: the rewards of an iteration are gathered,
and the gradients of an optimiser step are added up. So all ranks compute the same advantages and take the same steps.
In a single process the functions here return what they are given. An exchange raises :class:`RankError` if another rank
has ended.

Letters used for shapes: W ranks, N images, n of them on this rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpok_gym.utils.sharding import whole

Result = TypeVar("Result")

#: Longest time that ranks wait for each other: a rank may wait for slow rewards.
PATIENCE = timedelta(hours=2)
#: Seconds without a sign of life after which a rank counts as dead.
SILENCE = 30.0
#: Seconds that a rank has for saving once another one has ended.
GRACE = 20.0
_BEAT = 2.0
_FAILED = "failed"

#: Bytes that this rank has put into exchanges so far, for benchmarks.
bytes_given = 0
_watch: _Watch | None = None


class RankError(ConnectionError):
    """Another rank has ended. The message names it, and its error if it had time to say it."""


def count() -> int:
    """Returns W, the number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Returns the number of this rank, in [0, W)."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Returns whether this is rank 0, which writes files and prints."""
    return index() == 0


def start() -> None:
    """Connects the ranks that a launcher has started; does nothing in a single process, or the second time.

    With GPUs, each rank takes the one of its local number. The ranks watch each other from now on: if one ends, the
    others end too, within a minute.

    Raises:
        ValueError: if there are more ranks on this machine than GPUs.
    """
    global _watch
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ['RANK']} has no GPU of its own: there are {torch.cuda.device_count()} here; start "
                "as many processes"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    _watch = _Watch(index(), count())
    _watch.start()


def stop() -> None:
    """Disconnects the ranks after their work is done; every rank must call it."""
    global _watch
    if _watch is not None:
        barrier()
        # A rank that ends can cut off the others' last exchange. Now it is one that nobody needs.
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))
        _watch.stop()
        _watch = None
        dist.destroy_process_group()


def share(n: int) -> range:
    """Returns which of ``n`` things are this rank's: consecutive ones, and nearly as many for each rank."""
    return range(n * index() // count(), n * (index() + 1) // count())


def equal_share(n: int, group_size: int = 1) -> range:
    """Returns which of an iteration's images are this rank's: as many for each rank, and whole groups.

    Args:
        n: N.
        group_size: images in a row that are compared with each other.

    Raises:
        ValueError: if they cannot be shared so.
    """
    if n % (count() * group_size) and count() > 1:
        raise ValueError(
            f"the {n} images of an iteration cannot be shared equally among {count()} ranks in groups of {group_size}: "
            f"choose images_per_iteration as a multiple of {count() * group_size}"
        )
    return share(n)


def gather(values: Tensor, n: int) -> Tensor:
    """Returns the values of all ranks in their order, (n, ...), the same on each rank.

    Args:
        values: (n_own, ...) of the things that :func:`share` gives this rank.
        n: how many there are on all ranks.
    """
    if count() == 1:
        return values
    largest = -(-n // count())
    padded = values.new_zeros(largest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(count())]
    _call(lambda: dist.all_gather(parts, padded), padded)
    sizes = [n * (rank + 1) // count() - n * rank // count() for rank in range(count())]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def total(values: Tensor) -> Tensor:
    """Returns the sum of the ranks' values, the same on each rank; ``values`` itself is not changed."""
    if count() == 1:
        return values
    summed = values.clone()
    _call(lambda: dist.all_reduce(summed), summed)
    return summed


def any_of(flag: bool) -> bool:
    """Returns whether the flag is True on some rank."""
    return bool(total(torch.tensor(float(flag))) > 0)


def largest(number: int) -> int:
    """Returns the largest of the ranks' numbers."""
    return int(gather(torch.tensor([number]), count()).max())


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all ranks, in their order."""
    if count() == 1:
        return [text]
    content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    size = gather(torch.tensor([len(content)]), count())
    padded = torch.zeros(1, int(size.max()), dtype=torch.uint8)
    padded[0, : len(content)] = content
    rows = gather(padded, count())
    return [bytes(row[:length].tolist()).decode().strip("\0") for row, length in zip(rows, size.tolist(), strict=True)]


def barrier() -> None:
    """Waits until every rank is here."""
    total(torch.zeros(1))


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds up the gradients of all ranks, in one exchange of one flat tensor.

    A rank whose images are not in a batch has no gradient, and adds nothing. A parameter without a gradient on any rank
    keeps none, so that the optimiser leaves it where it is.
    """
    if count() == 1:
        return
    for values in parameters:
        if isinstance(values, DTensor) and values.grad is not None:
            values.grad.mul_(count())  # FSDP has exchanged these in the backward pass, and taken their mean
    parameters = [values for values in parameters if not isinstance(values, DTensor)]
    if not parameters:
        return
    parts = [torch.zeros_like(values) if values.grad is None else values.grad for values in parameters]
    has_gradient = torch.tensor([float(values.grad is not None) for values in parameters]).to(parts[0])
    flat = total(torch.cat([has_gradient, *(part.reshape(-1) for part in parts)]))
    has_gradient, *sums = flat.split([len(parts), *(part.numel() for part in parts)])
    for values, summed, known in zip(parameters, sums, has_gradient.tolist(), strict=True):
        values.grad = summed.view_as(values) if known else None


def check_equal(parameters: Sequence[Tensor]) -> None:
    """Makes sure that all ranks have the same weights.

    Raises:
        RankError: if they do not; the message names the ranks. They can only differ by an error in the machine or in a
            changed algorithm, and what they learn together would be worth nothing.
    """
    if count() == 1:
        return
    mine = torch.stack([whole(values.detach().double().sum()) for values in parameters]).cpu()
    every = gather(mine[None], count())
    differing = [str(rank) for rank in range(count()) if not torch.equal(every[rank], every[0])]
    # nan is not equal to itself, but all ranks have it alike
    if differing and not every.isnan().any():
        raise RankError(f"the weights of rank {', '.join(differing)} differ from those of rank 0; resume the run")


def take_time() -> None:
    """Lets this rank finish what it does, such as saving, after another one has ended."""
    if _watch is not None:
        _watch.spares = True


def report(error: BaseException) -> None:
    """Tells the other ranks that this one ends with an error, which is not another rank's."""
    if _watch is not None and not isinstance(error, RankError):
        _watch.report(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _call(exchange: Callable[[], Result], values: Tensor) -> Result:
    """Exchanges tensors; an error of the network becomes one that names the rank that has ended."""
    global bytes_given
    bytes_given += values.nbytes
    try:
        return exchange()
    except RuntimeError as error:
        if _watch is None:
            raise
        raise RankError(_watch.explain() or f"the exchange between the ranks failed: {error}") from error


class _Watch(threading.Thread):
    """Watches whether the other ranks live: each one looks after the next, and tells all the others if it is silent.

    A rank that waits for another inside of torch cannot see that it is dead. This thread can, and ends the process.

    Args:
        rank: of this process.
        n_ranks: W.
    """

    def __init__(self, rank: int, n_ranks: int) -> None:
        super().__init__(name="ranks", daemon=True)
        self._rank, self._n_ranks, self._next = rank, n_ranks, (rank + 1) % n_ranks
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: that of torch may be waiting.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        # torchrun keeps its store when it starts the ranks again, and what ended them before must not end them again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"dpok/{attempt}", store)
        #: Whether this process goes on after another rank has ended.
        self.spares = False
        self._over = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Signs and looks, until one of the ranks has failed or :meth:`stop` is called."""
        heard, heard_at, beat = b"", time.monotonic(), 0
        while not self._over.wait(_BEAT):
            latest = heard
            try:
                with self._lock:
                    self._store.set(f"beat/{self._rank}", str(beat))
                    neighbour = f"beat/{self._next}"
                    latest = self._store.get(neighbour) if self._store.check([neighbour]) else b""
                    failure = self._failure()
            except RuntimeError:  # torch's, when the process that holds the store has ended
                failure = "the launcher or rank 0 has ended"
            beat += 1
            if latest != heard:
                heard, heard_at = latest, time.monotonic()
            elif not failure and time.monotonic() - heard_at > SILENCE:
                failure = f"rank {self._next} has given no sign of life for {SILENCE:.0f} seconds"
                with suppress(RuntimeError), self._lock:  # the store may be what is gone
                    self._store.set(_FAILED, failure)
            if failure and not self._over.wait(GRACE) and not self.spares:
                # The main thread had time to notice and to save; it may be waiting for the dead rank.
                print(f"dpok: error: {failure}; this rank ends too", file=sys.stderr, flush=True)
                os._exit(2)

    def report(self, error: str) -> None:
        """Tells all ranks that this one ends with an error."""
        self._over.set()
        try:
            with self._lock:
                if not self._failure():
                    self._store.set(_FAILED, f"rank {self._rank} ended with {error}")
        except RuntimeError:  # the store is gone, so there is no one to tell
            return

    def explain(self) -> str:
        """Returns which rank has ended and why; waits some seconds, as the news may still be on their way."""
        try:
            first = self._beats()
            for _ in range(3):
                time.sleep(_BEAT)
                with self._lock:
                    if failure := self._failure():
                        return failure
            silent = [str(rank) for rank, beat in enumerate(self._beats()) if beat == first[rank]]
        except RuntimeError:  # the store is gone
            return "the launcher or rank 0 has ended"
        return f"rank {', '.join(silent)} has ended without a word" if silent else ""

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join()

    def _beats(self) -> list[bytes]:
        names = [f"beat/{rank}" for rank in range(self._n_ranks)]
        with self._lock:
            return [self._store.get(name) if self._store.check([name]) else b"" for name in names]

    def _failure(self) -> str:
        return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""
