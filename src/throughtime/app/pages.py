"""Self-contained web pages: one HTML file with its style, scripts and data, which opens offline and asks no network for anything.

The parts stand in `app/page/` as they are, with no build step; a page is these pasted together.
"""

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from throughtime.errors import InputError

_PARTS = files("throughtime.app") / "page"


def render(name: str, title: str, data: Any) -> str:
    r"""Return a page.

    Args:
        name: Which: "gradients" or "explain".
        title: Of the window.
        data: What the page shows, as JSON holds it. Any text is safe in it: the JSON is ASCII (so lone surrogates and U+2028 are
            escapes), and no "<" in it can end the element that it stands in.

    Example:
        >>> "<title>{{data}}</title>" in render("explain", "{{data}}", {})
        True
        >>> page = render("explain", "a & b", {"word": "</script>\u2028"})
        >>> "a &amp; b" in page, page.count("</script>") == page.count("<script"), r"\u003c/script>\u2028" in page
        (True, True, True)
    """
    scripts = [f"<script>\n{_part(script)}</script>" for script in ("charts.js", "cells.js", f"{name}.js")]
    filled = {
        "title": html.escape(title),
        "style": _part("page.css"),
        "body": _part(f"{name}.html"),
        "scripts": "\n".join(scripts),
        "data": json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c"),
    }
    # Every place at once, so that nothing is looked for in what is filled in.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], _part("page.html"))


def write(path: Path, name: str, title: str, data: Any) -> None:
    """Render a page into a file.

    Raises:
        InputError: It can't be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(name, title, data), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror}; give another place") from error


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
