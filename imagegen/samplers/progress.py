"""A progress bar that costs an import only where one is shown."""

from .._optional import require


def progress_bar(iterable, show, description, **options):
    if not show:
        return iterable
    return require("tqdm", "a progress bar").tqdm(iterable, desc=description, **options)
