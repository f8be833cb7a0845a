"""Fingerprints: two equal ones promise that the same settings were asked for."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(keys: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of what decides the images; equal fingerprints promise equal images."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
