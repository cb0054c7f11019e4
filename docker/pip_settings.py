"""Hands this machine's way to its package registries to an image build: reads `pip config list`, writes pip.conf and says what to mount.

pip config list | python3 docker/pip_settings.py OUT WHEELS   writes OUT/pip.conf, and OUT/ca.crt where pip names certificates, and prints a line
`FOLDER<tab>WHEELS/N` for each local folder that pip looks through: what the build has to find there, with WHEELS at /run/wheels.
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

MOUNT = "/run/wheels"
CA_FILE = "/run/ca.crt"
SINGLES = ("proxy", "timeout", "default-timeout", "retries")
LISTS = {"index-url": 1, "extra-index-url": 1, "find-links": 0, "trusted-host": 0}  # 1: pages of a local index link to files beside its folder
SOURCES = ("global", "install", ":env:")  # later ones win, as in pip


def read_settings(listing: str) -> dict[str, str]:
    """What `pip config list` printed, as name -> value."""
    settings: dict[str, str] = {}
    for source in SOURCES:
        for line in listing.splitlines():
            place, _, value = line.partition("=")
            section, _, name = place.rpartition(".")
            if section == source and value:
                settings[name] = str(ast.literal_eval(value))
    return settings


def render(settings: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The text of a pip.conf for the build, and every local folder that it names with its place below /run/wheels."""
    places: dict[str, str] = {}

    def inside(word: str, up: int) -> str:
        """The word as the build sees it, with the folder `up` levels above it mounted; a URL stays as it is."""
        path = PurePosixPath(unquote(urlsplit(word).path) if word.startswith("file:") else word)
        if not path.is_absolute():
            return word
        folder = path.parents[up - 1] if up else path
        place = PurePosixPath(MOUNT, places.setdefault(str(folder), str(len(places))), path.relative_to(folder))
        return place.as_uri() if word.startswith("file:") else str(place)

    lines = ["[global]"]
    lines += [f"{name} = {settings[name]}" for name in SINGLES if settings.get(name)]
    for name, up in LISTS.items():
        words = [inside(word, up) for word in settings.get(name, "").split()]
        if words:
            lines.append("\n    ".join([f"{name} =", *words]))
    if settings.get("cert"):
        lines.append(f"cert = {CA_FILE}")
    return "\n".join(lines) + "\n", places


def main() -> None:
    out, wheels = map(Path, sys.argv[1:])
    settings = read_settings(sys.stdin.read())
    text, places = render(settings)
    (out / "pip.conf").write_text(text)
    if settings.get("cert"):
        shutil.copyfile(settings["cert"], out / "ca.crt")
    for folder, place in places.items():
        print(folder, wheels / place, sep="\t")


if __name__ == "__main__":
    main()
