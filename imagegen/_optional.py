"""Optional libraries: imported inside the function that needs them, or a sentence on how to get them."""

import importlib

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def require(module, purpose):
    """Import an optional library by its module name.

    Raises: ImportError with the install line where it is absent.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f"{purpose} needs {package}: pip install {package}") from error
