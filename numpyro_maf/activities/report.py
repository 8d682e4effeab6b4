# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Results as files: probabilities as CSV, a picture a day, and one HTML page that shows all."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from numpyro_maf.activities.pictures import day_picture, days_of

if TYPE_CHECKING:
    from numpyro_maf.activities.home import Home

__all__ = ["write_report"]

MOST_DAYS = 60  # pictures a table
_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { line-height: 1.5 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: left }
th { border-bottom: 1px solid #999 } img { max-width: 100% } .note { color: #666 }
@media (prefers-color-scheme: dark) { body { background: #181a1b; color: #ddd } img { background: #fff } }
"""
_MEANING = {
    "accuracy": "share of slots in which the likeliest activity was right",
    "macro_f1": "F1 score, the mean over activities: rare ones count as much as common ones",
    "log_loss": "mean of minus the log of the probability that the true activity had; 0 is perfect",
    "ece": "expected calibration error: how far stated probabilities are from the shares that are right",
    "minutes": "minutes with a label",
    "confident_and_wrong_minutes": "minutes in stretches of more than ten at over 95% for a wrong activity",
}


def write_report(
    home: Home,
    tables: Sequence[tuple[str, pd.DataFrame, pd.DataFrame, dict[str, float] | None]],
    folder: Path,
) -> Path:
    """Write probabilities, pictures and the page.

    :param tables: of each table its name, the frame, its probabilities and its scores or None.
    :return: the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>What happened at home</h1><pre>{html.escape(repr(home))}</pre>"]
    for name, frame, p, scores in tables:
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)
        written = pd.concat([frame[[home.time]], p.round(5)], axis=1)
        written.to_csv(folder / f"probabilities_{stem}.csv", index=False)
        parts.append(f"<h2>{html.escape(Path(name).name)}</h2>")
        shares = p.mean().sort_values(ascending=False)
        hours = shares * len(p) * home.step / 60
        parts.append(_table(
            ["activity", "share", "hours"],
            [[a, f"{s:.1%}", f"{hours[a]:.1f}"] for a, s in shares.items()],
        ))  # fmt: skip
        if scores:
            parts.append("<h3>Compared with the labels of the table</h3>")
            rows = [[k.replace("_", " "), f"{v:.3f}", _MEANING.get(k, "")] for k, v in scores.items()]
            parts.append(_table(["score", "", "what it says"], rows))
        parts.append(_pictures(home, frame, folder, stem))
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>What happened at home</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _pictures(home: Home, frame: pd.DataFrame, folder: Path, stem: str) -> str:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p class=note>No pictures: matplotlib is not installed.</p>"
    data, parts = home.read(frame), []
    days, p = days_of(data), home.smoothed(data)
    for day in days[:MOST_DAYS]:
        path = folder / f"{stem}_{day}.png"
        day_picture(home, data, p, day=day, path=path)
        image = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h3>{day}</h3><img alt='{day}' src='data:image/png;base64,{image}'>")
    if len(days) > MOST_DAYS:
        parts.append(f"<p class=note>The first {MOST_DAYS} of {len(days)} days are shown.</p>")
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(r, 'td') for r in rows)}</table>"
