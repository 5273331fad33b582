"""The project's wandb workspace as code: what to look at when runs are compared, saved as a new
view whose URL is printed.

    python scripts/wandb_dashboard.py --entity E --project P [--dry-run] [OVERRIDE ...]

Its panels are those of the domains and tasks of the run that the overrides describe, as for
``python -m gain_cl run`` (sequence=paper tasks=paper). --dry-run prints the view's specification
instead: no network, no login. Needs wandb-workspaces: pip install 'gain_cl[dashboard]'.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from gain_cl.compose import composition
from gain_cl.errors import GainError

CHANGES = ("own_step_pct", "backward_pct", "backward_net_pct", "from_base_pct")
COST = ("trainable_parameters", "peak_memory_bytes", "train_seconds")
TRAINING = ("loss_nats", "lr", "grad_norm", "tokens_per_second")
FRONTS = (
    ("own_step_pct", "backward_pct"),
    ("own_step_pct", "from_base_pct"),
    ("trainable_parameters", "backward_pct"),
)


def workspace(entity: str, project: str, config: Any) -> Any:
    """Names of metrics as dashboard.py sends them; runs in two levels, their group and their
    method."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def lines(names: Iterable[str], x: str) -> list[Any]:
        return [wr.LinePlot(title=name, x=x, y=[name]) for name in names]

    def bars(names: Iterable[str]) -> list[Any]:
        return [wr.BarPlot(title=name, metrics=[name]) for name in names]

    domains = [*config.sequence.trained, *config.sequence.controls]
    fronts = [
        wr.ScatterPlot(title=f"{y} by {x}", x=x, y=y, log_x=x == "trainable_parameters")
        for x, y in FRONTS
    ]
    matrix = [
        wr.MediaBrowser(title="matrix", media_keys=["matrix_image"]),
        wr.WeavePanelSummaryTable(table_name="matrix"),
    ]
    tasks = lines([f"task/{task}/accuracy" for task in config.tasks.names], "stage")
    tasks += bars(
        [
            f"task/{task}/{name}_change"
            for task in config.tasks.names
            for name in ("accuracy", "margin")
        ]
    )
    groups = [ws.Metric("Group"), ws.Config("method")]
    sections = {
        "Summary": [*fronts, *bars([*CHANGES, *COST])],
        "Matrix": matrix,
        "Perplexity": lines([f"ppl/{d}" for d in domains], "stage"),
        "Change from pretrained, %": lines([f"change_pct/{d}" for d in domains], "stage"),
        "Tasks": tasks,
        "Training": lines([f"train/{name}" for name in TRAINING], "train/global_step"),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="gain_cl",
        settings=ws.WorkspaceSettings(max_runs=100),
        sections=[
            ws.Section(name=name, panels=panels, is_open=True)
            for name, panels in sections.items()
            if panels
        ],
        runset_settings=ws.RunsetSettings(
            groupby=groups, pinned_columns=[f"summary:{name}" for name in (*CHANGES, *COST)]
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    try:
        view = workspace(args.entity, args.project, composition.compose(args.overrides))
    except GainError as error:
        sys.exit(f"wandb_dashboard: error: {error}")
    except ImportError as error:
        sys.exit(f"wandb_dashboard: error: {error}; pip install 'gain_cl[dashboard]'")
    if args.dry_run:
        print(
            view._model.spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        )  # what save() sends
        return
    try:
        print(view.save().url)
    except Exception as error:  # of no login, no network, no such entity
        sys.exit(
            "wandb_dashboard: error: not saved: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        )


if __name__ == "__main__":
    main()
