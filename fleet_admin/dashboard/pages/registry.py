"""Registry of all pages, in the order of the menu. A page that is added stands here and nowhere else."""

from typing import Final

from fleet_admin.dashboard.pages import account, acting, device, devices, login, overview
from fleet_admin.dashboard.pages.log import alerts, audit, edges, rollouts, session, sessions, usage
from fleet_admin.dashboard.pages.page import Page

PAGES: Final[tuple[Page, ...]] = (
    *overview.PAGES,
    *devices.PAGES,
    *device.PAGES,
    *acting.PAGES,
    *edges.PAGES,
    *sessions.PAGES,
    *session.PAGES,
    *usage.PAGES,
    *rollouts.PAGES,
    *alerts.PAGES,
    *audit.PAGES,
    *account.PAGES,
    *login.PAGES,
)
