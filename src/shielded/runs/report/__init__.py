"""The picture grids and the self-contained HTML page that a run leaves behind."""

from shielded.runs.report.grid import Diversity, Row, diversity_grid, protection_grid, stack
from shielded.runs.report.page import distance_plot, trace_plot, write_report

__all__ = [
    "Diversity",
    "Row",
    "distance_plot",
    "diversity_grid",
    "protection_grid",
    "stack",
    "trace_plot",
    "write_report",
]
