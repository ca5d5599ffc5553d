"""Objects in JSON from files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def parse_object(text: str | bytes) -> dict[str, Any]:
    """An object in JSON.

    Raises:
        ValueError: it is none, whatever it is instead.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object in JSON was expected, not {type(value).__name__}")
    return value
