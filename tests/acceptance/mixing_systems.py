"""One loader at a time, for tests.acceptance.mixing_speed, which runs this in a process of its own: ours or a peer's.

    python -m tests.acceptance.mixing_systems available
    python -m tests.acceptance.mixing_systems convert FOLDER SYSTEM
    python -m tests.acceptance.mixing_systems run FOLDER SYSTEM --batches N ...

All yield batches (images uint8 [B, 3, H, W], labels, origin), decode with the same function (PIL), shuffle as each
recommends, and are collated in two worker processes. What it prints last is one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset

from builder.shards.dataset import decode

Place = tuple[Path, float, int, int]  # folder, ratio, batch size, workers
BUFFER = 1000  # samples of a webdataset's shuffle buffer
NAMES = ("real", "synthetic")


def tensor(payload: bytes) -> torch.Tensor:
    return torch.from_numpy(decode(payload)).permute(2, 0, 1)


def ours(place: Place) -> Iterable[Any]:
    from builder.mixing import MixedLoader

    folder, ratio, batch, workers = place
    return MixedLoader(
        real="real", synthetic="synthetic", ratio=ratio, batch_size=batch, out=str(folder), workers=workers
    )


# -- webdataset ---------------------------------------------------------------------------------------------------


def _tars(folder: Path, name: str) -> list[str]:
    return [str(path) for path in sorted((folder / "shards" / name).glob("*.tar"))]


def _web(folder: Path, *names: str) -> Any:
    import webdataset

    tars = [tar for name in names for tar in _tars(folder, name)]
    return webdataset.WebDataset(tars, shardshuffle=len(tars), select_files=_wanted).shuffle(BUFFER).map(_sample)


def _wanted(member: str) -> bool:
    return member.endswith((".png", ".cls"))


def _sample(sample: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    return tensor(sample["png"]), int(sample["cls"]), int(sample["__key__"].startswith("synthetic"))


def web(place: Place) -> Iterable[Any]:
    """All shards, real and synthetic, in one pipeline: no ratio."""
    folder, _, batch, workers = place
    return DataLoader(_web(folder, *NAMES), batch_size=batch, num_workers=workers)


class Mixed(IterableDataset):
    """webdataset's RandomMix as a dataset; ends with the real data."""

    def __init__(self, folder: Path, ratio: float) -> None:
        self.folder, self.ratio = folder, ratio

    def __iter__(self) -> Iterator[Any]:
        import webdataset

        real, synthetic = _web(self.folder, "real"), _web(self.folder, "synthetic").repeat()
        return iter(webdataset.RandomMix([real, synthetic], [1 - self.ratio, self.ratio]))


def random_mix(place: Place) -> Iterable[Any]:
    folder, ratio, batch, workers = place
    return DataLoader(Mixed(folder, ratio), batch_size=batch, num_workers=workers)


# -- MosaicML streaming, litdata ----------------------------------------------------------------------------------


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The samples of one of our datasets, in order: payload, label, origin."""
    for path in sorted((folder / "manifests" / name).glob("shard-*.parquet")):
        rows = pq.read_table(path, columns=["shard", "offset", "size", "label"]).to_pylist()
        tar = (folder / rows[0]["shard"]).read_bytes()
        for row in rows:
            payload = tar[row["offset"] : row["offset"] + row["size"]]
            yield {"image": payload, "label": row["label"], "origin": NAMES.index(name)}


def convert_streaming(folder: Path) -> None:
    from streaming import MDSWriter

    for name in NAMES:
        columns = {"image": "bytes", "label": "int", "origin": "int"}
        with MDSWriter(columns=columns, out=str(folder / "mds" / name), size_limit=CHUNK) as writer:
            for row in _rows(folder, name):
                writer.write(row)


def _streaming(place: Place, batching: str) -> Iterable[Any]:
    from streaming import Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Decoded(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return tensor(sample["image"]), sample["label"], sample["origin"]

    clean_stale_shared_memory()
    folder, ratio, batch, workers = place
    shares = [1 - ratio, ratio]
    streams = [
        Stream(local=str(folder / "mds" / name), proportion=share) for name, share in zip(NAMES, shares, strict=True)
    ]
    count = sum(pq.read_metadata(path).num_rows for path in (folder / "manifests/real").glob("shard-*.parquet"))
    dataset = Decoded(
        streams=streams, epoch_size=int(count / (1 - ratio)), shuffle=True, batch_size=batch, batching_method=batching
    )
    return DataLoader(dataset, batch_size=batch, num_workers=workers)


def streaming(place: Place) -> Iterable[Any]:
    return _streaming(place, "random")


def streaming_stratified(place: Place) -> Iterable[Any]:
    return _streaming(place, "stratified")


def _itself(row: dict[str, Any]) -> dict[str, Any]:
    return row


def convert_litdata(folder: Path) -> None:
    import litdata

    for name in NAMES:
        litdata.optimize(
            fn=_itself, inputs=list(_rows(folder, name)), output_dir=str(folder / "litdata" / name), chunk_bytes=CHUNK,
            num_workers=1, mode="overwrite", verbose=False,
        )  # fmt: skip


def litdata(place: Place) -> Iterable[Any]:
    import litdata

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return tensor(sample["image"]), sample["label"], sample["origin"]

    folder, ratio, batch, workers = place
    datasets = [Decoded(str(folder / "litdata" / name), shuffle=True) for name in NAMES]
    mixed = litdata.CombinedStreamingDataset(datasets, weights=[1 - ratio, ratio], iterate_over_all=False)
    return litdata.StreamingDataLoader(mixed, batch_size=batch, num_workers=workers)


CHUNK = 1 << 24  # bytes of a chunk in the peers' own formats
SYSTEMS: dict[str, tuple[Callable[[Place], Iterable[Any]], str, str]] = {  # how it is made, what it needs, its title
    "ours": (ours, "", "MixedLoader (ours)"),
    "web": (web, "webdataset", "WebDataset, all shards"),
    "random_mix": (random_mix, "webdataset", "WebDataset RandomMix"),
    "streaming": (streaming, "streaming", "MosaicML streaming"),
    "streaming_stratified": (streaming_stratified, "streaming", "MosaicML streaming, stratified"),
    "litdata": (litdata, "litdata", "litdata"),
}
CONVERSIONS = {"mds": ("streaming", convert_streaming), "litdata": ("litdata", convert_litdata)}


# -- measuring ----------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system time so far of this process and its workers."""
    ticks = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def speed(loader: Iterable[Any], batches: int) -> dict[str, float]:
    """Samples a second from the arrival of the first batch to that of the last, and what came before it."""
    began = time.perf_counter()
    samples, first, cpu = 0, 0.0, 0.0
    for number, (images, labels, _) in enumerate(loader):
        if number == 0:
            first, cpu = time.perf_counter(), cpu_seconds()
            assert images.dtype == torch.uint8 and images.shape[1] == 3 and len(labels) == len(images)
        else:
            samples += len(images)
        if number == batches:
            seconds = time.perf_counter() - first
            return {
                "rate": samples / seconds, "first": first - began, "cpu": 1e6 * (cpu_seconds() - cpu) / samples,
            }  # fmt: skip
    raise AssertionError(f"there are fewer than {batches + 1} batches")


def shares(loader: Iterable[Any], batches: int, batch: int) -> list[float]:
    """The synthetic share of each of `batches` full batches, over as many epochs as that takes."""
    found: list[float] = []
    while True:
        for _, _, origin in loader:
            if len(origin) == batch:
                found.append(float(origin.float().mean()))
            if len(found) == batches:
                return found


def available() -> dict[str, str]:
    """Version of each package that can be imported; why not, of the others."""
    found = {"torch": torch.__version__}
    for package in ("webdataset", "streaming", "litdata"):
        try:
            found[package] = str(importlib.import_module(package).__version__)
        except ImportError as error:
            found[package] = f"absent: {error}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["available", "convert", "run"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("system", nargs="?")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shares", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: Any
    if options.action == "available":
        result = available()
    elif options.action == "convert":
        target = options.folder / options.system
        shutil.rmtree(target, ignore_errors=True)
        CONVERSIONS[options.system][1](options.folder)
        result = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    else:
        place = options.folder, options.ratio, options.batch_size, options.workers
        loader = SYSTEMS[options.system][0](place)
        if options.shares:
            result = shares(loader, options.batches, options.batch_size)
        else:
            result = speed(loader, options.batches)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
