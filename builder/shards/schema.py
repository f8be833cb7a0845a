"""Columns of a manifest: one row per image. The comment of each column travels in the Parquet schema's metadata."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def _field(
    name: str, kind: pa.DataType, comment: str, *, unit: str = "", range: str = "", required: bool = False
) -> pa.Field:
    described = {"comment": comment, "unit": unit, "range": range}
    return pa.field(name, kind, nullable=not required, metadata={k: v for k, v in described.items() if v})


IDENTITY = [
    _field(
        "key",
        pa.string(),
        "unique across datasets: {dataset}-{phase}-{index:08d}; indexed: the sample's own",
        required=True,
    ),
    _field("phase", pa.string(), "code of the class", required=True),
    _field("label", pa.int32(), "index in the full class table of dataset.json", range="0..classes-1", required=True),
    _field("origin", pa.string(), "real or synthetic", required=True),
    _field(
        "shard", pa.string(), "tar that holds the image, relative to the output root; elsewhere: in full", required=True
    ),
    _field("offset", pa.int64(), "start of the image's payload in the tar", unit="byte", required=True),
    _field("size", pa.int64(), "length of the image's payload", unit="byte", required=True),
    _field("sha256", pa.string(), "of the decoded pixels, uint8 RGB in row order", required=True),
    _field("width", pa.int32(), "of the stored image", unit="px", required=True),
    _field("height", pa.int32(), "of the stored image", unit="px", required=True),
]
SYNTHETIC = [
    _field("seed", pa.uint32(), "of torch's CPU generator for the initial noise", range="0..2^32-1"),
    _field("index", pa.int64(), "of the image within its phase", range="0..2^24-1"),
    _field("position", pa.int64(), "of the image in the endless plan"),
    _field(
        "reserve", pa.int32(), "0: the planned seed; n: the n-th reserve seed, because earlier ones gave a bad image"
    ),
    _field("checkpoint", pa.string(), "name of the checkpoint"),
    _field("checkpoint_sha256", pa.string(), "of the checkpoint's weights and settings"),
    _field("prompt", pa.string(), "positive prompt"),
    _field("negative_prompt", pa.string(), "negative prompt"),
    _field("guidance", pa.float32(), "classifier-free guidance scale (Ho & Salimans 2022)"),
    _field(
        "guidance_interval",
        pa.list_(pa.float32()),
        "noise levels (low, high] that are guided (Kynkaanniemi 2024); null: all",
        unit="sigma",
    ),
    _field("steps", pa.int32(), "denoising steps"),
    _field("scheduler", pa.string(), "sampler, e.g. dpmpp_2m_karras"),
    _field("batch_size", pa.int32(), "images denoised together, fixed by the plan", unit="image"),
    _field(
        "micro_batch",
        pa.int32(),
        "of these, images that went through the networks at once, because memory ran out; null: all",
        unit="image",
    ),
    _field("dtype", pa.string(), "of the denoiser's arithmetic"),
    _field("device", pa.string(), "device model the image was made on"),
    _field("seconds", pa.float32(), "share of its batch's wall time", unit="s"),
]
REAL = [
    _field("patient", pa.string(), "keyed hash (HMAC-SHA256, 32 hex digits) of the patient"),
    _field("split", pa.string(), "train, val or test; by patient"),
    _field("source", pa.string(), "keyed hash of the photograph's path; of foreign images, their name"),
    _field("box", pa.list_(pa.float32()), "xmin, ymin, xmax, ymax of the annotated box in the stored crop", unit="px"),
    _field(
        "original_size",
        pa.list_(pa.int32()),
        "width, height of the crop before any resize (synthetic: as conditioned on)",
        unit="px",
    ),
]
IMAGE_SCORES = [
    _field(
        "ssim",
        pa.float32(),
        "best structural similarity (Wang 2004) over the phase's panel of real crops",
        range="-1..1",
    ),
    _field("ssim_mean", pa.float32(), "mean structural similarity over the phase's panel", range="-1..1"),
    _field("lpips", pa.float32(), "least LPIPS-Alex (Zhang 2018) over the phase's panel; null without its weights"),
    _field("lpips_mean", pa.float32(), "mean LPIPS-Alex over the phase's panel; null without its weights"),
    _field("feature_distance", pa.float32(), "Euclidean, to the nearest training crop of the phase in feature space"),
    _field("realism", pa.float32(), "realism score (Kynkaanniemi 2019) among the phase's training crops", range="0.."),
    _field("phase_probability", pa.float32(), "of the image's phase, by the calibrated linear probe", range="0..1"),
    _field("phase_margin", pa.float32(), "phase_probability less the largest of another phase", range="-1..1"),
    _field(
        "sharpness",
        pa.float32(),
        "share of the detail's amplitude that is fine, at 64 px; see quality.statistics",
        range="0..1",
    ),
    _field("contrast", pa.float32(), "standard deviation of the luma, at 64 px", range="0..127.5"),
    _field("clipped", pa.float32(), "share of pixels with a channel at 0 or 255", range="0..1"),
    _field("noise", pa.float32(), "noise of the luma (Immerkaer 1996), at the stored size", unit="grey level"),
    _field("chroma_noise", pa.float32(), "noise of (R - G) / sqrt 2, at the stored size", unit="grey level"),
    _field("copy_score", pa.float32(), "pixel similarity to the most similar training crop, aligned", range="0..1"),
    _field("duplicate_score", pa.float32(), "the same similarity to the most similar earlier image", range="0..1"),
]
PERCENTILES = [  # of every score that has a scale among real crops
    _field(f"{field.name}_real_pct", pa.float32(), f"where {field.name} lies among real crops of the phase, each "
           "scored as if its own patient's crops were not there", unit="%", range="0..100")
    for field in IMAGE_SCORES if field.name != "duplicate_score"
]  # fmt: skip
SCORES = [
    *IMAGE_SCORES,
    *PERCENTILES,
    _field("mean_r", pa.float32(), "mean of the red channel", range="0..255"),
    _field("mean_g", pa.float32(), "mean of the green channel", range="0..255"),
    _field("mean_b", pa.float32(), "mean of the blue channel", range="0..255"),
    _field("copy_of", pa.string(), "key of the most similar training crop; a copy only from the reference's alarm on"),
    _field("duplicate_of", pa.string(), "key of the earlier image that this one repeats; null: of none"),
]

# Numbers in each list. Not in the types: before pyarrow 26, missing lists of a fixed size are unreadable.
LIST_LENGTHS = {"guidance_interval": 2, "box": 4, "original_size": 2}
STAMP = "scores"  # in a manifest's schema metadata: the version of its scores
SCORE_VERSIONS = "score_versions"  # there, too: JSON, score -> its own version; see quality.image_scores
SCORE_NAMES = tuple(field.name for field in SCORES)
NUMERIC_SCORES = tuple(field.name for field in SCORES if field.type == pa.float32())
SCHEMA = pa.schema(IDENTITY + SYNTHETIC + REAL + SCORES)

# What may differ between two runs that make the same images: never in the tar's JSON member.
VOLATILE = frozenset({"seconds", "device", "shard", "offset", "size", *SCORE_NAMES})


def member_json(row: dict[str, Any]) -> dict[str, Any]:
    """What the KEY.json member says: the row without timing, device, place, scores and nulls."""
    return {name: value for name, value in row.items() if name not in VOLATILE and value is not None}


def to_table(rows: list[dict[str, Any]], metadata: dict[str, str]) -> pa.Table:
    """The manifest of one shard; `metadata` rides in the schema (tar_sha256 binds the two files)."""
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))


def with_columns(table: pa.Table, rows: list[dict[str, Any]], fields: list[pa.Field]) -> pa.Table:
    """The manifest with the columns `fields` replaced from `rows`, in place where they stand; its metadata is kept."""
    metadata = table.schema.metadata
    for field in fields:
        values = pa.array([row.get(field.name) for row in rows], field.type)
        place = table.schema.get_field_index(field.name)
        table = table.set_column(place, field, values) if place >= 0 else table.append_column(field, values)
    return table.replace_schema_metadata(metadata)
