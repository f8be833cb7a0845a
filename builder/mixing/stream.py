"""Batches from streams: how many samples of which source a batch has is the schedule's, which ones is the readers'.

So every batch of every rank has exactly the ratio, as with indexed reading; but a sample comes when the tars are read
past it (see mixing.reader).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from builder.errors import BuilderError
from builder.mixing.options import place, whole
from builder.mixing.reader import BUFFER, Layout, Position, Reader
from builder.mixing.sources import Source

Positions = tuple[Position | None, ...]  # of a worker's readers, by source; None where there is no source
Compose = Callable[[int, int, int], np.ndarray]
Assemble = Callable[[Sequence[np.ndarray], np.ndarray, int, int], torch.Tensor]


class Request(NamedTuple):
    """A batch to come, and the worker that is to make it, from where its readers stand or from other positions."""

    epoch: int
    start: int
    size: int
    worker: int
    positions: Positions | None = None


class StreamBatch(NamedTuple):
    """A batch as it leaves a worker."""

    images: torch.Tensor  # as `assemble` makes them
    labels: torch.Tensor  # int64 [B]
    origin: torch.Tensor  # uint8 [B]: 0 real, 1 synthetic
    keys: list[str]
    skipped: list[str]  # keys of images that could not be read, and were replaced by the next of their source
    positions: Positions  # where the worker's readers stand after it


class StreamBatches(Dataset):
    """Whole batches as items, by `Request` (None gives None): for a DataLoader whose sampler is a list of requests.

    sources: by number; 0 is the real one, or None.
    compose: of epoch, start and size, the source (int64 [size]) of each place of the batch at positions [start, start +
        size) of that epoch: of a Mix, what its `batch` says of the streams.
    size: side in px that images are loaded at; None: as they are.
    assemble: makes the batch of uint8 arrays [H, W, 3], their origins (0 or 1, uint8 [B]), epoch and start.
    seed, rank, world, workers: make the order; worker w of rank r is the reader r x max(1, workers) + w of
        world x max(1, workers), so all ranks need as many workers. Nothing is taken from the environment.
    buffer: samples waiting in a reader, of each source: encoded, at most 50 MB for a thousand images of 128 px.
    skip: what can't be read is replaced by the next sample of its source, and named in `skipped`; else it is an error.
    classes: only "natural" is possible.

    What holds: the ratio in every batch; in each pass of a source every sample once, of all ranks and workers together;
    what is to come follows from the readers' positions, so a run that goes on from saved ones (same world, workers and
    buffer) gives the same batches as one that was never stopped. What does not: passes begin at no epoch's start;
    another number of workers, or another world, gives another order, and cannot go on from saved positions.

    Errors (BuilderError) are items too, to be raised by who iterates: torch would bury them in a worker's traceback.
    Use with batch_size=None, in_order (the default) and num_workers=workers; see `Cursor` for the requests.
    """

    def __init__(
        self,
        sources: Sequence[Source | None],
        compose: Compose,
        size: int | None,
        assemble: Assemble,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        buffer: int = BUFFER,
        skip: bool = False,
        classes: str = "natural",
    ) -> None:
        if classes != "natural":
            raise BuilderError(
                f"classes='{classes}' cannot be kept while tars are streamed: a sample's class is known when it comes",
                'pass reading="indexed", or classes="natural"',
            )
        if buffer < 1:
            raise BuilderError(f"the shuffle buffer holds {buffer} samples", "it must hold 1 (no shuffling) or more")
        self.compose, self.size, self.assemble, self.skip = compose, size, assemble, skip
        self.layouts = [None if source is None else Layout(source) for source in sources]
        self.seed, self.rank, self.world, self.workers, self.buffer = seed, rank, world, workers, buffer
        self._readers: list[Reader | None] | None = None  # of this worker, made when first asked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def __getitem__(self, request: Request | None) -> StreamBatch | BuilderError | None:
        try:
            return None if request is None else self._read(request)
        except BuilderError as error:
            return error

    def _read(self, request: Request) -> StreamBatch:
        readers = self._placed(request)
        drawn = self.compose(request.epoch, request.start, request.size)
        pixels, labels, keys = [], [], []
        skipped: list[str] = []
        for number in drawn.tolist():
            reader, layout = readers[number], self.layouts[number]
            assert reader is not None
            assert layout is not None
            row, image = self._next(reader, layout.source, skipped)
            pixels.append(image)
            labels.append(int(layout.source.labels[row]))
            keys.append(layout.source.keys[row].as_py())
        origin = (drawn > 0).astype(np.uint8)
        return StreamBatch(
            self.assemble(pixels, origin, request.epoch, request.start),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(origin),
            keys,
            skipped,
            tuple(None if reader is None else reader.position for reader in readers),
        )

    def _next(self, reader: Reader, source: Source, skipped: list[str]) -> tuple[int, np.ndarray]:
        """Row and image of the next sample; after a source's length of unreadable ones, an error all the same."""
        for _ in range(len(source)):
            row, payload = next(reader)
            try:
                if isinstance(payload, BuilderError):
                    raise payload
                return row, source.decoded(row, payload, self.size)
            except BuilderError:
                if not self.skip:
                    raise
            skipped.append(source.keys[row].as_py())
        raise BuilderError(
            f"no image of '{source.name}' can be read, such as {skipped[-1]}", f"run `builder verify {source.name}`"
        )

    def _placed(self, request: Request) -> list[Reader | None]:
        """This worker's readers, where the request wants them."""
        info = get_worker_info()
        worker = info.id if info else 0
        if worker != request.worker:
            raise BuilderError(
                f"worker {worker} was asked for a batch of worker {request.worker}", "use a DataLoader with in_order"
            )
        if self._readers is None:
            self._readers = [self._reader(source, worker) for source in range(len(self.layouts))]
        if request.positions is not None:
            for reader, position in zip(self._readers, request.positions, strict=True):
                if reader is not None and position is not None:
                    reader.seek(position)
        return self._readers

    def _reader(self, source: int, worker: int) -> Reader | None:
        layout, lanes = self.layouts[source], max(1, self.workers)
        if layout is None:
            return None
        number, readers = self.rank * lanes + worker, self.world * lanes
        return Reader(layout, number, readers, (self.seed, source), self.buffer)


class Cursor:
    """Where the readers of a rank stand, for the process that iterates: after the batches that it handed on.

    Workers read ahead, so each iteration tells them where to go on, which costs nothing where they stand there already.
    They take turns, from one epoch to the next as well. Worker processes may be persistent.
    """

    def __init__(self, batches: StreamBatches) -> None:
        self._batches = batches
        start = tuple(None if layout is None else (0, 0) for layout in batches.layouts)
        self.positions: list[Positions] = [start] * max(1, batches.workers)
        self.lane = 0  # the worker whose turn it is

    def requests(self, wanted: Sequence[tuple[int, int, int, int | None]]) -> list[Request | None]:
        """What to ask of a DataLoader for the next batches: of each epoch, start and size (the rest is passed over).

        The items come in order; None before the first are to be passed over, they only keep the workers' turns.
        """
        lanes = len(self.positions)
        requests: list[Request | None] = [None] * self.lane
        for number, (epoch, start, size, _) in enumerate(wanted):
            lane = (self.lane + number) % lanes
            requests.append(Request(epoch, start, size, lane, self.positions[lane] if number < lanes else None))
        return requests

    def seen(self, batch: StreamBatch) -> None:
        """Take note that the next batch was handed on."""
        self.positions[self.lane] = batch.positions
        self.lane = (self.lane + 1) % len(self.positions)

    def state_dict(self) -> dict[str, Any]:
        """The positions of this rank's readers, and what they belong to; JSON."""
        return {
            **self._identity(),
            "lane": self.lane,
            "positions": [[None if p is None else list(p) for p in worker] for worker in self.positions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` stood. BuilderError when that was another rank, world, number of workers, buffer."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise BuilderError(
                    f"the saved streams are of {name} {state.get(name)}, these of {value}",
                    'restore them as they were, or pass reading="indexed", which goes on with any',
                )
        self.lane = int(state["lane"])
        self.positions = [
            tuple(None if p is None else (int(p[0]), int(p[1])) for p in worker) for worker in state["positions"]
        ]

    def _identity(self) -> dict[str, Any]:
        batches = self._batches
        return {name: getattr(batches, name) for name in ("seed", "rank", "world", "workers", "buffer")}


class StreamSamples(IterableDataset):
    """The samples of one source without end, for a webdataset pipeline of one's own.

    `wds.DataPipeline(StreamSamples(Source(dataset, "train"), 128), wds.map(...), wds.batched(32)).with_epoch(1000)`

    Each is a dict, as webdataset's stages pass them on: __key__, __url__ (the tar), image (uint8 RGB [H, W, 3]) and cls
    (label). The order is that of `StreamBatches`; a DataLoader's workers share each pass out, and so do the ranks (as
    in MixedLoader). A new iteration begins the next pass. number: of the source, where several have one seed.
    BuilderError for an image that can't be read.
    """

    def __init__(
        self, source: Source, size: int | None = None, *, seed: int = 0, number: int = 0, rank: int | None = None,
        world: int | None = None, buffer: int = BUFFER,
    ) -> None:  # fmt: skip
        self.layout, self.size, self.key, self.buffer = Layout(source), size, (whole(seed, "seed", 0), number), buffer
        self.rank, self.world = place(rank, world)
        self._turns = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info, source = get_worker_info(), self.layout.source
        worker, lanes = (info.id, info.num_workers) if info else (0, 1)
        reader = Reader(self.layout, self.rank * lanes + worker, self.world * lanes, self.key, self.buffer)
        reader.seek((self._turns, 0))
        self._turns += 1
        for row, payload in reader:
            if isinstance(payload, BuilderError):
                raise payload
            yield {
                "__key__": source.keys[row].as_py(),
                "__url__": source.shards[source.shard[row]],
                "image": source.decoded(row, payload, self.size),
                "cls": int(source.labels[row]),
            }
