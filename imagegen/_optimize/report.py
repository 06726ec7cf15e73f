"""What optimize did to a model."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """The module `name` (in a container: the children that run as one) is now computed by the op `by`."""

    name: str
    was: str
    by: str


@dataclass(frozen=True)
class Left:
    """The module `name` is as it was, because of `why`."""

    name: str
    was: str
    why: str


@dataclass
class Report:
    """What was replaced, and what was left and why; prints as a table, alike modules on one line.

    `kept` counts the modules that an earlier optimize had replaced already. `moved` names the convolutions, replaced or
    not, whose weights now lie in channels_last.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    kept: int = 0
    moved: list[str] = field(default_factory=list)

    def __str__(self):
        before = f", {self.kept} were before" if self.kept else ""
        parts = [f"{len(self.replaced)} replaced{before}, {len(self.left)} left"]
        if self.replaced:
            parts.append(_table("replaced", "by", [(r.was, r.by, r.name) for r in self.replaced]))
        if self.moved:
            parts.append(
                f"weights laid out in channels_last, as cuDNN convolves: {len(self.moved)}, {_where(self.moved)}"
            )
        if self.left:
            parts.append(_table("left", "because", [(left.was, left.why, left.name) for left in self.left]))
        return "\n\n".join(parts)


def _table(what, how, rows):
    """One line for all rows that differ in their names alone."""
    names = {}
    for was, by, name in rows:
        names.setdefault((was, by), []).append(name)
    lines = [(what, how, "count", "where")]
    lines += [(was, by, str(len(found)), _where(found)) for (was, by), found in names.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths[:3]] + ["-" * len("where")])
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _where(names):
    """The names in short: those that differ in numbers alone are one, with * for the numbers that differ."""
    alike = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name.split("."))
    places = [
        ".".join(part[0] if len(set(part)) == 1 else re.sub(r"\d+", "*", part[0]) for part in zip(*g, strict=True))
        for g in alike.values()
    ]
    more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
    return ", ".join(place or "(the model)" for place in places[:_PLACES]) + more


_PLACES = 3  # shown per line
