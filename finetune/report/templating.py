"""Pages out of templates: one jinja set-up and one style for every HTML file that the toolkit writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.report.formatting import plain_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"
STYLE = "report.css"


def page_environment(folder: Path = TEMPLATES) -> Environment:
    """Templates of a folder and of every page; content is escaped, and a name that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(template: str, *, folder: Path = TEMPLATES, style: str | None = None, **content: Any) -> str:
    """A page as HTML. All content is escaped, and control characters are taken out.

    Args:
        template: file in `folder`; it gets the content and, as `style`, the style sheet.
        folder: where the templates are.
        style: style sheet in `folder` that comes after the one of all pages.
        content: names that the template uses.
    """
    from markupsafe import Markup

    sheets = [TEMPLATES / STYLE, *([folder / style] if style else [])]
    html = (
        page_environment(folder)
        .get_template(template)
        .render(style=Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets)), **content)
    )
    return plain_text(html)
