"""What mkdocs does not do by itself: pictures of committed results on pages, and Sphinx roles of docstrings as code."""

import re
from pathlib import Path

from mkdocs.structure.files import File

_RESULTS = "benchmarks/results"
_ROLE = re.compile(r":(?:class|meth|func|data|attr|mod):<code>(~?)([^<]+)</code>")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for path in sorted(root.glob(f"{_RESULTS}/**/*")):
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, str(path.relative_to(root)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    # On the site, the results lie beside the pages and not above them.
    return markdown.replace(f"](../{_RESULTS}/", f"]({_RESULTS}/")


def on_page_content(html, **_):
    return _ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)
