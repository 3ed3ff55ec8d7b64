"""The picture of a schedule: time against stages, coloured by batch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_decentral.pipeline.clock import Span
from lightning_decentral.pipeline.schedules import Schedule

_LEFT, _WIDTH, _ROW, _GAP, _HEAD = 100, 760, 15, 4, 40
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#8DA0CB")
_WAITING = "#e7e7e7"


def draw(schedule: Schedule, spans: Sequence[Span], title: str) -> str:
    """Draw when each stage works, as SVG: a row for each worker; forward passes are light, backward passes dark.

    Args:
        schedule: of the pipeline.
        spans: of its clock, in seconds; the last one ends at the right edge.
        title: over it.
    """
    scale, bottom = _WIDTH / max(span.end for span in spans), _HEAD + schedule.workers * (_ROW + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 10} {bottom + 8}" '
        'font-family="sans-serif">',
        f'<rect width="{_LEFT + _WIDTH + 10}" height="{bottom + 8}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{title}</text>',
    ]
    for worker in range(schedule.workers):
        y = _HEAD + (schedule.workers - 1 - worker) * (_ROW + _GAP)
        stages = " and ".join(map(str, schedule.stages_of(worker)))
        lines.append(f'<text x="4" y="{y + 12}" font-size="11">stage {stages}</text>')
        lines.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_ROW}" fill="{_WAITING}"/>')
        for span in spans:
            if schedule.worker_of(span.stage) != worker:
                continue
            x, width = _LEFT + span.begin * scale, max((span.end - span.begin) * scale - 0.6, 0.4)
            colour = _COLOURS[span.work.batch % len(_COLOURS)]
            opacity = "1" if span.work.backward else "0.45"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW}" fill="{colour}" '
                f'fill-opacity="{opacity}"/>'
            )
            if schedule.parts == 1:
                lines.append(
                    f'<text x="{x + width / 2:.1f}" y="{y + 11}" font-size="9" text-anchor="middle">'
                    f"{span.work.batch}</text>"
                )
    return "\n".join([*lines, "</svg>"]) + "\n"
