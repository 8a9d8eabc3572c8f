"""Writes the Grafana dashboards: python dashboards/generate.py [--check]. With --check nothing is written, and 1 says that a file is old.

grafana-foundation-sdk makes the schema's JSON; what it leaves out (numbers of panels, letters of queries, annotations of Prometheus) is
put in afterwards.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import panels
from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as schema

FOLDER = Path(__file__).parent
SOURCE = schema.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT, WIDTH = 8, 24


@dataclass(frozen=True)
class Page:
    """One dashboard: rows of panels by title, and its variables by name with the query for their values."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[panels.Panel]]]
    variables: Sequence[tuple[str, str, str]]


ARM = ("arm", "Arm", "label_values(fanmark_queries_started_total, arm)")
TARGET = ("target", "Target", "label_values(fanmark_call_duration_seconds_count, target)")
RESOURCE = ("resource", "Resource", "label_values(fanmark_amplification_ratio, resource)")
MODEL = ("model", "Model", "label_values(vllm:num_requests_running, model_name)")
MARKS = (  # name, colour, and which marks
    ("Start and end", "green", 'mark=~"start|end"'),
    ("Counting begins", "blue", 'mark=~"count[ 0-9]*"'),
    ("Stages", "orange", 'mark=~".*stage.*"'),
)
PAGES = (
    Page(
        "fanmark-fan-out",
        "Fan-out",
        "What an agent's query costs against the baseline's, and whether it is what the shape must cost.",
        (
            ("Amplification", panels.AMPLIFICATION),
            ("Expected against measured", panels.EXPECTED),
            ("How queries are spread", panels.SPREAD),
            ("Traffic by arm", panels.TRAFFIC),
            ("Latency", panels.LATENCY),
            ("Tools", panels.TOOLS),
            ("The client itself", panels.CLIENT),
        ),
        (ARM, TARGET, RESOURCE),
    ),
    Page(
        "fanmark-server",
        "Server",
        "The inference server's own metrics (vLLM, or the stub, which has its names) beside the load that causes them.",
        (("Load and queue", panels.LOAD), ("Engine", panels.ENGINE)),
        (ARM, TARGET, MODEL),
    ),
    Page(
        "fanmark-run",
        "Run",
        "One run from start to end: what it is, how far it is, whether its result is to be trusted.",
        (("Run", panels.RUN),),
        (ARM, TARGET),
    ),
)


def built(panel: panels.Panel) -> Any:
    """The panel's builder. A legend names each series and shows its last value, so that no colour is needed to read it."""
    legend = common.VizLegendOptions().show_legend(True).placement(kinds.LegendPlacement.BOTTOM).calcs(["lastNotNull"])
    legend = legend.display_mode(kinds.LegendDisplayMode.TABLE)
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    if panel.kind == "stat":
        made: Any = stat.Panel().text_mode(kinds.BigValueTextMode.VALUE_AND_NAME).reduce_options(last)
    elif panel.kind == "bars":
        made = bargauge.Panel().orientation(kinds.VizOrientation.HORIZONTAL).min(0).legend(legend).reduce_options(last)
    else:
        made = timeseries.Panel().legend(legend).line_width(2).fill_opacity(30 if panel.stacked else 0).min(0)
        if panel.stacked:
            made = made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    made = made.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    for letter, (expr, label) in zip("ABCDEFGH", panel.queries, strict=False):
        query = prometheus.Dataquery().expr(expr).legend_format(label).ref_id(letter).datasource(SOURCE)
        query = query.exemplar(True) if panel.kind == "timeseries" else query.instant()
        made = made.with_target(query)
    return made.span(panel.width).height(HEIGHT)


def chosen(variable: str) -> schema.VariableOption:
    """What a variable begins with: all of its values, but of resources one, for each has three lines."""
    if variable == "resource":
        return schema.VariableOption(selected=True, text=["output_tokens"], value=["output_tokens"])
    return schema.VariableOption(selected=True, text="All", value="$__all")


def page_json(page: Page) -> dict[str, Any]:
    """One dashboard."""
    board = dashboard.Dashboard(page.title).uid(page.uid).description(page.description).tags(["fanmark"])
    board = board.refresh("5s").time("now-15m", "now").timezone("browser").editable()
    board = board.tooltip(schema.DashboardCursorSync.CROSSHAIR)
    board = board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name, label, query in page.variables:
        board = board.with_variable(
            dashboard.QueryVariable(name)
            .label(label)
            .query(query)
            .datasource(SOURCE)
            .refresh(schema.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(chosen(name))
        )
    for title, row in page.rows:
        board = board.with_row(dashboard.Row(title))
        for panel in row:
            board = board.with_panel(built(panel))
    found: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    return finished(found)


def finished(found: dict[str, Any]) -> dict[str, Any]:
    """What the SDK leaves out."""
    for number, panel in enumerate(found["panels"], start=1):
        panel["id"] = number
    for variable in found["templating"]["list"]:
        variable.pop("id", None)
        for key in [key for key in variable if key.startswith("auto")]:
            del variable[key]
    source = {"type": "prometheus", "uid": "${datasource}"}
    found["annotations"] = {
        "list": [
            {
                "name": name,
                "datasource": source,
                "enable": True,
                "hide": False,
                "iconColor": colour,
                "expr": f"fanmark_run_mark_timestamp_seconds{{{which}}} * 1000",
                "useValueForTime": True,  # the sample's value is the instant, not the time of its scrape
                "titleFormat": "{{mark}}",
                "tagKeys": "mark",
                "step": "1s",
            }
            for name, colour, which in MARKS
        ]
    }
    return found


def main(argv: Sequence[str]) -> int:
    """Writes or checks."""
    old = []
    for page in PAGES:
        path, text = FOLDER / f"{page.uid.removeprefix('fanmark-')}.json", json.dumps(page_json(page), indent=1) + "\n"
        if "--check" in argv:
            old += [path.name] if not path.exists() or path.read_text() != text else []
        else:
            path.write_text(text)
    if old:
        print(f"not as generated: {', '.join(old)}: run python dashboards/generate.py", file=sys.stderr)
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
