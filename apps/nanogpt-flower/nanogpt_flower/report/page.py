"""Render a page of one file, and write it."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from nanogpt_flower.report import text
from nanogpt_flower.report.style import CSS

REFRESH_SECONDS = 5

# The policy lets a browser load nothing at all, not even by a mistake in this code.
BASE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh_seconds }}">
{% endif %}<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
<body>
<main>
{% block content %}{% endblock %}
</main>
</body>
</html>
"""

# `long_table` hides a table of many rows until a reader asks for it.
MACROS = """\
{% macro long_table(rows, summary) %}
{% if rows > 15 %}<details><summary>{{ summary }}</summary>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ summary }}"><table>{{ caller() }}\
</table></div>
{% if rows > 15 %}</details>{% endif %}
{% endmacro %}
"""


def render_page(template: str, title: str, *, refresh: bool = False, **values: Any) -> str:
    """Render a template that extends "base" and fills its block `content`.

    All values are escaped unless they are `Markup`. With `refresh`, the page reloads itself every
    few seconds.
    """
    page = _environment(template).get_template("page")
    shown = text.clean(title, text.LABEL_LENGTH)
    return page.render(title=shown, refresh=refresh, **values)


def write_page(path: Path, page: str) -> None:
    """Write a page. A reader sees either the old file or the whole new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _environment(template: str) -> Environment:
    environment = Environment(
        loader=DictLoader({"base": BASE, "macros": MACROS, "page": template}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(css=Markup(CSS), refresh_seconds=REFRESH_SECONDS)
    environment.filters.update(
        label=lambda value: text.clean(str(value), text.LABEL_LENGTH),
        sentence=lambda value: text.sentence(str(value)),
        count=text.count,
        megabytes=text.megabytes,
        duration=text.duration,
        exact="{:,}".format,
        loss=lambda value: "–" if value is None else f"{value:.4f}",
        or_dash=lambda value: "–" if value is None else f"{value:,}",
    )
    return environment
