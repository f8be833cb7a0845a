"""Hand a checkpoint on: as a folder of its own, or its denoiser as one file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from builder.errors import BuilderError
from builder.files import fsync_folder, full_disk_as_oserror
from builder.models.checkpoint import Checkpoint, new_folder, save_checkpoint
from builder.models.integrity import require_undamaged
from builder.models.load import load_pipeline
from builder.models.lora import ADAPTER
from builder.models.tensors import StoredTensors, write_tensors
from builder.shards.lock import held_file

STEM = "diffusion_pytorch_model"


def export(checkpoint: Checkpoint, target: Path, fuse: bool = False) -> None:
    """Write a checkpoint to a new folder, or to one file FILE.safetensors.

    The file holds the UNet's weights under diffusers' names; of an adapter (LoRA) the adapter alone, which diffusers'
    `load_lora_weights` reads, or with `fuse` the UNet with the adapter added. A folder is a copy of the checkpoint;
    with `fuse` one that no longer needs its base. Raises BuilderError when the target exists or nothing is to be fused.
    """
    if target.exists():
        raise BuilderError(f"{target} exists", "choose another --to, or remove it")
    if fuse and checkpoint.method != "lora":
        raise BuilderError(f"'{checkpoint.name}' is whole: it has no adapter to fuse", "leave --fuse out")
    require_undamaged(checkpoint.path, checkpoint.files)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        temporary = target.with_name(f".tmp-{target.name}")
        lock = target.with_name(f".lock-{target.name}")
        with held_file(lock, f"another process is writing {target}", "wait for it, or choose another --to"):
            try:
                with full_disk_as_oserror(target):
                    _write_file(checkpoint, temporary, fuse)
                os.replace(temporary, target)
                fsync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
    elif fuse:
        save_checkpoint(load_pipeline(checkpoint), dataclasses.replace(checkpoint, path=target, method="full"))
    else:
        with new_folder(target) as folder:
            shutil.copytree(checkpoint.path, folder, dirs_exist_ok=True)
            require_undamaged(folder, checkpoint.files)  # what was read is not always what stands on the disk


def _write_file(checkpoint: Checkpoint, target: Path, fuse: bool) -> None:
    if checkpoint.method == "full":
        stored = StoredTensors(checkpoint.path / "unet", STEM)
        write_tensors(target, stored.layout, stored.__getitem__)
    elif fuse:
        weights = load_pipeline(checkpoint).unet.state_dict()
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        write_tensors(target, layout, weights.__getitem__)
    else:
        shutil.copyfile(checkpoint.path / ADAPTER, target)
