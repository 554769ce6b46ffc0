"""Fills the API page: a section for each folder of the package, from the top layer down, and in it every module.

The page has no list of its own, so that a new module is on it without an edit.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "ibaml"
MARKER = "<!-- every module -->"


def layers() -> list[str]:
    """Returns the folders and modules at the top of the package, from the top layer down."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(each for each in settings["tool"]["importlinter"]["contracts"] if each["id"] == "layers")
    return [name.strip() for layer in contract["layers"] for name in layer.split("|")]


def modules(name: str) -> Iterator[str]:
    """Yields the dotted names of a top-level module, or of a folder and all that is in it, bases first."""
    path = PACKAGE / name
    files = [path.with_suffix(".py")] if not path.is_dir() else sorted(path.rglob("*.py"), key=_order)
    for file in files:
        if not file.name.startswith("_") or file.name == "__init__.py":
            parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sections() -> str:
    """Returns the sections of the page as Markdown."""
    lines: list[str] = []
    for name in layers():
        lines += [f"## `ibaml.{name}`", ""]
        for module in modules(name):
            if module != f"ibaml.{name}":
                lines += [f"### `{module}`", ""]
            is_folder = (PACKAGE.parent / Path(*module.split("."))).is_dir()
            # A folder's names are shown where they are defined.
            lines += [f"::: {module}", *(["    options:", "      members: false"] if is_folder else []), ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:  # noqa: D103 - the name is that of mkdocs
    return markdown.replace(MARKER, sections()) if page.file.src_uri == "api.md" else None


def _order(file: Path) -> tuple[Any, ...]:
    return file.parent.parts, file.name != "__init__.py", file.name != "base.py", file.name
