"""Pages: HTML in the one style of all reports, each a file that needs no other."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder or one below; what it lacks is an error."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES),
    )
    return environment.get_template(template).render(**values)


def embedded(svg: str) -> str:
    """Turn an SVG file's text into an address that holds the picture itself."""
    encoded = base64.b64encode(svg.encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
