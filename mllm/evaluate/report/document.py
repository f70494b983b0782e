"""The frame of a report: one HTML file with its style inside, no script, nothing fetched.

Enters: a title, parts that are HTML already, style that this report has beside the common one. Leaves: the whole text,
from doctype to footer.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The page; the title alone is escaped here."""
    common = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{common}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
