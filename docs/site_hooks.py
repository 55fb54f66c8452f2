"""Hooks of `mkdocs.yml`: pages that lie outside `docs/` are part of the site, and links lead to them.

A page is written for readers of the repository: its links are relative to where it lies there. The site
has the same files, with those of `docs/` at the top.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "benchmarks/results/*.png"]
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    here = posixpath.dirname(name if (ROOT / name).exists() else f"docs/{name}")

    def lead(link):
        path = posixpath.normpath(posixpath.join(here, link["path"]))
        target = path.removeprefix("docs/")
        if files.get_file_from_path(target) is None and (ROOT / path).exists():
            return link["text"]  # a script: in the repository, not on the site
        way = posixpath.relpath(target, posixpath.dirname(name) or ".")
        return f"[{link['text']}]({way}{link['anchor'] or ''})"

    return _LINK.sub(lead, markdown)
