"""Check the built documentation: every link and image leads somewhere, and no page asks another machine for anything.

python tools/check_site.py [site]
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {
    "script": ("src",), "img": ("src", "srcset"), "link": ("href",), "iframe": ("src",), "source": ("src", "srcset"),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "embed": ("src",), "use": ("href",),
}  # fmt: skip
"""What a browser fetches by itself; a link that a person has to follow may lead anywhere."""
_CSS_ADDRESS = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?(?!data:)([^"')\s;]+)""")


class Page(HTMLParser):
    """What a page fetches, where its links lead, and what in it can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses of a tag."""
        given = {name: value for name, value in attrs if value is not None}
        self._in_style = tag == "style"
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev", "author"):
            return  # said, not fetched
        self.loads += [given[name].split()[0] for name in _LOADS.get(tag, ()) if given.get(name, "").strip()]
        self.loads += _CSS_ADDRESS.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Collect the addresses of a style sheet inside the page."""
        if self._in_style:
            self.loads += _CSS_ADDRESS.findall(data)


def is_outside(address: str) -> bool:
    """Return whether an address is on another machine."""
    return urlsplit(address).scheme in ("http", "https", "ftp", "ws", "wss") or address.startswith("//")


def site_faults(site: Path) -> list[str]:
    """Return what is wrong with a built site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site} holds no page"]
    for path, page in pages.items():
        name = path.relative_to(site)
        faults += [f"{name}: fetches {address}" for address in page.loads if is_outside(address)]
        if path.name == "404.html":  # its addresses are those of a server's root
            continue
        inside = [address for address in page.loads + page.links if not is_outside(address)]
        faults += [f"{name}: {address} leads nowhere" for address in inside if not _is_there(address, path, pages)]
    for sheet in sorted(site.rglob("*.css")):
        addresses = _CSS_ADDRESS.findall(sheet.read_text(encoding="utf-8"))
        faults += [f"{sheet.relative_to(site)}: fetches {address}" for address in addresses if is_outside(address)]
    return faults


def _is_there(address: str, page: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(address)
    if parts.scheme:
        return parts.scheme in ("mailto", "data")
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return False
    return not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].places | {"__top"}


def main() -> int:
    """Check the site and return the exit code."""
    faults = site_faults(Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve())
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
