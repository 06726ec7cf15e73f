"""A result file: reading it, writing it, and what its rows have in common."""

import json
from pathlib import Path


def load(file):
    return json.loads(Path(file).read_text())


def save(result, file):
    """One row per line, so that a change of one measurement is a change of one line."""
    head = {key: value for key, value in result.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n]}}\n')


def setting(row):
    """What the rows of one table have in common."""
    return (
        f"{row['dtype']}, {row['direction']}, {row['device'] if row['device'] == 'cuda' else threads(row['threads'])}"
    )


def threads(n):
    return f"{n} thread{'s' * (n > 1)}"
