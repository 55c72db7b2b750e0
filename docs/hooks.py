"""Brings the Markdown and figures outside docs/ into the site, so that links to them work there as well.

A hook of MkDocs. In the repository a page of docs/ links to `../benchmarks/tiers/x.md`; in the site, whose root is
docs/, the same file is `benchmarks/tiers/x.md`. Links are resolved as the repository has them and written as the site
has them. A link to a file that the site does not have, such as a module, becomes its path as code.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/**/*.png")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)|(!\[[^\]\n]*\])\(([^)\s]+)\)")


def on_files(files: Files, config) -> Files:
    """Adds the files outside docs/ to the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
            if "/" in name:
                file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrites relative links from places in the repository to places in the site."""
    inside = Path(page.file.abs_src_path).is_relative_to(config.docs_dir)
    here = posixpath.dirname(page.file.src_uri)
    folder = posixpath.join("docs", here) if inside else here  # of the page, in the repository

    def site_link(target: str) -> str | None:
        """Returns the link as the site has it; None where the site lacks the file."""
        if re.match(r"[a-z]+:|/|#", target):
            return target
        name = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
        return os.path.relpath(name, here or ".").replace(os.sep, "/") if files.get_file_from_path(name) else None

    def replace(found: re.Match) -> str:
        words, target, anchor, image, source = found.groups()
        link = site_link(target or source)
        if link is None:
            return f"`{words}`" if words and "`" not in words else words or ""
        return f"{image}({link})" if image else f"[{words}]({link}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in parts)
