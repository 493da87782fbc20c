"""Pages that stand alone: one HTML file with its styles, charts and pictures, no script, nothing from a network.

Text of strangers (class names, file names) is escaped by Jinja2; the page's own policy allows no script whatever it
contains.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from report.charts import TEMPLATES
from report.verdict import one, signed

THUMBNAIL = 64  # pixels, longest side
LARGEST_PNG = 32  # pixels: below it PNG is sharp and hardly larger than JPEG


def render(template: str, **context: Any) -> bytes:
    """A page from report/templates."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"one": one, "signed": signed}
    # Names of files may hold bytes that are no UTF-8.
    return environment.get_template(template).render(**context).encode("utf-8", errors="replace")


def checkpoint_settings(checkpoint: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which checkpoint it was, name by name, from `CheckpointRecord.to_json`."""
    rows = [
        ("checkpoint", f"{checkpoint['path']}, epoch {checkpoint['epoch']} ({checkpoint['selected_by']})"),
        ("SHA-256", checkpoint["sha256"]),
    ]
    digests = checkpoint.get("fingerprint") or {}
    return rows + [(f"training {part}", f"digest {value}") for part, value in digests.items()]


def picture(image: Image.Image, title: str) -> dict[str, Any]:
    """A picture as it stands in a page: "uri", its data; "title", for the pointer; "tiny", shown pixel by pixel."""
    tiny, buffer = max(image.size) <= LARGEST_PNG, io.BytesIO()
    image.save(buffer, **({"format": "PNG", "optimize": True} if tiny else {"format": "JPEG", "quality": 80}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"uri": f"data:image/{'png' if tiny else 'jpeg'};base64,{data}", "title": title, "tiny": tiny}
