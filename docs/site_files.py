"""mkdocs: what the site holds. Files keep their places in the repository, so the same links lead to them in both."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

PAGES = ("*.md", "docs/*.md", "examples/*/README.md")
LINK = re.compile(r"\]\(([^)#\s]+)")
NAME = re.compile(r"^\| `([\w.]+)`", re.MULTILINE)  # in the table of docs/api.md


def on_files(files, config):
    root = Path(config.config_file_path).parent
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())}
    own = pages + sorted(path for path in linked.difference(pages) if path.is_file())
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files(theme + [File.generated(config, str(path.relative_to(root)), abs_src_path=str(path)) for path in own])


def on_page_markdown(markdown, page, **_):
    """Below the table of public names: the signature and the docstring of each."""
    if page.file.src_uri != "docs/api.md":
        return markdown
    directives = [f"::: {name}" for name in NAME.findall(markdown)]
    return "\n\n".join([NAME.sub(r"| [`\1`](#\1)", markdown), *directives])
