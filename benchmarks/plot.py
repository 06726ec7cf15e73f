"""Bars of the speed-up over eager, one figure per op."""

import math

from .result_file import setting

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

COLOURS = {"imagegen nchw": "#1f6fb4", "imagegen channels_last": "#7db8e8"}
OTHER_COLOURS = ("#9a9a9a", "#e0a030", "#5aa469", "#a05195")
MISSING = "the plots need matplotlib, which is not installed: pip install matplotlib"


def save_plots(result, folder, stem):
    """One PNG per op: a panel for each setting."""
    if Figure is None:
        raise ImportError(MISSING)
    files = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        files.append(folder / f"{stem}-{op}.png")
        draw(op, rows, result["environment"]).savefig(files[-1], dpi=110)
    return files


def draw(op, rows, environment):
    settings = list(dict.fromkeys(map(setting, rows)))
    labels = list(dict.fromkeys(row["label"] for row in rows))  # one axis for all panels: they share its names
    colours = _colours(_series(rows))
    columns = len({row["dtype"] for row in rows})
    lines = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(max(6, (1 + 0.75 * len(labels)) * columns), 1.6 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex="col").T.flatten()
    for panel, title in zip(axes, settings, strict=False):
        _panel(panel, labels, _series([row for row in rows if setting(row) == title]), colours)
        panel.set_title(title, fontsize=9)
        panel.set_ylabel("times faster than eager", fontsize=8)
    machine = f"{environment['cpu']}, torch {environment['torch']}"
    figure.suptitle(f"{op} against the better eager layout\n{machine}", fontsize=10)
    handles = {bars.get_label(): bars for panel in axes for bars in panel.containers}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _colours(names):
    """A provider has one colour in all panels, whichever others stand beside it."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | dict(zip(others, OTHER_COLOURS * len(others), strict=False))


def _panel(axes, labels, series, colours):
    width = 0.8 / max(1, len(series))
    for k, (name, ratios) in enumerate(series.items()):
        at = [n + (k - (len(series) - 1) / 2) * width for n in range(len(labels))]
        heights = [ratios.get(label, 0) for label in labels]
        bars = axes.bar(at, heights, width, label=name, color=colours[name])
        if name in COLOURS:
            axes.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=6, rotation=90, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)


def _series(rows):
    """Name -> shape -> ratio: ours in each layout, every other provider in its better one; failed rows have no bar."""
    series = {}
    for row in rows:
        if "eager" in row["speedup"]:
            ours = row["provider"] == "imagegen"
            bars = series.setdefault(f"imagegen {row['layout']}" if ours else row["provider"], {})
            bars[row["label"]] = max(bars.get(row["label"], 0), row["speedup"]["eager"]["ratio"])
    return series
