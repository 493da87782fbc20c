"""Files that stand alone: HTML pages with their styles, charts and pictures, no script, nothing from a network; SVG.

Text of strangers (class names, file names) is escaped by Jinja2; a page's own policy allows no script whatever it
contains.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from report.charts import LETTER, Chart

THUMBNAIL = 64  # pixels, longest side
LARGEST_PNG = 32  # pixels: below it PNG is sharp and hardly larger than JPEG


def render(template: str, **context: Any) -> bytes:
    """A file from report/templates."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Names of files may hold bytes that are no UTF-8.
    return environment.get_template(template).render(**context).encode("utf-8", errors="replace")


def svg_file(chart: Chart) -> bytes:
    """A chart as an SVG file, with its title and legend."""
    legend, x = [], 12
    for color, style, text in chart.legend:
        legend.append((x, color, style, text))
        x += 40 + int(LETTER * len(text))
    return render("chart.svg", chart=chart, legend=legend)


@dataclass(frozen=True)
class Picture:
    """A picture as it stands in a page.

    Args:
        uri: its data.
        title: shown when the pointer rests on it, and read out.
        tiny: it has so few pixels that they are shown as squares.
    """

    uri: str
    title: str
    tiny: bool

    @classmethod
    def of(cls, image: Image.Image, title: str) -> "Picture":
        tiny, buffer = max(image.size) <= LARGEST_PNG, io.BytesIO()
        options = {"format": "PNG", "optimize": True} if tiny else {"format": "JPEG", "quality": 80}
        image.save(buffer, **options)
        data = base64.b64encode(buffer.getvalue()).decode()
        return cls(f"data:image/{'png' if tiny else 'jpeg'};base64,{data}", title, tiny)


def checkpoint_settings(checkpoint: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which checkpoint a page is about, name by name, from `CheckpointRecord.to_json`."""
    rows = [
        ("checkpoint", f"{checkpoint['path']}, epoch {checkpoint['epoch']} ({checkpoint['selected_by']})"),
        ("SHA-256", checkpoint["sha256"]),
    ]
    return rows + [(f"training {part}", f"digest {v}") for part, v in (checkpoint.get("fingerprint") or {}).items()]
