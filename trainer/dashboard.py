"""Stage `dashboard`: a W&B workspace with the panels of trainer/panels.py. The only door to wandb-workspaces."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from data.errors import UserError
from data.settings import key


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet dashboard`."""

    project: str = key("quintet", help="project whose runs are shown")
    entity: str = key("", help="user or team; empty: the key's own")
    group: str = key("", help="show the runs of this group alone; empty: all")
    name: str = key("Quintet", help="name of the view; each call makes a new one")
    print: bool = key(False, help="print the panels as JSON and ask no server")


def run(config: Config) -> None:
    """Save the view and print its address; or print what it would show.

    Raises:
        UserError: the package or a key is missing, or the server does not answer or refuses.
    """
    if config.print:
        from trainer.panels import SECTIONS

        print(json.dumps([asdict(section) for section in SECTIONS], indent=2))
        return
    _check(config)
    print(_saved(config))


def _check(config: Config) -> None:
    """See that there is what a view needs. Raises UserError."""
    import importlib.util

    from trainer import monitor

    if not importlib.util.find_spec("wandb_workspaces"):
        raise UserError("dashboard: wandb-workspaces is not installed; pip install 'quintet[dashboard]'")
    address, has_key = monitor.server()
    instead = "print=true prints the panels without a server, and `wandb leet` shows offline runs"
    if not has_key:
        raise UserError(f"dashboard: no key for {address}; run `wandb login` or set WANDB_API_KEY; {instead}")
    if not monitor.answers(address):
        raise UserError(f"dashboard: W&B at {address} does not answer; see WANDB_BASE_URL and the network; {instead}")


def _saved(config: Config) -> str:
    """Save a new view and return its address."""
    from trainer import monitor

    try:
        entity = config.entity or monitor.own_entity()
        made: Any = _workspace(config, entity)
        made.save_as_new_view()
        return str(made.url)
    except Exception as error:  # what a client of a server may raise has no end
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        place = f"project={config.project}" + (f" entity={config.entity}" if config.entity else "")
        raise UserError(
            f"dashboard: W&B has refused the view ({reason}); does {place} exist, and may its key write there?"
        ) from None


def _workspace(config: Config, entity: str) -> Any:
    """The view as wandb-workspaces has it; asks no server."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    from trainer.panels import SECTIONS, Panel

    def plot(panel: Panel) -> Any:
        if any("*" in metric for metric in panel.metrics):
            shown: dict[str, Any] = {"metric_regex": "|".join(map(_pattern, panel.metrics))}
        else:
            shown = {"y": list(panel.metrics)}
        return reports.LinePlot(title=panel.title, x=panel.axis, log_y=panel.log or None, **shown)

    sections = [
        workspaces.Section(name=section.name, panels=[plot(panel) for panel in section.panels], is_open=True)
        for section in SECTIONS
    ]
    runs = workspaces.RunsetSettings(filters=f"Group = {config.group!r}" if config.group else "")
    settings = workspaces.WorkspaceSettings(x_axis="train/step")
    return workspaces.Workspace(
        entity=entity,
        project=config.project,
        name=config.name,
        sections=sections,
        settings=settings,
        runset_settings=runs,
    )


def _pattern(metric: str) -> str:
    """A regular expression of the names that a metric with a star stands for."""
    return f"^{'.+'.join(map(re.escape, metric.split('*')))}$"
