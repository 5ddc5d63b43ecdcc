"""The API's documentation as a page for people: every route with its fields, made from the same OpenAPI document.

In: the app's schema. Out: HTML with the dashboard's style, no script and nothing from elsewhere. Refuses to know what
routes do.
"""

from __future__ import annotations

from typing import Any

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} {{ version }}: API</title>
<link rel="stylesheet" href="/static/style.css">
<header class="bar"><a class="brand" href="/">{{ title }}</a><span>API {{ version }}</span>
<a class="who" href="/openapi.json">openapi.json</a></header>
<main>
{% for tag, operations in tags.items() %}
<section class="card">
<h2>{{ tag }}</h2>
{% for one in operations %}
<h3><code>{{ one.method }} {{ one.path }}</code></h3>
<p>{{ one.text }}</p>
{% if one.fields %}
<table>
<tr><th>field</th><th>in</th><th>type</th><th>needed</th><th>meaning</th></tr>
{% for field in one.fields %}
<tr><td><code>{{ field.name }}</code></td><td>{{ field.place }}</td><td><code>{{ field.type }}</code></td>
<td>{{ "yes" if field.required else "" }}</td><td>{{ field.text }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</html>
""")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The page."""
    schema = request.app.openapi()
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or operation.get("summary", "")
            one = {"method": method.upper(), "path": path, "text": text, "fields": fields(operation, schema)}
            tags.setdefault((operation.get("tags") or ["other"])[0], []).append(one)
    page = PAGE.render(title=schema["info"]["title"], version=schema["info"]["version"], tags=tags)
    policy = "default-src 'none'; style-src 'self'; img-src 'self'"
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def fields(operation: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters, and the fields of a JSON body."""
    found = [
        {
            "name": one["name"],
            "place": one["in"],
            "type": type_of(one.get("schema", {})),
            "required": one.get("required", False),
            "text": one.get("description", ""),
        }
        for one in operation.get("parameters", [])
    ]
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {}).get("schema", {})
    if "$ref" in body:
        body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    for name, one in body.get("properties", {}).items():
        text = one.get("description", "")
        needed = name in body.get("required", [])
        found.append({"name": name, "place": "body", "type": type_of(one), "required": needed, "text": text})
    return found


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return " | ".join(dict.fromkeys(type_of(one) for one in schema[many]))
    if schema.get("type") == "array":
        return f"[{type_of(schema.get('items', {}))}]"
    if "const" in schema or "enum" in schema:
        return " | ".join(repr(value) for value in schema.get("enum", [schema.get("const")]))
    return str(schema.get("type", "any"))
