"""Files of flags for --config: JSON, or YAML by an optional package."""

import json
from pathlib import Path
from typing import Any


def read_values(path: str) -> dict[str, Any]:
    """Return the object in a file of flags. ValueError: unreadable, or no object of names."""
    is_yaml = path.endswith((".yaml", ".yml"))
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = _yaml(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = "YAML" if is_yaml else "JSON"
        raise ValueError(f"--config {path} is not {kind}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        kind = "object" if is_yaml else "JSON object"
        raise ValueError(f"--config {path} must hold one {kind} of flags")
    return values


def _yaml(text: str) -> Any:
    """Return what a YAML text holds. ValueError: it is none, or its package is missing."""
    try:
        import yaml
    except ImportError:
        raise ValueError("it is read by the package pyyaml: pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
