"""Do the old training script's lines run against ours, in all three forms, with TensorFlow?

    python -m venv /tmp/tf && /tmp/tf/bin/pip install tensorflow-cpu pyarrow pillow pydantic pyyaml fsspec click duckdb
    PYTHONPATH=. /tmp/tf/bin/python -m tests.acceptance.old_script

TensorFlow has an environment of its own, because it wants other versions than torch. For each form of the call (third
version, second version, guide) the old lines are carried out with nothing changed but the lines that docs/old-script.md
says to replace: the import, the settings set from outside, the manager, the augmentation function mapped over a
tf.data set of batches, and `fit` with the callback. Synthetic images are told from real ones by their pixels, so that
what is mixed in is checked image by image. Exit 1 when a criterion is missed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shards

DOCUMENT = Path(__file__).parents[2] / "docs" / "old-script.md"
MODULES = ("generative_augmentation_v2", "generative_augmentation_v3", "generative_augmentation_sdxl")
PER_PHASE, SIZE = 40, 64
WIDTH, HEIGHT = 48, 48
BATCH, BATCHES = 16, 60
REAL = 100.0  # grey level of the stand-ins for real images
OLD_SETTINGS = {
    "IMAGE_SIZE": 128, "USE_GENERATIVE_AUGMENTATION": True, "USE_GENERAL_AUGMENTATION": True,
    "GENERATIVE_AUG_PROB": 0.5, "GENERATIVE_AUG_MIX_RATIO": (0.25, 0.5), "GENERATIVE_AUG_INFERENCE_STEPS": 50,
    "GENERATIVE_AUG_BATCH_LIMIT": 4, "GENERATIVE_AUG_PHASES": ["I", "P", "R"],
    "GENERATIVE_AUG_SDXL_RESOLUTION": 512, "GENERATIVE_AUG_SDXL_GUIDANCE_SCALE": 4.0,
}  # fmt: skip

# The old lines, form by form: what is imported, and how the manager is made.
FORMS = {
    "third version": (
        "from src.data.generative_augmentation_v3 import (AugmentationConfig, "
        "GenerativeAugmentationManagerSDXL as GenerativeAugmentationManager, GenerativeAugmentationCallback)",
        "gen_manager = GenerativeAugmentationManager(checkpoint_path='models/checkpoint_epoch_0030.pt', "
        "config=aug_config)",
    ),
    "second version": (
        "from src.data.generative_augmentation_v2 import AugmentationConfig, GenerativeAugmentationManager, "
        "GenerativeAugmentationCallback",
        "gen_manager = GenerativeAugmentationManager(base_dir='models/sd15', config=aug_config)",
    ),
    "guide": (
        "from src.data.generative_augmentation_sdxl import AugmentationConfig, GenerativeAugmentationManager, "
        "GenerativeAugmentationCallback",
        "gen_manager = GenerativeAugmentationManager(checkpoint_dir='models/sdxl_checkpoints', config=aug_config)",
    ),
}
DATASET_UTILS = "from src.data.generative_augmentation_v2 import create_enhanced_augmentation_fn"
LINES = """
aug_config = AugmentationConfig()
aug_config.generative_settings['output_size']['width'] = image_size
aug_config.generative_settings['output_size']['height'] = image_size
{manager}
augmentation_fn = create_enhanced_augmentation_fn(gen_manager, aug_config) if gen_manager else None
train_dataset = train_dataset.map(augmentation_fn, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
callbacks = [GenerativeAugmentationCallback(gen_manager)]
"""

MISSED: list[str] = []


def criterion(what: str, met: bool) -> None:
    """Say whether a criterion was met, and remember one that was missed."""
    print(f"{'ok    ' if met else 'MISSED'} {what}", flush=True)
    if not met:
        MISSED.append(what)


def write_synthetic(root: Path) -> dict[bytes, str]:
    """An accepted synthetic dataset; pixels of each image, as served, -> its phase."""
    samples, phases = [], {}
    for label, code in enumerate(HEALING_PHASES.codes):
        for index in range(PER_PHASE):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (WIDTH, WIDTH, 3), np.uint8)
            row = image_row(f"accepted-{code}-{index:08d}", code, label, "synthetic", pixels)
            samples.append(Sample(row, encode_png(pixels)))
            phases[pixels.tobytes()] = code
    dataset = Dataset("accepted", Storage(root))
    write_shards(dataset.storage, dataset.name, iter(samples), 50)
    dataset.write_info(
        {
            "name": dataset.name, "state": "complete", "origin": "synthetic", "created": "2026-01-01T00:00:00+00:00",
            "classes": HEALING_PHASES.to_json(), "count": len(samples), "config": {}, "parent": None, "filter": {},
            "lineage": {"known": True, "key_fingerprint": "test", "patients": []},
            "licence": {"base": None, "data": "CC0"},
        }
    )  # fmt: skip
    return phases


def replaced(line: str) -> str:
    """The old line as the document says to write it: the module's name is all that changes."""
    for module in MODULES:
        line = line.replace(f"src.data.{module}", "builder.mixing")
    return line


def batches(tensorflow: Any) -> Any:
    """What the old pipeline hands to the augmentation function: batches of inputs by name, and one-hot labels."""
    labels = np.random.default_rng(0).integers(0, 3, BATCH * BATCHES)
    features = {
        "depth_rgb_input": np.full((len(labels), HEIGHT, WIDTH, 3), REAL, np.float32),
        "depth_map_input": np.full((len(labels), HEIGHT, WIDTH, 3), REAL, np.float32),
        "metadata_input": np.arange(len(labels), dtype=np.float32)[:, None],
    }
    one_hot = np.eye(3, dtype=np.float32)[labels]
    return tensorflow.data.Dataset.from_tensor_slices((features, one_hot)).batch(BATCH)


def run(form: str, tensorflow: Any, phases: dict[bytes, str]) -> None:
    """The old lines of one form, carried out and checked."""
    imported, manager = FORMS[form]
    names: dict[str, Any] = {"tf": tensorflow, "image_size": WIDTH, "train_dataset": batches(tensorflow)}
    for line in (imported, DATASET_UTILS):
        exec(replaced(line), names)
    exec(LINES.format(manager=manager), names)

    size = names["gen_manager"].generate_images("depth_rgb", "P", batch_size=2).shape
    criterion(f"{form}: the size set from outside is served ({size[1]} x {size[2]} px)", size == (2, WIDTH, WIDTH, 3))

    found = {"synthetic": 0, "of another phase": 0, "changed": 0, "real": 0, "outside 0-255": 0, "map replaced": 0}
    for features, label in names["train_dataset"]:
        images = features["depth_rgb_input"].numpy()
        maps = features["depth_map_input"].numpy()
        for image, one_hot in zip(images, label.numpy(), strict=True):
            phase = phases.get(image.astype(np.uint8).tobytes())
            found["synthetic" if phase else "real"] += 1
            found["of another phase"] += phase not in (None, "IPR"[int(one_hot.argmax())])
            found["changed"] += phase is None and bool((image != REAL).any())
        found["outside 0-255"] += int(images.min() < 0 or images.max() > 255)
        found["map replaced"] += sum(image.astype(np.uint8).tobytes() in phases for image in maps)
    print(f"       {form}: {found}")
    share = found["synthetic"] / (BATCH * BATCHES)
    asked = 0.5 * 0.375  # probability x middle of the range
    criterion(f"{form}: share mixed in {share:.3f}, asked {asked:.3f} (within 0.06)", abs(share - asked) < 0.06)
    criterion(f"{form}: none of another phase than its label, none in maps",
              not found["of another phase"] and not found["map replaced"])  # fmt: skip
    changed = found["changed"] / max(1, found["real"])
    criterion(f"{form}: half of the real images are changed ({changed:.2f}), none leaves 0-255",
              abs(changed - 0.5) < 0.08 and not found["outside 0-255"])  # fmt: skip

    inputs = {name: tensorflow.keras.Input(spec.shape[1:], name=name)
              for name, spec in names["train_dataset"].element_spec[0].items()}  # fmt: skip
    flat = [tensorflow.keras.layers.Flatten()(tensorflow.keras.layers.Rescaling(1 / 255)(each))
            for each in inputs.values()]  # fmt: skip
    output = tensorflow.keras.layers.Dense(3, activation="softmax")(tensorflow.keras.layers.Concatenate()(flat))
    model = tensorflow.keras.Model(inputs, output)
    model.compile(optimizer="adam", loss="categorical_crossentropy")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model.fit(names["train_dataset"], epochs=2, callbacks=names["callbacks"], verbose=0)
    lines = said.getvalue().strip().splitlines()
    print("\n".join(f"       {line}" for line in lines))
    counts = names["gen_manager"].served.counts
    total = sum(counts.values())
    hundreds = sum("by phase" in line for line in lines)
    criterion(f"{form}: fit with the callback prints a line a hundred ({hundreds} of {total // 100}) and the summary",
              hundreds == total // 100 > 0 and f"synthetic images served: {total:,}" in lines
              and all(f"phase {code} (" in said.getvalue() for code in counts))  # fmt: skip
    criterion(f"{form}: the callback is one of Keras",
              isinstance(names["callbacks"][0], tensorflow.keras.callbacks.Callback))  # fmt: skip


def without_a_manager(tensorflow: Any) -> None:
    """As scripts run with generation switched off: real images are changed, and none replaced."""
    from builder.mixing import AugmentationConfig, GenerativeAugmentationCallback, create_enhanced_augmentation_fn

    config = AugmentationConfig()
    mapped = batches(tensorflow).map(create_enhanced_augmentation_fn(None, config))
    images = np.concatenate([features["depth_rgb_input"].numpy() for features, _ in mapped])
    changed = float((images != REAL).any((1, 2, 3)).mean())
    criterion(f"without a manager real images are changed ({changed:.2f}) and the callback does nothing",
              abs(changed - 0.5) < 0.08 and GenerativeAugmentationCallback(None).on_train_end() is None)  # fmt: skip


def documented() -> None:
    """Every line that is replaced here stands in the document, old and new."""
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    for module in MODULES:
        criterion(f"docs/old-script.md names {module}", f"src.data.{module}" in text)
    criterion("docs/old-script.md has the line of dataset_utils.py", replaced(DATASET_UTILS) in text)


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    print(f"TensorFlow {tensorflow.__version__}, Keras {tensorflow.keras.__version__}, numpy {np.__version__}")
    settings = types.ModuleType("src.utils.production_config")
    vars(settings).update(OLD_SETTINGS)
    sys.modules[settings.__name__] = settings
    documented()
    with tempfile.TemporaryDirectory() as folder:
        phases = write_synthetic(Path(folder))
        os.environ["BUILDER_DATASET"] = f"{folder}/shards/accepted"
        for form in FORMS:
            run(form, tensorflow, phases)
        without_a_manager(tensorflow)
    print(f"\n{len(MISSED)} criteria missed" if MISSED else "\nall criteria met")
    sys.exit(1 if MISSED else 0)


if __name__ == "__main__":
    main()
