"""Where data sets are looked for."""

import os
from pathlib import Path


def find_folder(name, folder, marker, install):
    """The folder that holds the files of the data set `name`: the given one, or the first shared one that has them.

    Args:
        name: the data set's name, that of its folder under the shared `datasets` folders.
        folder: the user's own folder, or None.
        marker: a glob pattern that matches a file of the data set.
        install: a sentence on how to get the files, for the error.

    Raises: FileNotFoundError that lists the places.
    """
    folders = [Path(folder)] if folder is not None else [place / name for place in _shared_places()]
    for place in folders:
        if any(place.glob(marker)):
            return place
    raise FileNotFoundError(f"{name}: no {marker} in {', '.join(map(str, folders))}; {install}")


def _shared_places():
    """The `datasets` folder of the user, then those of the system (freedesktop.org's base directories)."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    system = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(share) / "datasets" for share in (home, *system.split(":"))]
