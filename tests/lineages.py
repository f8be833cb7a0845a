"""What lineages of made-up datasets record beside their key, so that their patients can be compared."""

from typing import Any

ALIKE: dict[str, Any] = {"patient_source": "column", "patient_forms": ["0" * 16]}
