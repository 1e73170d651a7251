"""Print the changelog's section of a release, if tag, package and changelog agree on its version.

Usage: `python .github/scripts/release_notes.py v0.2.0 > notes.md`. Exits with status 1 and one line where they disagree.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def release_notes(tag: str, root: Path = ROOT) -> str:
    """Return the text of the changelog's section for this tag, without its heading.

    Args:
        tag: The release's tag, such as `v0.2.0`.
        root: The repository's folder.

    Raises:
        ValueError: Tag, `__version__` and changelog do not name the same version, or the section has no date or no text.
    """
    source = (root / "aligner_middleware" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    version = found.group(1) if found else None
    if tag != f"v{version}":
        raise ValueError(
            f"the tag is {tag!r}, and aligner_middleware.__version__ is {version!r}: expected 'v{version}'"
        )
    changelog = (root / "CHANGELOG.md").read_text()
    section = re.search(
        rf"^## \[{re.escape(version or '')}\] - \d{{4}}-\d{{2}}-\d{{2}}\n(.*?)(?=^## \[|^\[|\Z)",
        changelog,
        re.MULTILINE | re.DOTALL,
    )
    if section is None or not section.group(1).strip():
        raise ValueError(
            f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD' with text: write it before the tag"
        )
    return section.group(1).strip() + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(release_notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
